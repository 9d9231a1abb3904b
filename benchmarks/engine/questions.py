"""How often a step makes the host wait for its device: the operations that ask for a value, or a shape by one."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import benchmarks.harness as h
import fewstep as fs
from fewstep.flow.guidance import DrawnGuidance, FixedGuidance, NoGuidance, TrainingGuidance
from fewstep.flow.paths import Linear
from fewstep.flow.preconditioning.jumps import LinearPreconditioning
from fewstep.networks.base import NetworkConfig
from fewstep.networks.dit import DiTConfig
from fewstep.networks.mlp import MLPConfig
from fewstep.networks.unet import UNetConfig
from fewstep.objectives import (
    CD,
    CT,
    CTM,
    ECT,
    EMD,
    ESD,
    ISD,
    LMD,
    LSD,
    PSD,
    SCD,
    SCT,
    Batch,
    Companions,
    DiagonalMatching,
    MeanFlow,
    Objective,
    Regression,
    Shortcut,
    TeacherSteps,
)
from fewstep.objectives.pairs import Pairs
from fewstep.recipes import recipe
from fewstep.utils.random import Draws

_ASKING = {
    "_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "equal", "is_nonzero", "_unique2",
    "unique_dim", "unique_consecutive", "bincount",
}  # fmt: skip
"""`.item()`, float(), int() and bool() are the first."""
STEPS = TeacherSteps(points=4)
UNGUIDED: tuple[Objective, ...] = (CT(), ECT(), SCT(), DiagonalMatching(), Regression())
GUIDED: tuple[Any, ...] = (
    ISD(),
    ISD(pairs=Pairs(flow_matching_ratio=0.5, endpoint_share=0.5)),
    MeanFlow(),
    ESD(),
    LSD(),
    PSD(),
    Shortcut(),
    EMD(),
    EMD(velocity="own"),
    LMD(),
    SCD(),
    CD(),
    CTM(steps=STEPS, sigma_data=0.5),
    CTM(steps=replace(STEPS, solver="dpm-solver++"), sigma_data=0.5),
)
STRENGTHS: tuple[TrainingGuidance, ...] = (FixedGuidance(1.5, 0.2, 0.8), DrawnGuidance())
NETWORKS: dict[str, NetworkConfig] = {
    "MLP": MLPConfig(width=8, depth=1, embedding_width=8),
    "U-Net": UNetConfig(width=8, multipliers=(1,), blocks=1, attention=(), embedding_width=8),
    "DiT": DiTConfig(width=16, depth=1, heads=2, patch=2),
}
SHAPE, PLACES = (1, 4, 4), torch.arange(5, 21)
Case = tuple[Objective, TrainingGuidance]


class Questions(TorchDispatchMode):
    """Notes the operations that ask; indices of bool among them, which become rows by their values."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        self.operations += 1
        if name in _ASKING or masks:
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


def cases(*strengths: TrainingGuidance) -> list[Case]:
    """All objectives, those that may be guided with these kinds of guidance."""
    return [
        *((each, NoGuidance()) for each in UNGUIDED),
        *((replace(each, guidance=strength), strength) for each in GUIDED for strength in strengths),
    ]


def maps(network: str, guidance: TrainingGuidance) -> tuple[fs.FlowMap, fs.FlowMap]:
    """A student, which takes guidance as an input if it is drawn, and a teacher."""
    built = (NETWORKS[network].build(SHAPE, 2, guided) for guided in (guidance.conditions_network, False))
    student, teacher = (fs.FlowMap(Linear(), LinearPreconditioning(), each) for each in built)
    return student, teacher


def batch_on(device: str) -> Batch:
    """Sixteen samples of two classes."""
    labels = PLACES % 2
    own = Draws(0, 3, PLACES.to(device))
    x0 = torch.zeros(len(PLACES), *SHAPE, device=device)
    return Batch(x0, labels.to(device), own, places=PLACES, host_labels=labels)


def asked(network: str, case: Case) -> Questions:
    """What the losses of a batch, and their gradients, ask."""
    objective, guidance = case
    student, teacher = maps(network, guidance)
    with Questions() as questions:
        losses = objective(student, batch_on("cpu"), Companions(teacher=teacher, ema_target=student))
        losses.mean().backward()
    return questions


def rows() -> Iterator[h.Row]:
    """A row for each network, over all objectives and guidance; one for the whole step of a trainer."""
    all_cases = cases(NoGuidance(), *STRENGTHS)
    for network in NETWORKS:
        found = [asked(network, case) for case in all_cases]
        most, operations = max(len(each.asked) for each in found), sum(each.operations for each in found)
        yield row(
            f"losses on the {network}, at most, of {len(found)} objectives and kinds of guidance", most, operations
        )
    config = replace(recipe("digits"), network=NETWORKS["MLP"])
    with h.trainer_of(config) as trainer:
        trainer.take_step()
        with Questions() as questions:
            trainer.take_step()
    yield row("the whole step of a trainer, recipe digits", len(questions.asked), questions.operations)


def row(setting: str, value: int, operations: int) -> h.Row:
    return {
        "measure": "questions to the device in a step", "setting": setting, "value": value, "unit": "",
        "beside": f"{operations:,} operations",
    }  # fmt: skip
