"""What the stability study trains: its cells, their labels and their settings."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

import fewstep as fs
from benchmarks.harness import RESULTS, Grid, digest
from fewstep.flow.derivatives import Derivative
from fewstep.flow.times import BetaTimes
from fewstep.objectives import ALONE, Distance, Pairs, Tangent, Weighting
from fewstep.recipes.config import EvaluationConfig, ModelConfig, OptimizerConfig, TrainingConfig
from fewstep.utils.forward_ad import jvp
from fewstep.utils.parts import kind

SAMPLE_SEED = 91_000
LR = 3e-3


@dataclass(frozen=True)
class Study:
    """One data set with one network: how long and with what."""

    data: fs.DataConfig
    shape: tuple[int, int, int]
    network: fs.NetworkConfig
    steps: int
    batch: int
    samples: int


DIGITS, FASHION = (fs.DataConfig(source=name) for name in ("digits", "idx"))
_MLP = fs.MLPConfig(width=256, depth=3, expansion=0.5, embedding_width=64, max_frequency=16.0)
_UNET = fs.UNetConfig(width=16, multipliers=(1, 2), blocks=1, attention=(4,), head_width=16, max_frequency=16.0)
_DIT = fs.DiTConfig(width=64, depth=3, heads=2, patch=2, max_frequency=16.0)
STUDIES = {
    ("digits", "mlp"): Study(DIGITS, (1, 8, 8), _MLP, 800, 256, 1204),
    ("digits", "unet"): Study(DIGITS, (1, 8, 8), _UNET, 400, 64, 1204),
    ("digits", "dit"): Study(DIGITS, (1, 8, 8), _DIT, 800, 64, 1204),
    ("fashion", "unet"): Study(FASHION, (1, 28, 28), replace(_UNET, attention=(7,), patch=2), 1600, 32, 1000),
}
ADAMW = OptimizerConfig(beta2=0.99)
CHANGED = {"no clip": {"clip": 0.0}, "beta2 0.999": {"beta2": 0.999}, "muon": {"name": "muon"}}
OPTIMIZERS = {"adamw": ADAMW} | {name: replace(ADAMW, **own) for name, own in CHANGED.items()}  # type: ignore[arg-type]
SCALINGS = {"linear": "identity", "trig": "unit", "edm": "edm-input"}
OWN_PATH = {name: {"path": "edm", "preconditioning": "bcm"} for name in ("CT", "ECT")}
"""Path and preconditioning of objectives that were made for another than the linear."""


@dataclass(frozen=True)
class Cell:
    """One training run of the study; scaling: empty for the inner scaling that goes with the path (SCALINGS)."""

    group: str
    objective: str
    seed: int = 0
    dataset: str = "digits"
    network: str = "mlp"
    path: str = "linear"
    preconditioning: str = "linear"
    derivative: str = "exact"
    optimizer: str = "adamw"
    lr: float = LR
    initial: str = "random"
    scaling: str = ""


@final
@dataclass(frozen=True)
class ISDApart(fs.Objective):
    """iSD whose two terms are each weighted by their own sg (loss + weight_eps)^-weight_power, per sample."""

    base: fs.ISD = fs.ISD()

    def __call__(self, flow_map: fs.FlowMap, batch: fs.Batch, companions: fs.Companions = ALONE) -> fs.Losses:
        weighting, numbers = self.base.weighting, batch.x0[0].numel()
        found = replace(self.base, weighting=replace(weighting, weight_power=0.0))(flow_map, batch, companions)
        weighed = [weighting.weight(flow_map.path, term, found.t, numbers) * term for term in found.terms.values()]
        return replace(found, loss=weighed[0] + weighed[1], terms=dict(zip(found.terms, weighed, strict=True)))


@final
@dataclass(frozen=True)
class TimeUnitError:
    """The derivative of the published code, dN/dt = J_N v + factor d_t N, in place of `Derivative`.

    On the trig path a network clocked in t/(pi/2) whose time tangent is passed as 1 has factor pi/2.
    """

    factor: float = math.pi / 2

    def along(
        self, flow_map: fs.FlowMap, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: fs.Condition
    ) -> tuple[Tensor, Tensor]:
        """(N, dN/dt) at (x, t, s) along v, dN/dt without its graph."""
        tangents = (v, torch.full_like(t, self.factor))
        return jvp(lambda x, t: flow_map.output(x, t, s, cond), (x, t), tangents, attached=False)


def objectives(study: Study, derivative: str) -> dict[str, fs.Objective]:
    """Every objective by name with its paper's settings; curricula stretched over the run."""
    images, pixels = study.steps * study.batch, math.prod(study.shape)
    d: dict[str, Any] = {"derivative": Derivative(derivative)}
    huber = Distance("pseudo-huber", 0.00054 * math.sqrt(pixels))  # of iCT, 2310.14189
    tangent = Tangent(warm_up_images=images // 5, **d)
    isd, wide, guided = fs.ISD(**d), Weighting(weight_power=1.0, weight_eps=1.0), fs.FixedGuidance(omega=1.3)
    half, most = (Pairs(BetaTimes(), flow_matching_ratio=share) for share in (0.5, 0.75))
    return {
        "flow matching": fs.DiagonalMatching(times=BetaTimes()),
        "iSD": isd,
        "iSD-T": fs.ISD(guidance=guided, **d),
        "MeanFlow": fs.MeanFlow(**d),
        "ESD": fs.ESD(**d),
        "LSD": fs.LSD(**d),
        "PSD": fs.PSD(),
        "PSD, midpoint": fs.PSD(u="midpoint"),
        "shortcut": fs.Shortcut(target_decay=1 - 8 / study.steps),
        "CT": fs.CT(duration=images, distance=huber),
        "ECT": fs.ECT(stage_images=images // 8, distance=huber),
        "sCT": fs.SCT(tangent=tangent),
        "sCD": fs.SCD(tangent=tangent),
        "MeanFlow, guided": fs.MeanFlow(guidance=guided, **d),
        "iSD, diagonal 1/2": replace(isd, pairs=half),
        "iSD, diagonal 3/4": replace(isd, pairs=most),
        "iSD, offset 1": replace(isd, weighting=wide),
        "iSD, offset 1, diagonal 3/4": replace(isd, weighting=wide, pairs=most),
        "iSD, terms apart": ISDApart(isd),
        "iSD, no weight": replace(isd, weighting=Weighting()),
        "iSD, time unit": replace(isd, derivative=TimeUnitError()),  # type: ignore[arg-type]
        "iSD, diagonal 3/4, time unit": replace(isd, pairs=most, derivative=TimeUnitError()),  # type: ignore[arg-type]
        "iSD-T, recipe": fs.ISD(pairs=most, guidance=guided, weighting=wide, **d),
    }


COMPARED = (
    "flow matching", "iSD", "iSD-T", "MeanFlow", "ESD", "LSD", "PSD", "PSD, midpoint", "shortcut", "CT", "ECT", "sCT",
)  # fmt: skip
CHOSEN = ("iSD-T, recipe", "iSD-T", "iSD", "MeanFlow", "ESD", "LSD", "PSD", "sCT")
RATED = (*COMPARED, "iSD-T, recipe", "MeanFlow, guided")
MIXED = (("linear", "euler"), ("linear", "trig"), ("trig", "linear"), ("trig", "euler"))
"""Paths with another's preconditioning."""
_TRIG = {"path": "trig", "preconditioning": "trig"}
_ISD = ("iSD, offset 1", "iSD, diagonal 3/4", "iSD, offset 1, diagonal 3/4")
GROUPS: tuple[tuple[str, tuple[str, ...], dict[str, Any]], ...] = (
    ("base", COMPARED, {}),
    ("settings", ("iSD-T, recipe", *_ISD, "MeanFlow, guided"), {}),
    *(("lr", RATED, {"lr": lr}) for lr in (9e-3, 3e-4)),
    *(("network", ("flow matching", *CHOSEN, "MeanFlow, guided"), {"network": name}) for name in ("unet", "dit")),
    ("path", ("flow matching", *CHOSEN), _TRIG),
    ("leads", ("iSD, diagonal 1/2", "iSD, terms apart", "iSD, no weight"), {}),
    ("derivative", ("iSD", "iSD-T", "MeanFlow", "ESD", "LSD", "sCT"), {"derivative": "finite-difference"}),
    ("time unit", ("iSD", "iSD, time unit", "iSD, diagonal 3/4", "iSD, diagonal 3/4, time unit"), _TRIG),
    ("initial", (*CHOSEN, "PSD, midpoint", "ECT", "sCD"), {"initial": "flow matching"}),
    *(("optimizer", ("iSD", "iSD-T", "MeanFlow", "ESD", "sCT"), {"optimizer": name}) for name in CHANGED),
    *(("preconditioning", ("iSD", "MeanFlow", "ESD"), {"path": p, "preconditioning": own}) for p, own in MIXED),
    ("scaling", ("iSD", "MeanFlow", "ESD"), {"scaling": "unit"}),
    ("lr", RATED, {"lr": 1e-3}),
    ("fashion", RATED, {"dataset": "fashion", "network": "unet"}),
)
"""What a group of cells is for, its objectives, and what it changes of their usual setting; the most telling first."""


def configuration(cell: Cell, initial: str) -> fs.RunConfig:
    """The run of a cell; initial: folder of the flow-matching model that it starts from, or ""."""
    study = STUDIES[cell.dataset, cell.network]
    objective: Any = objectives(study, cell.derivative)[cell.objective]
    images = study.steps * study.batch
    return fs.RunConfig(
        recipe="stability",
        data=study.data,
        model=ModelConfig(
            path=kind(fs.PathConfig, cell.path),
            preconditioning=kind(fs.PreconditioningConfig, cell.preconditioning),
            scaling=kind(fs.ScalingConfig, cell.scaling or SCALINGS[cell.path]),
        ),
        network=study.network,
        objective=objective,
        optimizer=replace(OPTIMIZERS[cell.optimizer], lr=cell.lr, warmup_images=images // 16, decay="cosine"),
        training=TrainingConfig(images=images, batch_size=study.batch, seed=cell.seed, ema_power=(0.1,)),
        evaluation=EvaluationConfig(gamma=float(objective.endpoint_only)),  # those need fresh noise between steps
        initial=initial,
        teacher=initial if cell.objective == "sCD" else "",
    )


def starting(cell: Cell) -> Cell:
    """The flow-matching cell whose model this one starts from: its seed, network, path and preconditioning."""
    return replace(cell, objective="flow matching", initial="random", lr=LR, optimizer="adamw", derivative="exact")


def settings(cell: Cell) -> str:
    """The digest of all that a cell trains and is measured by, whatever its seed."""
    study, config = STUDIES[cell.dataset, cell.network], configuration(cell, "")
    return digest(
        config.data, config.model, config.network, config.objective, config.optimizer, study.steps, study.batch,
        config.training.ema_power, study.samples, SAMPLE_SEED, config.evaluation.gamma,
        None if cell.initial == "random" else settings(starting(cell)),
    )  # fmt: skip


def plan() -> Iterator[Cell]:
    """Every cell of the study, a setting's seeds one after the other."""
    for group, names, changes in GROUPS:
        for name in names:
            yield from (Cell(group, name, seed, **OWN_PATH.get(name, {}) | changes) for seed in (0, 1, 2))


LABEL = tuple(name for name in Cell.__dataclass_fields__ if name != "group")
"""What makes it another run; the group only says what it is for."""
GRID = Grid(RESULTS / "stability" / "cells.jsonl", LABEL, plan, settings, {"scaling": ""})
