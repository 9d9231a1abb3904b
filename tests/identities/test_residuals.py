"""The Eulerian identity: zero residual at exact flow maps, the targets of the papers, and where gradients flow."""

import math

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fewstep.flow.closed_form import GaussianData, GaussianOutput
from fewstep.flow.derivatives import Derivative
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import Linear, Path, Trig
from fewstep.flow.preconditioning.jumps import LinearPreconditioning, TrigPreconditioning
from fewstep.networks.condition import Condition
from fewstep.objectives import ESD, ISD, eulerian_error, eulerian_residual
from tests.support.cases import (
    PAIRS,
    SD,
    Callback,
    clock,
    close,
    gaussian,
    means,
    noise,
    pair,
    random_network,
    scalings,
    sds,
    slope,
    unit_triples,
)

every_pair = pytest.mark.parametrize(("path_name", "name"), PAIRS)


def points(path: Path, *unit_times: float, count: int = 4) -> tuple[Tensor, ...]:
    """(x_t, times ...), the last of the times being t."""
    times = [time.repeat(count) for time in clock(path, *unit_times)]
    return path.interpolate(SD * noise(count, 3), noise(count, 3, seed=1), times[-1]), *times


@every_pair
@settings(max_examples=12)
@given(times=unit_triples, mean=means, sd=sds)
def test_the_residual_is_zero_at_exact_maps(
    path_name: str, name: str, times: list[float], mean: float, sd: float
) -> None:
    """And so the target equals N, in whichever of the two forms the preconditioning takes."""
    path, preconditioning = pair(path_name, name)
    data, (x, s, t) = gaussian(mean, sd), points(path, times[0], times[2])
    flow_map, v = data.flow_map(path, preconditioning), data.velocity(path, x, t)
    output, d_output = Derivative().along(flow_map, x, v, t, s, Condition())
    f, g, f_t, g_t = (c[:, None] for c in preconditioning.derivatives(t, s))
    scale = ((f_t * x).abs() + (f * v).abs() + (g_t * output).abs() + (g * d_output).abs()).clamp(min=1)
    residual = eulerian_residual(flow_map, x, v, output, d_output, t, s)
    assert float((residual / scale).abs().max()) < 1e-8
    error = eulerian_error(flow_map, x, v, output, d_output, t, s).error
    assert float((error / scale).abs().max()) < 1e-8


@every_pair
def test_the_residual_is_not_zero_at_the_map_of_other_data(path_name: str, name: str) -> None:
    path, preconditioning = pair(path_name, name)
    x, s, t = points(path, 0.2, 0.7)
    flow_map = gaussian(0.4, 0.3).flow_map(path, preconditioning)
    v = gaussian(0.9, 0.8).velocity(path, x, t)
    output, d_output = Derivative().along(flow_map, x, v, t, s, Condition())
    assert float(eulerian_residual(flow_map, x, v, output, d_output, t, s).abs().max()) > 1e-3


@every_pair
def test_with_finite_differences_the_residual_is_of_order_two(path_name: str, name: str) -> None:
    path, preconditioning = pair(path_name, name)
    data, (x, s, t) = gaussian(), points(path, 0.3, 0.7)
    flow_map, v, steps, errors = data.flow_map(path, preconditioning), data.velocity(path, x, t), [], []
    for step in (0.04, 0.02, 0.01):
        steps.append(step * float(t[0] - s[0]))
        derivative = Derivative("finite-difference", steps[-1])
        output, d_output = derivative.along(flow_map, x, v, t, s, Condition())
        errors.append(float(eulerian_residual(flow_map, x, v, output, d_output, t, s).abs().max()))
    assert slope(steps, errors) == pytest.approx(2, abs=0.2)


def unit_clock_map(data: GaussianData, path: Trig) -> tuple[FlowMap, Callback]:
    """The exact trig map with a network clocked in t/(pi/2), and that network."""
    exact = GaussianOutput(data, path, TrigPreconditioning())
    in_units = Callback(lambda x, u, w, cond: exact(x, u * math.pi / 2, w * math.pi / 2))
    network = Callback(lambda x, t, s, cond: in_units(x, t * 2 / math.pi, s * 2 / math.pi))
    return FlowMap(path, TrigPreconditioning(), network), in_units


@pytest.mark.parametrize("unit_times", [(0.1, 0.9), (0.3, 0.6), (0.05, 0.4)])
def test_a_clock_in_units_of_half_pi_needs_its_factor(unit_times: tuple[float, float]) -> None:
    """A tangent of 1 in place of 2/pi leaves a residual far from zero: this test would catch the factor."""
    path, data = Trig(SD), gaussian()
    x, s, t = points(path, *unit_times)
    flow_map, in_units = unit_clock_map(data, path)
    v = data.velocity(path, x, t)
    output, right = Derivative().along(flow_map, x, v, t, s, Condition())
    assert float(eulerian_residual(flow_map, x, v, output, right, t, s).abs().max()) < 1e-8
    u, w = t * 2 / math.pi, s * 2 / math.pi
    _, wrong = torch.func.jvp(lambda x, u: in_units(x, u, w), (x, u), (v, torch.ones_like(u)))
    assert float(eulerian_residual(flow_map, x, v, output, wrong, t, s).abs().max()) > 1e-3


def isd_terms(flow_map: FlowMap, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    v = flow_map.velocity(x, t).detach()
    return v, *Derivative().along(flow_map, x, v, t, s, Condition())


def test_the_linear_target_is_the_published_one() -> None:
    """N_target = v - (t - s) dN/dt."""
    path = Linear()
    flow_map = FlowMap(path, LinearPreconditioning(), random_network())
    x, s, t = points(path, 0.2, 0.7)
    v, output, d_output = isd_terms(flow_map, x, t, s)
    target = v - (t - s)[:, None] * d_output
    close(eulerian_error(flow_map, x, v, output, d_output, t, s).error, output - target)


def test_the_trig_target_is_the_published_one() -> None:
    """N_target = N + cos d (v - N) - sin d (x + dN/dt), d = t - s."""
    path = Trig(SD)
    flow_map = FlowMap(path, TrigPreconditioning(), random_network(), scalings(path)["unit"])
    x, s, t = points(path, 0.2, 0.7)
    v, output, d_output = isd_terms(flow_map, x, t, s)
    cos, sin = torch.cos(t - s)[:, None], torch.sin(t - s)[:, None]
    target = output + cos * (v - output) - sin * (x + d_output)
    close(eulerian_error(flow_map, x, v, output, d_output, t, s).error, output - target)


def test_the_euler_target_is_a_step_in_the_map() -> None:
    """X_target = X - (t - s) R; on EDM it reads N_target = N - (t - s) dN/dt - (s/t) (N - D): CM's at s = 0."""
    path, preconditioning = pair("edm", "euler")
    flow_map = FlowMap(path, preconditioning, random_network(), scalings(path)["edm"])
    x, s, t = points(path, 0.2, 0.7)
    v, output, d_output = isd_terms(flow_map, x, t, s)
    gap, ratio = (t - s)[:, None], (s / t)[:, None]
    target = output - gap * d_output - ratio * (output - flow_map.denoise(x, t))
    difference = flow_map.apply_jump(x, output, t, s) - flow_map.apply_jump(x, target, t, s)
    close(eulerian_error(flow_map, x, v, output, d_output, t, s).error, difference / gap, rtol=1e-8)


@every_pair
def test_distillation_has_gradient_through_the_output_alone(path_name: str, name: str) -> None:
    """Autograd of the distillation loss against 2/dim sum of R dN/dtheta g/(t - s) (-1 in place of the slope)."""
    path, preconditioning = pair(path_name, name)
    network = random_network()
    flow_map = FlowMap(path, preconditioning, network, scalings(path)["edm"])
    weights = list(network.parameters())
    x, s, t = points(path, 0.2, 0.7)
    v = flow_map.velocity(x, t).detach()
    loss = ISD().off_diagonal(flow_map, x, v, t, s, Condition()).error.square().mean(1)
    actual = torch.autograd.grad(loss.sum(), weights)

    d_output = torch.func.jvp(lambda x, t: flow_map.output(x, t, s), (x, t), (v, torch.ones_like(t)))[1].detach()
    output = flow_map.output(x, t, s)
    residual = eulerian_residual(flow_map, x, v, output.detach(), d_output, t, s)
    g = preconditioning.coefficients(t, s)[1]
    factor = -torch.ones_like(t) if preconditioning.target_in_network else g / (t - s)
    expected = torch.autograd.grad((2 / 3 * residual * factor[:, None] * output).sum(), weights)
    close(loss, residual.square().mean(1))
    for one, other in zip(actual, expected, strict=True):
        close(one, other, rtol=1e-8, atol=1e-8 * float(1 + other.abs().max()))


@every_pair
def test_logged_sizes_are_those_of_the_target(path_name: str, name: str) -> None:
    """N_target = N + R, or (X_target - x)/(t - s) with X_target = X - (t - s) R, whatever the objective's gradient."""
    path, preconditioning = pair(path_name, name)
    flow_map = FlowMap(path, preconditioning, random_network(), scalings(path)["edm"])
    x, s, t = points(path, 0.2, 0.7)
    v = flow_map.velocity(x, t).detach()
    output, d_output = (each.detach() for each in Derivative().along(flow_map, x, v, t, s, Condition()))
    residual = eulerian_residual(flow_map, x, v, output, d_output, t, s)
    target = output + residual
    close(ESD().off_diagonal(flow_map, x, v, t, s, Condition()).sizes()["target_rms"], target.square().mean(1).sqrt())
    if not preconditioning.target_in_network:
        gap = (t - s)[:, None]
        target = (flow_map.jump(x, t, s) - gap * residual - x) / gap
    sizes = ISD().off_diagonal(flow_map, x, v, t, s, Condition()).sizes()
    close(sizes["target_rms"], target.detach().square().mean(1).sqrt())
    close(sizes["derivative_rms"], d_output.square().mean(1).sqrt())
