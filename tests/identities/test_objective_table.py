"""The table: complete, and its evaluation counts are those that a counting network measures."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fewstep.objectives
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import FixedGuidance
from fewstep.flow.paths import EDM
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.networks.condition import Condition
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
    TABLE,
    Batch,
    Companions,
    DiagonalMatching,
    Entry,
    MeanFlow,
    Objective,
    Regression,
    Shortcut,
    Tangent,
    TeacherSteps,
)
from fewstep.utils.random import Draws
from tests.support.cases import SD, Callback, noise
from tests.support.objectives import changed, made

EXAMPLES: dict[str, Objective] = {
    "flow matching, denoising": DiagonalMatching(),
    "regression": Regression(),
    "CD": CD(),
    "CTM": CTM(steps=TeacherSteps(u="adjacent"), balance=False, sigma_data=0.5),
    "CT": CT(),
    "ECT": ECT(),
    "sCT": SCT(),
    "sCD": SCD(),
    "EMD": made(EMD, flow_matching_ratio=0.0),
    "LMD": made(LMD, flow_matching_ratio=0.0),
    "MeanFlow": made(MeanFlow, flow_matching_ratio=0.0),
    "iSD": ISD(),
    "iSD-T": ISD(guidance=FixedGuidance(2.0), label_dropout=0.0),
    "ESD": made(ESD, flow_matching_ratio=0.0),
    "LSD": made(LSD, flow_matching_ratio=0.0),
    "PSD": made(PSD, flow_matching_ratio=0.0),
    "shortcut": Shortcut(bootstrap=1.0),
}
FINITE = {
    "sCT": (SCT(tangent=made(Tangent, kind="finite-difference")), 1, 2),
    "EMD": (made(EMD, flow_matching_ratio=0.0, tangent=made(Tangent, kind="finite-difference")), 1, 2),
    "LMD": (made(LMD, flow_matching_ratio=0.0, kind="finite-difference"), 3, 0),
    "MeanFlow": (made(MeanFlow, flow_matching_ratio=0.0, kind="finite-difference"), 1, 2),
    "iSD": (made(ISD, kind="finite-difference"), 2, 2),
    "ESD": (made(ESD, flow_matching_ratio=0.0, kind="finite-difference"), 4, 0),
    "LSD": (made(LSD, flow_matching_ratio=0.0, kind="finite-difference"), 3, 1),
}
"""Forward and frozen evaluations with a finite difference."""


@dataclass
class Count:
    """What a network that is one cosine has been asked."""

    student: Counter[str] = field(default_factory=Counter)
    teacher: Counter[str] = field(default_factory=Counter)

    def map(self, counter: Counter[str], trained: bool) -> FlowMap:
        weight = torch.full((2,), 0.7, dtype=torch.float64, requires_grad=trained)

        def output(x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
            counter["forward" if torch.is_grad_enabled() else "frozen"] += len(x)
            carried = any(forward_ad.unpack_dual(value).tangent is not None for value in (x, t, s))
            counter["tangents"] += len(x) * carried
            return torch.cos(weight * x / (1 + t[:, None]) + s[:, None])

        return FlowMap(EDM(), EulerPreconditioning(), Callback(output))


def measured(objective: Objective, index: int) -> dict[str, int]:
    """Evaluations of one sample; a cosine leaves one node in the graph, and its tangent, a sine, another."""
    count = Count()
    student, average = count.map(count.student, trained=True), count.map(count.student, trained=False)
    companions = Companions(teacher=count.map(count.teacher, trained=False), ema_target=average)
    batch = Batch(SD * noise(1, 2, seed=index), torch.tensor([1]), Draws(0, 3, torch.tensor([index])))
    loss = objective(student, batch, companions).loss.sum()
    found = {name: count.student[name] for name in ("forward", "frozen", "tangents")}
    return found | {"backward": passed_back(loss), "teacher": count.teacher.total() - count.teacher["tangents"]}


def passed_back(loss: Tensor) -> int:
    """Cosines and sines in the graph of a loss."""
    waiting, seen, found = [loss.grad_fn], set(), 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += node.name() in ("CosBackward0", "SinBackward0")
        waiting += [parent for parent, _ in node.next_functions]
    return found


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_counts_are_those_measured(entry: Entry) -> None:
    """The most that a sample costs: one whose jump ends where the next begins costs less."""
    objective = EXAMPLES[entry.name]
    assert type(objective) is entry.objective
    found = [measured(objective, index) for index in range(24)]
    expected = {name: getattr(entry.passes, name) for name in found[0]}
    assert {name: max(each[name] for each in found) for name in expected} == expected
    assert entry.needs_teacher == objective.needs_teacher


@pytest.mark.parametrize(("objective", "forward", "frozen"), FINITE.values(), ids=FINITE.keys())
def test_a_finite_difference_costs_two_evaluations_more(objective: Objective, forward: int, frozen: int) -> None:
    found = measured(objective, 0)
    assert (found["forward"], found["frozen"], found["tangents"]) == (forward, frozen, 0)


@pytest.mark.parametrize("kind", [MeanFlow, ESD, LSD, PSD])
def test_guidance_costs_one_frozen_evaluation_more(kind: type[MeanFlow]) -> None:
    """Of a sample that has the anchor; of one that has a distillation alone, only where its target is the data's."""
    plain, guided = (
        measured(made(kind, flow_matching_ratio=1.0, label_dropout=0.0, **settings), 0)
        for settings in ({}, {"guidance": FixedGuidance(2.0)})
    )
    assert guided == plain | {"frozen": plain["frozen"] + 1}


def test_every_objective_has_a_row_of_its_own() -> None:
    exported = {
        value
        for value in vars(fewstep.objectives).values()
        if isinstance(value, type) and issubclass(value, Objective) and value is not Objective
    }
    assert {entry.objective for entry in TABLE} == exported
    assert len({entry.name for entry in TABLE}) == len(TABLE)
    assert set(EXAMPLES) == {entry.name for entry in TABLE}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["exact", "finite-difference"])
@pytest.mark.parametrize("name", ["iSD", "EMD", "LMD"])
def test_passes_of_a_step_are_those_measured(name: str, kind: str, bf16: bool) -> None:
    """One with a graph is 3, forward and backward, one without 1; a difference's two points are one node of a graph."""
    example = EXAMPLES[name]
    if bf16 and kind == "exact":
        pytest.skip("bf16 changes nothing in it")
    derivative = {"tangent": made(Tangent, kind=kind)} if name == "EMD" else {"kind": kind}
    objective = changed(example, label_dropout=0.0, **derivative)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = measured(objective, 1)
    backward = found["backward" if kind == "exact" else "forward"]
    expected = found["forward"] + found["frozen"] + found["tangents"] + 2 * backward + found["teacher"]
    passes, wide = objective.forward_passes(bf16)
    assert passes == expected
    assert wide == (3 if name != "LMD" else 9) * (bf16 and kind != "exact")
