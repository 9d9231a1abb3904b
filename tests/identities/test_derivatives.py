"""The total derivative dN/dt: exact against closed form, finite differences of order two everywhere in the range."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep.flow.derivatives import (
    MIN_STEP,
    Derivative,
    finite_derivative,
    finite_difference_nodes,
)
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import EDM, VP, Linear, Path, Trig
from fewstep.flow.preconditioning.jumps import LinearPreconditioning
from fewstep.flow.preconditioning.network_scaling import EDMScaling
from fewstep.networks.condition import Condition
from fewstep.utils.forward_ad import jvp
from tests.support.cases import F64, PAIRS, SD, clock, close, gaussian, noise, pair, random_network, slope

STEPS = [0.01, 0.005, 0.0025, 0.00125]
NETWORK = random_network()
Function = Callable[[Tensor, Tensor], Tensor]


def wave(x: Tensor, t: Tensor) -> Tensor:
    """sin(3 x t + t^2): total derivative cos(.) (3 v t + 3 x + 2 t)."""
    return torch.sin(3 * x * t[:, None] + t[:, None] ** 2)


def network(x: Tensor, t: Tensor) -> Tensor:
    return NETWORK(x, t, torch.zeros_like(t))


def exact_derivative(fn: Function, x: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return jvp(fn, (x, t), (v, torch.ones_like(t)), attached=False)


def difference(fn: Function, x: Tensor, t: Tensor, v: Tensor, nodes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return finite_derivative(lambda x, t, rows: fn(x, t), x, t, v, nodes)


def times(place: str, step: float) -> tuple[Tensor, Tensor]:
    """(t, s) on [0, 1] such that t + h > 1, t - h < s, or neither, for each of three samples."""
    s = torch.tensor([0.1, 0.3, 0.5], dtype=F64)
    offset = torch.tensor([0.0, 0.3, 0.9], dtype=F64) * step
    return {"upper": 1 - offset, "lower": s + offset, "inside": s + 0.25}[place], s


def test_the_exact_derivative_is_the_closed_form() -> None:
    x, v, t = noise(4, 3), noise(4, 3, seed=1), torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=F64)
    output, derivative = exact_derivative(wave, x, t, v)
    phase, time = 3 * x * t[:, None] + t[:, None] ** 2, t[:, None]
    close(output, torch.sin(phase))
    close(derivative, torch.cos(phase) * (3 * v * time + 3 * x + 2 * time))


@pytest.mark.parametrize("place", ["inside", "upper", "lower"])
@pytest.mark.parametrize("fn", [wave, network], ids=["wave", "network"])
def test_finite_differences_are_of_order_two(place: str, fn: type) -> None:
    x, v = noise(3, 3), noise(3, 3, seed=1)
    errors = []
    for step in STEPS:
        t, s = times(place, step)
        nodes = finite_difference_nodes(t, s, 1.0, step)
        exact = exact_derivative(fn, x, t, v)
        output, derivative = difference(fn, x, t, v, nodes)
        close(output, exact[0])
        errors.append(float((derivative - exact[1]).abs().max()))
    assert slope(STEPS, errors) == pytest.approx(2, abs=0.25)
    assert errors[-1] < 0.01


@given(low=st.floats(0, 0.99), fraction=st.floats(0, 1), step=st.floats(1e-3, 0.2))
def test_nodes_stay_within_the_range(low: float, fraction: float, step: float) -> None:
    s = torch.tensor([low], dtype=F64)
    t = s + fraction * (1 - s)
    nodes = torch.cat(finite_difference_nodes(t, s, 1.0, step))
    assert bool((nodes != 0).all())
    assert float(nodes[0]) != float(nodes[1])
    assert float(nodes.abs().max()) <= 2 * step + 1e-15
    if 1 - low >= 3 * MIN_STEP:
        assert bool((t + nodes >= s - 1e-14).all())
        assert bool((t + nodes <= 1 + 1e-14).all())


@given(gap=st.floats(0, 3 * MIN_STEP), fraction=st.floats(0, 1))
def test_in_a_tiny_interval_the_step_is_the_smallest_one(gap: float, fraction: float) -> None:
    s = torch.tensor([1 - gap], dtype=F64)
    t = s + fraction * (1 - s)
    nodes = torch.cat(finite_difference_nodes(t, s, 1.0, 0.005))
    assert float(nodes.abs().min()) == pytest.approx(MIN_STEP)
    assert float(nodes.abs().max()) <= 2 * MIN_STEP + 1e-15


@pytest.mark.parametrize("place", ["inside", "upper", "lower"])
def test_parabolas_are_differentiated_exactly(place: str) -> None:
    """Whatever the step: three nodes see no error in a quadratic."""
    t, s = times(place, 0.2)
    x, v = torch.zeros(3, 1, dtype=F64), torch.ones(3, 1, dtype=F64)

    def parabola(x: Tensor, t: Tensor) -> Tensor:
        return 2 * t[:, None] ** 2 - 3 * x * t[:, None] + x**2

    derivative = difference(parabola, x, t, v, finite_difference_nodes(t, s, 1.0, 0.2))[1]
    close(derivative, t[:, None])


def test_the_output_keeps_its_graph_and_the_derivative_has_none() -> None:
    net, x, v, t = random_network(), noise(3, 3), noise(3, 3, seed=1), torch.tensor([0.2, 0.5, 0.9], dtype=F64)

    def fn(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t, torch.zeros_like(t))

    nodes = finite_difference_nodes(t, torch.zeros_like(t), 1.0, 0.005)
    plain = torch.autograd.grad(fn(x, t).square().sum(), list(net.parameters()))
    for output, derivative in (exact_derivative(fn, x, t, v), difference(fn, x, t, v, nodes)):
        assert not derivative.requires_grad
        grads = torch.autograd.grad(output.square().sum(), list(net.parameters()))
        for actual, expected in zip(grads, plain, strict=True):
            close(actual, expected)


def log_wave(x: Tensor, t: Tensor) -> Tensor:
    """x sin(2 log t): smooth in log t, as everything on the EDM path is."""
    return x * torch.sin(2 * torch.log(t))[:, None]


def test_step_follows_the_clock_of_the_edm_path() -> None:
    """At t = 0.004, below the step of 0.005 itself, the derivative is still accurate."""
    path = EDM()
    t = torch.tensor([0.004, 0.5, 60.0], dtype=F64)
    x, v = torch.ones(3, 1, dtype=F64), torch.zeros(3, 1, dtype=F64)
    nodes = finite_difference_nodes(t, torch.full_like(t, path.t_min), path.t_max, 0.005, path.time_scale(t))
    exact = exact_derivative(log_wave, x, t, v)[1]
    close(difference(log_wave, x, t, v, nodes)[1], exact, rtol=1e-3)


@pytest.mark.parametrize("path", [Linear(), Trig(0.5), VP(), EDM()], ids=lambda path: type(path).__name__)
def test_step_follows_a_logarithmic_network_clock(path: Path) -> None:
    """With c_noise = log tau / 4 a network is smooth in log tau: near data the step must shrink with it."""
    scaling = EDMScaling(0.5, path)
    flow_map = FlowMap(path, LinearPreconditioning(), random_network(), scaling)
    t = path.time_from_tau(torch.tensor([0.005, 0.02, 0.5], dtype=F64))
    s = torch.full_like(t, path.t_min)
    x, v = noise(3, 3, seed=0), noise(3, 3, seed=1)
    found = Derivative("finite-difference").along(flow_map, x, v, t, s, Condition())[1]
    exact = Derivative().along(flow_map, x, v, t, s, Condition())[1]
    assert float((found - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.parametrize("path", [VP(), VP(0.3, 0.3, 1e-5), EDM()], ids=str)
def test_the_unit_of_steps_is_one_unit_of_log_tau(path: Path) -> None:
    t = path.time_from_unit(torch.tensor([0.0, 1e-3, 0.3, 1.0], dtype=F64))
    tau, d_tau = jvp(path.tau, (t,), (torch.ones_like(t),))
    close(path.time_scale(t), tau / d_tau)


def derivative_errors(path_name: str, name: str, unit: float, share: float, steps: list[float]) -> list[list[float]]:
    """Errors of the finite dN/dt, and of dN/ds, at the exact Gaussian map: one for each step.

    At the unit time `unit` with s at that share of it; relative to the larger of the derivative and N.
    """
    path, preconditioning = pair(path_name, name)
    s, t = (time.repeat(4) for time in clock(path, share * unit, unit))
    x, data = path.interpolate(SD * noise(4, 3), noise(4, 3, seed=1), t), gaussian()
    flow_map, v = data.flow_map(path, preconditioning), data.velocity(path, x, t)

    def both(derivative: Derivative) -> list[tuple[Tensor, Tensor]]:
        return [
            derivative.along(flow_map, x, v, t, s, Condition()),
            derivative.at_end(flow_map, x, t, s, Condition()),
        ]

    found = [both(Derivative("finite-difference", step)) for step in steps]
    return [
        [float((each[i][1] - exact).norm() / torch.maximum(exact.norm(), output.norm())) for each in found]
        for i, (output, exact) in enumerate(both(Derivative()))
    ]


@pytest.mark.parametrize("unit", [0.001, 0.01, 0.5, 0.999])
@pytest.mark.parametrize(("path_name", "name"), PAIRS)
def test_the_default_step_is_small_at_both_ends_of_every_path(path_name: str, name: str, unit: float) -> None:
    """On VP near data sigma grows as sqrt(t): a step of 0.005 at t = 0.002 would leave an error of a tenth."""
    step = Derivative().step
    for errors in derivative_errors(path_name, name, unit, 0.5, [step]):
        assert errors[0] < (1e-5 if path_name == "vp" else 2e-4)


@pytest.mark.parametrize(
    ("path_name", "name", "unit"),
    # At both ends of EDM the error lies below the rounding of the oracle's N = (X - f x)/g.
    [(*each, unit) for each in PAIRS for unit in (0.001, 0.01, 0.5, 0.9999) if each[0] != "edm" or unit == 0.5],
)
def test_differences_along_the_flow_are_of_order_two_at_both_ends(path_name: str, name: str, unit: float) -> None:
    """Or of a higher one, where the leading term happens to vanish."""
    steps = [0.02, 0.01, 0.005]
    assert slope(steps, derivative_errors(path_name, name, unit, 0.9, steps)[0]) > 1.75


def test_a_difference_under_bf16_is_taken_in_full_precision() -> None:
    flow_map = FlowMap(Linear(), LinearPreconditioning(), random_network().float())
    t, s = torch.tensor([0.3, 0.5, 0.9], dtype=F64), torch.tensor([0.1, 0.2, 0.899], dtype=F64)
    x, v = noise(3, 3, seed=0).float(), noise(3, 3, seed=1).float()
    exact = Derivative().along(flow_map, x, v, t, s, Condition())[1]
    with torch.autocast("cpu", torch.bfloat16):
        output, found = Derivative("finite-difference").along(flow_map, x, v, t, s, Condition())
    assert output.requires_grad
    assert float((found - exact).norm() / exact.norm()) < 2e-2
