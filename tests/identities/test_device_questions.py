"""A step asks the device nothing: which samples are of which kind is known on the host, from their random numbers."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.engine.questions import GUIDED, STRENGTHS, asked, batch_on, cases, maps
from fewstep.flow.guidance import NoGuidance, TrainingGuidance
from fewstep.flow.paths import Linear
from fewstep.objectives import EMD, ESD, ISD, LMD, LSD, PSD, Batch, Companions, MeanFlow, Objective, Shortcut
from tests.support.batches import draws, labelled_batch
from tests.support.cases import labelled_map
from tests.support.objectives import changed, made

COUNT = 16
OBJECTIVES: list[Any] = [
    made(ISD, flow_matching_ratio=0.25),
    made(ISD, flow_matching_ratio=0.5, endpoint_share=0.5),
    MeanFlow(),
    ESD(),
    LSD(),
    PSD(),
    Shortcut(),
    EMD(),
    made(EMD, velocity="own", endpoint_share=0.5),
    LMD(),
]


def test_losses_need_no_value_of_the_device() -> None:
    """On the meta device there are shapes and no values: what depends on a value fails."""
    for objective, guidance in cases(STRENGTHS[0]):
        student, teacher = (each.to("meta") for each in maps("MLP", guidance))
        losses = objective(student, batch_on("meta"), Companions(teacher=teacher, ema_target=student))
        losses.mean().backward()
        assert losses.loss.shape == (COUNT,)


@pytest.mark.parametrize(
    ("network", "strengths"), [("MLP", (NoGuidance(), *STRENGTHS)), ("U-Net", STRENGTHS[1:]), ("DiT", STRENGTHS[1:])]
)
def test_losses_ask_for_no_value(network: str, strengths: tuple[TrainingGuidance, ...]) -> None:
    """Nor do they on the host, where nothing would fail; benchmarks/engine counts all combinations."""
    for case in cases(*strengths):
        assert asked(network, case).asked == [], case


@pytest.mark.parametrize("strength", STRENGTHS)
def test_rows_that_are_guided_are_found_on_the_host(strength: TrainingGuidance) -> None:
    """By the random numbers alone those that the strengths on the device would give, in a half of a batch too."""
    batch = batch_on("cpu")
    for each in GUIDED:
        objective = changed(each, guidance=strength, label_dropout=0.3)
        t = objective.target_times(Linear(), batch.on_host())
        if t is None:
            continue
        assert 0 < len(objective.rows_on_host(Linear(), batch)) < COUNT
        for part in (batch, batch[torch.tensor([1, 4, 5, 11])]):
            own = objective.target_times(Linear(), part)
            cond = objective.condition(maps("MLP", strength)[0], part, own)
            omega = strength.strength(Linear(), part.draws, own, cond.kept)
            expected = torch.nonzero(omega != 1).squeeze(1)
            elsewhere = replace(part, x0=part.x0.to("meta"))
            assert torch.equal(objective.rows_on_host(Linear(), elsewhere), expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_rows_are_those_whose_times_are_one(objective: Objective) -> None:
    flow_map, batch = labelled_map(), labelled_batch(16)
    losses = objective(flow_map, batch, Companions(teacher=flow_map, ema_target=flow_map))
    share = 1 - objective.bootstrap if isinstance(objective, Shortcut) else objective.pairs.flow_matching_ratio  # type: ignore[attr-defined]
    on, off = batch.split(share)
    assert torch.equal(on, torch.nonzero(losses.t == losses.s).squeeze(1))
    assert torch.equal(off, torch.nonzero(losses.t != losses.s).squeeze(1))
    assert torch.equal(Batch(batch.x0, None, draws(16), places=torch.arange(16)).split(share)[0], on)


def test_a_batch_without_samples_of_one_kind_has_a_loss() -> None:
    for share in (0.0, 1.0):
        for kind in (ISD(), MeanFlow(), ESD(), LSD(), PSD(), EMD(), LMD()):
            taught = Companions(teacher=labelled_map())
            loss = changed(kind, flow_matching_ratio=share)(labelled_map(), labelled_batch(), taught).loss
            assert bool(loss.isfinite().all())
