"""MeanFlow and ESD: expectation or residual zero at oracles, what the gradient flows through, every kind of layer."""

import copy

import pytest
import torch

from fewstep.flow.derivatives import Derivative, DerivativeKind
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import Linear
from fewstep.flow.preconditioning.jumps import LinearPreconditioning
from fewstep.flow.times import UniformTimes
from fewstep.networks.base import NetworkConfig
from fewstep.networks.condition import Condition
from fewstep.networks.dit import DiTConfig
from fewstep.networks.mlp import MLPConfig
from fewstep.networks.unet import UNetConfig
from fewstep.objectives import ESD, LSD, Batch, MeanFlow, Objective, eulerian_residual
from fewstep.utils.errors import ConfigError
from tests.support.batches import LATE, draws, small_batch
from tests.support.cases import (
    F64,
    close,
    every_pair,
    gaussian,
    noise,
    pair,
    random_map,
    random_network,
)
from tests.support.gradients import assert_anchored, gradients
from tests.support.objectives import changed, made

PLAIN = made(MeanFlow, times=UniformTimes(), flow_matching_ratio=0.0, weight_power=0.0, label_dropout=0.0)
BARE = made(ESD, flow_matching_ratio=0.0, label_dropout=0.0)


@every_pair
def test_meanflows_expected_gradient_is_zero_at_the_oracle(path_name: str, name: str) -> None:
    """The residual is linear in the conditional velocity, whose mean given x_t is the true one."""
    assert_anchored(changed(PLAIN, times=LATE), path_name, name, moved=0.5)


def test_meanflow_on_the_diagonal_is_flow_matching() -> None:
    """The two branches agree where they meet: N - N_target at s = t, in units of g_s, is v - v*."""
    for path_name, name in (("linear", "linear"), ("trig", "trig"), ("edm", "euler"), ("vp", "bcm")):
        flow_map, batch = random_map(path_name, name), small_batch()
        t = changed(PLAIN, flow_matching_ratio=1.0)(flow_map, batch).t
        matched = changed(PLAIN, flow_matching_ratio=1.0)(flow_map, batch).loss
        limit = PLAIN.off_diagonal(flow_map, batch, t, t).error.square().mean(1)
        close(matched, limit, rtol=1e-6)
        close(gradients(matched.sum(), flow_map), gradients(limit.sum(), flow_map), rtol=1e-6, atol=1e-7)


def test_meanflow_takes_the_share_of_the_diagonal() -> None:
    losses = made(MeanFlow, weight_power=0.0)(random_map(), small_batch())
    on = losses.t == losses.s
    assert int(on.sum()) == 12
    close(losses.loss[on].detach(), losses.logs["anchor"])
    close(losses.loss[~on].detach(), losses.logs["distill"])


@pytest.mark.parametrize("derivative", ["exact", "finite-difference"])
@pytest.mark.parametrize(("path_name", "name"), [("linear", "linear"), ("trig", "trig"), ("edm", "euler")])
def test_meanflows_gradient_flows_through_the_output_alone(
    path_name: str, name: str, derivative: DerivativeKind
) -> None:
    """That of |c (N - sg N) + R|^2 with R of frozen weights, c = 1 or, for a step in the map, -g/(t - s)."""
    flow_map, batch = random_map(path_name, name), small_batch()
    frozen = copy.deepcopy(flow_map).requires_grad_(False)
    losses = changed(PLAIN, kind=derivative)(flow_map, batch)
    t, s, eps = losses.t, losses.s, batch.noise()
    x, v = flow_map.path.interpolate(batch.x0, eps, t), flow_map.path.conditional_velocity(batch.x0, eps, t)
    terms = Derivative(derivative).along(frozen, x, v, t, s, Condition())
    residual = eulerian_residual(frozen, x, v, *terms, t, s)
    in_network = flow_map.preconditioning.target_in_network
    slope = torch.ones_like(t) if in_network else -flow_map.preconditioning.coefficients(t, s)[1] / (t - s)
    error = slope[:, None] * (flow_map.output(x, t, s) - terms[0]) - residual
    close(losses.loss, error.square().mean(1), rtol=1e-8)
    close(gradients(losses.loss.sum(), flow_map), gradients(error.square().mean(1).sum(), flow_map), rtol=1e-7)


def test_meanflows_weight_has_no_gradient() -> None:
    flow_map, batch = random_map(), small_batch()
    plain, weighted = (
        PLAIN(flow_map, batch).loss,
        changed(PLAIN, weight_power=0.5, weight_eps=0.001)(flow_map, batch).loss,
    )
    weight = (plain.detach() + 0.001) ** -0.5
    close(weighted, weight * plain)
    close(gradients(weighted.sum(), flow_map), gradients((weight * plain).sum(), flow_map))


@every_pair
def test_esds_residual_is_zero_at_exact_maps(path_name: str, name: str) -> None:
    path, preconditioning = pair(path_name, name)
    losses = BARE(gaussian().flow_map(path, preconditioning), small_batch(64))
    assert float(losses.logs["distill"].sqrt().max()) < 1e-8
    wrong = BARE(random_map(path_name, name), small_batch(64))
    assert float(wrong.logs["distill"].sqrt().max()) > 1e-3


@pytest.mark.parametrize(("path_name", "name"), [("linear", "linear"), ("edm", "euler")])
def test_esds_anchors_expected_gradient_is_zero_at_the_oracle(path_name: str, name: str) -> None:
    assert_anchored(changed(BARE, times=LATE, flow_matching_ratio=1.0), path_name, name, moved=0.5)


def slope_along(objective: Objective, flow_map: FlowMap, batch: Batch, h: float = 1e-5) -> tuple[float, float]:
    """The loss's derivative along a random direction of all weights: by autograd and by a difference."""
    weights = list(flow_map.parameters())
    way = [noise(*weight.shape, seed=3) for weight in weights]
    found = torch.autograd.grad(objective(flow_map, batch).loss.mean(), weights, allow_unused=True)
    by_autograd = sum(float((g * w).sum()) for g, w in zip(found, way, strict=True) if g is not None)
    values = []
    for size in (h, -2 * h):
        with torch.no_grad():
            for weight, one in zip(weights, way, strict=True):
                weight.add_(size * one)
        values.append(float(objective(flow_map, batch).loss.mean().detach()))
    return by_autograd, (values[0] - values[1]) / (2 * h)


@pytest.mark.parametrize("derivative", ["exact", "finite-difference"])
@pytest.mark.parametrize(("path_name", "name"), [("linear", "linear"), ("trig", "trig"), ("edm", "euler")])
def test_esds_gradient_is_that_of_the_whole_loss(path_name: str, name: str, derivative: DerivativeKind) -> None:
    """Nothing is detached: reverse mode over the JVP agrees with differences of the loss itself."""
    objective = changed(BARE, kind=derivative, flow_matching_ratio=0.25)
    got, expected = slope_along(objective, random_map(path_name, name), small_batch())
    assert got == pytest.approx(expected, rel=1e-5)


def test_esds_finite_difference_agrees_with_the_exact_derivative() -> None:
    flow_map, batch = random_map(), small_batch()
    kinds: list[DerivativeKind] = ["exact", "finite-difference"]
    exact, finite = (changed(BARE, kind=kind)(flow_map, batch).loss for kind in kinds)
    close(exact, finite, rtol=1e-3, atol=1e-4)
    exact, finite = (gradients(loss.sum(), flow_map) for loss in (exact, finite))
    assert float((exact - finite).norm()) < 1e-2 * float(exact.norm())


NETWORKS: dict[str, NetworkConfig] = {
    "mlp": MLPConfig(width=16, depth=1, embedding_width=8, max_frequency=4.0),
    "unet": UNetConfig(8, (1, 2), 1, (4,), head_width=4, embedding_width=8, max_frequency=4.0),
    "dit": DiTConfig(patch=2, width=16, depth=1, heads=2, max_frequency=4.0),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("objective", [BARE, made(LSD, flow_matching_ratio=0.0, label_dropout=0.0)], ids=["esd", "lsd"])
def test_reverse_mode_over_forward_mode_passes_every_layer(objective: Objective, network: str) -> None:
    """ESD by differences of the loss; LSD, part of which is frozen, by the finite difference's gradient."""
    built = NETWORKS[network].build((1, 8, 8), 0, False).double()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    flow_map = FlowMap(Linear(), LinearPreconditioning(), built)
    batch = Batch(noise(3, 1, 8, 8), None, draws(3))
    if isinstance(objective, ESD):
        got, expected = slope_along(objective, flow_map, batch)
        assert got == pytest.approx(expected, rel=1e-4)
        return
    exact, finite = (
        gradients(changed(objective, kind=kind)(flow_map, batch).loss.sum(), flow_map)  # type: ignore[call-arg]
        for kind in ("exact", "finite-difference")
    )
    assert float(exact.norm()) > 1e-3
    assert float((exact - finite).norm()) < 1e-2 * float(exact.norm())


@pytest.mark.parametrize("make", [MeanFlow, ESD, LSD])
@pytest.mark.parametrize(
    "wrong", [{"flow_matching_ratio": 1.5}, {"step": 0.0}, {"weight_eps": 0.0}, {"label_dropout": -0.1}]
)
def test_settings_out_of_range_are_refused(make: type[MeanFlow], wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        made(make, **wrong)


def test_times_are_of_the_paths_clock_in_float32_too() -> None:
    flow_map = FlowMap(Linear(), LinearPreconditioning(), random_network().float())
    batch = Batch(noise(16, 3).float(), None, draws(16))
    for objective in (MeanFlow(), ESD(), LSD()):
        losses = objective(flow_map, batch)
        assert losses.loss.dtype == torch.float32
        assert losses.t.dtype == F64
        assert bool(losses.loss.isfinite().all())
