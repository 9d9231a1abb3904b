"""Numbers that do not count, and conditions that are observed: every objective heeds both."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep.flow.flow_map import FlowMap, FlowMapConfig
from fewstep.flow.paths import EDM, Linear
from fewstep.flow.preconditioning.jumps import EulerPreconditioning, LinearPreconditioning
from fewstep.flow.preconditioning.network_scaling import IdentityScaling
from fewstep.networks.mlp import MLPConfig
from fewstep.objectives import (
    CD,
    CT,
    CTM,
    ECT,
    ESD,
    ISD,
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
)
from fewstep.utils.errors import ConfigError, ShapeError
from fewstep.utils.random import Draws
from tests.support.cases import F64, SD, noise
from tests.support.objectives import made

STEPS, SIZE, COUNT = 4, 2, 16
LAST = slice(STEPS - 1, STEPS)
OBJECTIVES: dict[str, Objective] = {
    "flow matching": DiagonalMatching(),
    "denoising": DiagonalMatching(measure="denoiser", sigma_data=SD),
    "regression": Regression(),
    "iSD": made(ISD, flow_matching_ratio=0.5),
    "MeanFlow": MeanFlow(),
    "ESD": ESD(),
    "LSD": LSD(),
    "PSD": PSD(),
    "shortcut": Shortcut(target_decay=None),
    "CT": CT(),
    "ECT": ECT(),
    "sCT": SCT(),
    "sCD": SCD(),
    "CD": CD(),
    "CTM": CTM(balance=False, sigma_data=SD),
}
ON_EDM = ("denoising", "CT", "ECT", "sCT", "sCD", "CD", "CTM")


def model(name: str) -> FlowMap:
    """Its output for every number but the last step's is independent of the last step's, and the reverse."""
    path, own = (EDM(), EulerPreconditioning()) if name in ON_EDM else (Linear(), LinearPreconditioning())
    network = MLPConfig(width=16, depth=1, embedding_width=8, max_frequency=4.0)
    settings = FlowMapConfig(path, own, IdentityScaling(), network, (STEPS, SIZE), observation=(2, 3))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        flow_map = settings.build().double()
        for parameter in flow_map.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        flow_map.network.input.weight[:, (STEPS - 1) * SIZE : STEPS * SIZE] = 0  # type: ignore[union-attr, operator]
    return flow_map


def padded(count: int = COUNT) -> Batch:
    """The last step of every chunk does not count."""
    loss_mask = torch.ones(count, STEPS, 1, dtype=torch.bool)
    loss_mask[:, LAST] = False
    draws = Draws(0, 3, torch.arange(count))
    return Batch(SD * noise(count, STEPS, SIZE), None, draws, 0, noise(count, 2, 3, seed=4), loss_mask)


def outcome(name: str, batch: Batch, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(losses (B,), gradient of the output layer's bias (steps, size)) of an objective."""
    student = model(name)
    companions = Companions(teacher=model(name), ema_target=model(name))
    losses = OBJECTIVES[name](student, batch if change is None else replace(batch, x0=batch.x0 + change), companions)
    bias = student.network.output.bias  # type: ignore[union-attr]
    (gradient,) = torch.autograd.grad(losses.mean(), bias)  # type: ignore[arg-type]
    return losses.loss.detach(), gradient.reshape(STEPS, SIZE)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_does_not_count_has_neither_loss_nor_gradient(name: str) -> None:
    change = torch.zeros(COUNT, STEPS, SIZE, dtype=F64)
    change[:, LAST] = 3.0
    loss, gradient = outcome(name, padded())
    other, same = outcome(name, padded(), change)
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same, gradient, rtol=1e-12, atol=1e-12)
    assert (gradient[LAST] == 0).all()
    assert (gradient[: STEPS - 1].abs() > 1e-9).all()
    whole = replace(padded(), loss_mask=None)
    assert (outcome(name, whole)[1][LAST].abs() > 1e-9).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_observation_reaches_the_network(name: str) -> None:
    batch = padded()
    assert batch.observation is not None
    other = replace(batch, observation=batch.observation + 1)
    assert not torch.allclose(outcome(name, other)[0], outcome(name, batch)[0])
    with pytest.raises(ShapeError, match="observations of shape"):
        outcome(name, replace(batch, observation=None))


@given(st.lists(st.booleans(), min_size=4, max_size=4).filter(any), st.integers(1, 5))
def test_the_mean_square_is_that_over_what_counts(counts: list[bool], count: int) -> None:
    loss_mask = torch.tensor(counts)[None, :, None].expand(count, 4, 1)
    error = noise(count, 4, 3, seed=count)
    batch = Batch(error, None, Draws(0, 0, torch.arange(count)), loss_mask=loss_mask)
    expected = torch.stack([row[torch.tensor(counts)].square().mean() for row in error])
    torch.testing.assert_close(batch.masked(error).flatten(1).square().mean(1), expected)
    rows = torch.tensor([count - 1])
    torch.testing.assert_close(batch.masked(error[rows], rows), batch.masked(error)[rows])


def test_a_network_without_observations_refuses_them() -> None:
    network = MLPConfig(width=8, depth=1, embedding_width=8).build((STEPS, SIZE), 0, False).double()
    flow_map = FlowMap(Linear(), LinearPreconditioning(), network)
    with pytest.raises(ConfigError, match="observation was given"):
        DiagonalMatching()(flow_map, padded())
