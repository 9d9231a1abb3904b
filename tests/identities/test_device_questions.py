"""A step asks the device nothing: which samples have s = t is known on the host, from their indices."""

from typing import Any

import pytest
import torch

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import Linear
from fewstep.flow.preconditioning.jumps import LinearPreconditioning
from fewstep.flow.preconditioning.network_scaling import IdentityScaling
from fewstep.objectives import EMD, ESD, ISD, LMD, LSD, PSD, Batch, Companions, MeanFlow, Objective, Shortcut
from fewstep.utils.random import Draws
from tests.support.batches import draws, labelled_batch
from tests.support.cases import labelled_map, random_network
from tests.support.objectives import changed, made

PLACES = torch.arange(5, 21)
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


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_need_no_value_of_the_device(objective: Objective) -> None:
    """On the meta device there are shapes and no values: what depends on a value fails."""
    network = random_network((3,), 2).float().to("meta")
    flow_map = FlowMap(Linear(), LinearPreconditioning(), network, IdentityScaling())
    own = Draws(0, 3, PLACES.to("meta"))
    labels = torch.zeros(16, dtype=torch.int64, device="meta")
    batch = Batch(torch.zeros(16, 3, device="meta"), labels, own, places=PLACES)
    losses = objective(flow_map, batch, Companions(teacher=flow_map, ema_target=flow_map))
    losses.mean().backward()
    assert losses.loss.shape == (16,)


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
