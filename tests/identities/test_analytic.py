"""Analytic preconditioning: its limits, its derivatives, exactness on Gaussian data, and jumps about an origin."""

import copy
import functools
import json
import math
from pathlib import Path as FilePath
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.flow.derivatives import Derivative
from fewstep.flow.flow_map import FlowMap, FlowMapConfig
from fewstep.flow.paths import EDM, Path
from fewstep.flow.preconditioning.analytic import AnalyticPreconditioning
from fewstep.flow.preconditioning.base import origin_weight
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.flow.preconditioning.network_scaling import EDMScaling
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.networks.condition import Condition
from fewstep.networks.mlp import MLPConfig
from fewstep.objectives import eulerian_error, eulerian_residual
from fewstep.sampling.pipeline import Pipeline, load_pipeline
from fewstep.utils.errors import ConfigError
from fewstep.utils.serialization import from_json, to_json
from fewstep.utils.tensors import expand
from tests.support.cases import (
    F64,
    PATHS,
    SD,
    Callback,
    clock,
    close,
    gaussian,
    means,
    noise,
    random_network,
    sds,
    unit_triples,
    units,
)
from tests.support.statistics import constant, copy_with_mean, exact_statistics, grid, wavy

Form = Literal["backward", "forward"]

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
origins = st.sampled_from((-1.2, 0.0, 0.3, 1.5))
every_form = pytest.mark.parametrize("form", ["backward", "forward"])


@functools.cache
def analytic(form: Form, path: Path = EDM(), origin: float = 0.3) -> AnalyticPreconditioning:
    """Of the wavy statistics, whose tables are made once."""
    return AnalyticPreconditioning(wavy(origin), form, path)


@every_path
@every_form
@settings(max_examples=10)
@given(a=st.floats(0, 1), b=st.floats(0, 1))
def test_without_statistics_it_is_euler(path: Path, form: Form, a: float, b: float) -> None:
    """On the whole clock, its ends included, where tau is 0 or infinite."""
    s, t = clock(path, min(a, b), max(a, b))
    f, g = AnalyticPreconditioning(constant(0.0, 0.0), form, path).coefficients(t, s)
    f_euler, g_euler = EulerPreconditioning(path).coefficients(t, s)
    close(f, f_euler, rtol=1e-12, atol=1e-12)
    close(g, g_euler, rtol=1e-12, atol=1e-12)


@every_path
@every_form
@settings(max_examples=10)
@given(u=st.floats(0, 1))
def test_a_jump_of_no_length_is_the_identity_to_the_last_bit(path: Path, form: Form, u: float) -> None:
    (t,) = clock(path, u)
    f, g = analytic(form, path).coefficients(t, t)
    assert (float(f), float(g)) == (1.0, 0.0)


@every_path
@every_form
@settings(max_examples=10)
@given(u=units)
def test_the_diagonal_is_eulers(path: Path, form: Form, u: float) -> None:
    preconditioning = analytic(form, path)
    (t,) = clock(path, u)
    _, (f_s, g_s) = torch.func.jvp(lambda s: preconditioning.coefficients(t, s), (t,), (torch.ones_like(t),))
    d = preconditioning.derivatives(t, t)
    for found, opposite, expected in zip((f_s, g_s), (d.f_t, d.g_t), preconditioning.diagonal(t), strict=True):
        close(found, expected, rtol=1e-8, atol=1e-8)
        close(opposite, -expected, rtol=1e-8, atol=1e-8)


@every_path
@every_form
@settings(max_examples=10)
@given(times=unit_triples)
def test_derivatives_agree_with_finite_differences(path: Path, form: Form, times: list[float]) -> None:
    preconditioning = analytic(form, path)
    s, t = clock(path, times[0], times[2])
    h = 1e-5 * t
    d = preconditioning.derivatives(t, s)
    above, below = (preconditioning.coefficients(t + sign * h, s) for sign in (1, -1))
    for slope, up, down in zip(d[2:], above, below, strict=True):
        close((up - down) / (2 * h), slope, rtol=1e-5, atol=1e-5 * float(1 / t) * float(1 + d.g.abs()))


@every_path
@every_form
def test_gradients_are_finite_at_both_ends(path: Path, form: Form) -> None:
    preconditioning = analytic(form, path)
    t = torch.tensor([path.t_max, path.t_max, path.t_min], dtype=F64, requires_grad=True)
    s = torch.tensor([path.t_min, path.t_max, path.t_min], dtype=F64, requires_grad=True)
    f, g = preconditioning.coefficients(t, s)
    gradients = torch.autograd.grad(f.sum() + g.sum(), (t, s))
    d = preconditioning.derivatives(t.detach(), s.detach())
    assert all(bool(value.isfinite().all()) for value in (f, g, *gradients, *d))
    close(d.f_t + d.g_t, gradients[0])


@given(l=st.floats(0, 0.95), s=st.floats(-2, 1), log_gap=st.floats(-12, 1), low=st.floats(-4, -4 + 0.5))
def test_constant_statistics_have_closed_coefficients(l: float, s: float, log_gap: float, low: float) -> None:  # noqa: E741
    """J = (1 - e^{-k D})/k with k = 1 - l + s and D = lambda_s - lambda_t, for long jumps and within one cell."""
    gap = 10**log_gap
    t, to = (torch.exp(-torch.tensor([lam], dtype=F64)) for lam in (low, low + gap))
    gap, k = float(torch.log(t / to)), 1 - l + s
    flat = abs(k) < 1e-9
    j = gap if flat else -math.expm1(-k * gap) / k
    f, g = AnalyticPreconditioning(constant(l, s)).coefficients(t, to)
    assert float(g) == pytest.approx(j / (1 + l * j), rel=1e-7 if gap < 1e-6 else 1e-10)
    assert float(f) == pytest.approx(math.exp(-(1 - l) * gap) / (1 + l * j), rel=1e-10)
    j = gap * math.exp(-(1 - l) * gap) if flat else math.exp(s * gap) * j
    f, g = AnalyticPreconditioning(constant(l, s), "forward").coefficients(t, to)
    assert float(g) == pytest.approx(j, rel=1e-7 if gap < 1e-6 else 1e-10)
    assert float(f) == pytest.approx(math.exp(-(1 - l) * gap) - l * j, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("fall", "lost"), [(15.0, 1e-10), (30.0, 1e-5), (70.0, 0.99)])
def test_no_digits_are_lost_where_the_integrand_falls_by_many_powers_of_e(fall: float, lost: float) -> None:
    """A + S falls at an even rate: short jumps near the data end against (e^{rate D} - 1)/rate.

    The difference of two values of one cumulative integral, whose peak is at the other end, loses what `lost` says.
    """
    lam = grid(60)
    rate = fall / float(lam[-1] - lam[0])
    preconditioning = AnalyticPreconditioning(constant(0.0, -1 - rate))
    t, s = torch.exp(-lam[40:57]), torch.exp(-lam[43:60])
    expected = torch.expm1(rate * (lam[43:60] - lam[40:57])) / rate
    close(preconditioning.coefficients(t, s)[1], expected, rtol=1e-11, atol=0)
    cumulative = -torch.expm1(-rate * (lam - lam[0])) / rate
    difference = (cumulative[43:60] - cumulative[40:57]) * torch.exp(rate * (lam[43:60] - lam[0]))
    assert float((difference / expected - 1).abs().max()) > lost


@every_form
def test_no_digits_are_lost_in_a_valley_between_two_peaks(form: Form) -> None:
    """A + S = lambda + 2 lambda^2, 50 below its ends in the middle, against a fine quadrature: the integral from either
    end is all peak there.
    """
    lam = torch.linspace(-5, 5, 81, dtype=F64)
    zero = torch.zeros_like(lam)
    valley = TrajectoryStatistics.closed_form(lam, zero, 4 * lam, torch.zeros(3, dtype=F64), SD)
    ends = torch.tensor([[-1.03, 0.81], [-0.5, 0.5], [-5.0, 0.0], [0.0, 5.0], [-5.0, 5.0], [0.25, 0.3]], dtype=F64)
    for t, s in ends.tolist():
        points = torch.linspace(t, s, 200_001, dtype=F64)
        frozen = t if form == "forward" else s
        expected = torch.trapezoid(torch.exp(points - s + 2 * (points**2 - frozen**2)), points)
        at_t, at_s = torch.exp(-torch.tensor([[t], [s]], dtype=F64))
        close(AnalyticPreconditioning(valley, form).coefficients(at_t, at_s)[1], expected[None], rtol=1e-7, atol=0)


def composed(jumps: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Jumps with the same N, one after another."""
    f, g = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    for step_f, step_g in jumps:
        f, g = step_f * f, step_f * g + step_g
    return f, g


@every_form
def test_beyond_the_table_it_goes_on_with_euler_steps(form: Form) -> None:
    path = EDM(1e-4, 500.0)
    whole, euler = analytic(form, path), EulerPreconditioning(path)
    times = [torch.tensor([time], dtype=F64) for time in (300.0, 80.0, 0.002, 0.0005)]
    pieces = [p.coefficients(*times[i : i + 2]) for i, p in enumerate((euler, whole, euler))]
    for actual, expected in zip(whole.coefficients(times[0], times[3]), composed(pieces), strict=True):
        close(actual, expected)


@every_path
@every_form
@settings(max_examples=10)
@given(times=unit_triples)
def test_coefficients_travel_between_paths(path: Path, form: Form, times: list[float]) -> None:
    """f_path = (alpha_s/alpha_t) f(tau_t, tau_s), g_path = alpha_s g(tau_t, tau_s): math.md §3.5."""
    s, t = clock(path, times[0], times[2])
    f, g = analytic(form, path).coefficients(t, s)
    f_edm, g_edm = analytic(form).coefficients(path.tau(t), path.tau(s))
    alpha_t, alpha_s = path.values(t).alpha, path.values(s).alpha
    close(f, alpha_s / alpha_t * f_edm, rtol=1e-8)
    close(g, alpha_s * g_edm, rtol=1e-8)


def test_backward_jumps_to_data_are_the_denoiser() -> None:
    """f -> 0 and g -> 1 at s = sigma_min: single-step training is as without statistics."""
    statistics = exact_statistics(0.5, points=200)
    t, s = torch.tensor([80.0, 5.0, 0.5], dtype=F64), torch.full((3,), 0.002, dtype=F64)
    f, g = AnalyticPreconditioning(statistics).coefficients(t, s)
    close(f, torch.zeros_like(f), atol=1e-4)
    close(g, torch.ones_like(g), rtol=2e-3)


@every_form
@pytest.mark.parametrize(
    ("path_name", "mean", "origin"), [("edm", 0.0, 0.0), ("edm", 0.4, 0.0), *((name, 0.4, 0.4) for name in PATHS)]
)
def test_on_gaussian_data_every_jump_is_exact(path_name: str, form: Form, mean: float, origin: float) -> None:
    """math.md §3.4: h is constant, whether the mean is in the residual or, on every path, taken out as the origin."""
    path, data = PATHS[path_name], gaussian(mean, SD)
    preconditioning = AnalyticPreconditioning(exact_statistics(SD, origin), form, path)
    tau = torch.tensor([[70.0, 2.0], [5.0, 0.02], [0.5, 0.4]], dtype=F64).repeat_interleave(2, 0)
    t, s = (path.time_from_tau(each) for each in tau.T)
    x = path.interpolate(mean + SD * noise(6, 2), noise(6, 2, seed=1), t)
    landed = data.jump(path, x, t, s)
    f, g = preconditioning.coefficients(t, s)
    centre = expand(origin_weight(path, f, g, t, s), x) * origin
    frozen = data.denoise(path, *((x, t) if form == "forward" else (landed, s)))
    error = (landed - expand(f, x) * x - centre) / expand(g, x) - frozen
    assert float(error.abs().max()) < 1e-8


@every_form
@pytest.mark.parametrize(("low", "high"), [(0.3, 0.31), (0.02, 0.5), (0.4, 3.0)])
def test_a_jump_toward_noise_is_exact_too(form: Form, low: float, high: float) -> None:
    data, preconditioning = gaussian(0.0, SD), AnalyticPreconditioning(exact_statistics(SD), form)
    x, t, s = noise(4, 2), torch.full((4,), low, dtype=F64), torch.full((4,), high, dtype=F64)
    landed = data.jump(EDM(), x, t, s)
    f, g = preconditioning.coefficients(t, s)
    frozen = data.denoise(EDM(), x, t) if form == "forward" else data.denoise(EDM(), landed, s)
    close(f[:, None] * x + g[:, None] * frozen, landed, rtol=1e-6, atol=1e-6)


def test_whole_numbers_are_times_too() -> None:
    preconditioning = AnalyticPreconditioning(wavy())
    found = preconditioning.coefficients(torch.tensor([80, 2]), torch.tensor([1, 1]))
    wanted = preconditioning.coefficients(torch.tensor([80.0, 2.0]), torch.tensor([1.0, 1.0]))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype == torch.float64
        torch.testing.assert_close(one, other)


def test_only_statistics_are_taken() -> None:
    with pytest.raises(ConfigError, match=r"takes TrajectoryStatistics, not str: TrajectoryStatistics.load"):
        AnalyticPreconditioning("statistics.json")  # type: ignore[arg-type]


@every_path
@every_form
@settings(max_examples=8)
@given(times=unit_triples, mean=means, sd=sds, origin=origins)
def test_exact_maps_compose_about_any_origin(
    path: Path, form: Form, times: list[float], mean: float, sd: float, origin: float
) -> None:
    data = gaussian(mean, sd)
    flow_map = data.flow_map(path, analytic(form, path, origin))
    s, middle, t = (time.repeat(3) for time in clock(path, *times))
    x = path.interpolate(noise(3, 2), noise(3, 2, seed=1), t)
    size = 1e-8 * float(1 + x.abs().max())
    direct = data.jump(path, x, t, s)
    close(flow_map.jump(x, t, s), direct, atol=size)
    close(flow_map.jump(flow_map.jump(x, t, middle), middle, s), direct, atol=size)
    close(flow_map.velocity(x, t), data.velocity(path, x, t), rtol=1e-8, atol=1e-8)


@every_path
@every_form
@settings(max_examples=8)
@given(times=unit_triples, mean=means, sd=sds, origin=origins)
def test_the_residual_is_zero_at_exact_maps(
    path: Path, form: Form, times: list[float], mean: float, sd: float, origin: float
) -> None:
    data = gaussian(mean, sd)
    preconditioning = analytic(form, path, origin)
    s, t = (time.repeat(4) for time in clock(path, times[0], times[2]))
    x = path.interpolate(SD * noise(4, 3), noise(4, 3, seed=1), t)
    flow_map, v = data.flow_map(path, preconditioning), data.velocity(path, x, t)
    output, d_output = Derivative().along(flow_map, x, v, t, s, Condition())
    f, g, f_t, g_t = (c[:, None] for c in preconditioning.derivatives(t, s))
    scale = ((f_t * x).abs() + (f * v).abs() + (g_t * output).abs() + (g * d_output).abs()).clamp(min=1)
    given = flow_map, x, v, output, d_output, t, s
    for error in (eulerian_residual(*given), eulerian_error(*given).error):
        assert float((error / scale).abs().max()) < 1e-7


@every_path
@every_form
@settings(max_examples=5)
@given(u=st.floats(0, 1))
def test_any_network_meets_the_boundary_condition_about_an_origin(path: Path, form: Form, u: float) -> None:
    flow_map = FlowMap(path, analytic(form, path), random_network(), EDMScaling(SD, path))
    t, x = clock(path, u)[0].repeat(2), noise(2, 3)
    close(flow_map.jump(x, t, t), x, rtol=1e-13, atol=1e-13)


@every_form
@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
def test_the_origin_is_a_shift_of_the_data(form: Form, shape: tuple[int, ...]) -> None:
    """X - alpha_s m = f (x - alpha_t m) + g (N - m)."""
    path, m = PATHS["linear"], noise(*shape, seed=3)
    about = AnalyticPreconditioning(copy_with_mean(wavy(0.0), m), form, path)
    plain = AnalyticPreconditioning(wavy(0.0), form, path)
    output, x = noise(4, *shape, seed=1), noise(4, *shape)
    s, t = (time.repeat(4) for time in clock(path, 0.2, 0.7))
    alpha_t, alpha_s = (path.values(time).over(x).alpha for time in (t, s))
    network = Callback(lambda x, t, s, cond: output)
    shifted = FlowMap(path, about, network).jump(x, t, s) - alpha_s * m
    close(shifted, FlowMap(path, plain, network).apply_jump(x - alpha_t * m, output - m, t, s))


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_broadcasting(path: Path, dtype: torch.dtype) -> None:
    preconditioning = AnalyticPreconditioning(wavy(), path=path)
    times = path.time_from_unit(torch.linspace(0.1, 0.9, 5, dtype=F64)).to(dtype)
    table = preconditioning.derivatives(times[2:, None], times[None, :2])
    assert all((value.shape, value.dtype) == ((3, 2), F64) for value in table)
    for value, single in zip(table, preconditioning.derivatives(times[4:], times[1:2]), strict=True):
        torch.testing.assert_close(value[2, 1:], single)


@every_form
def test_it_survives_copies_and_json(form: Form) -> None:
    preconditioning = AnalyticPreconditioning(wavy(), form, PATHS["linear"])
    stored = json.loads(json.dumps(to_json(preconditioning)))
    t, s = torch.tensor([0.9, 0.5], dtype=F64), torch.tensor([0.2, 0.3], dtype=F64)
    for other in (copy.deepcopy(preconditioning), from_json(AnalyticPreconditioning, stored)):
        assert other == preconditioning
        assert hash(other) == hash(preconditioning)
        for one, two in zip(other.coefficients(t, s), preconditioning.coefficients(t, s), strict=True):
            assert torch.equal(one, two)
    assert preconditioning != AnalyticPreconditioning(wavy(0.5), form, PATHS["linear"])


def test_a_saved_flow_map_jumps_as_before(tmp_path: FilePath) -> None:
    path = PATHS["edm"]
    preconditioning = AnalyticPreconditioning(copy_with_mean(wavy(), noise(3).float()))
    network = MLPConfig(width=16, depth=1, embedding_width=8)
    flow_map = FlowMapConfig(path, preconditioning, EDMScaling(SD, path), network, (3,)).build().eval()
    Pipeline(flow_map).save(tmp_path)
    loaded = load_pipeline(tmp_path).flow_map
    assert loaded.config == flow_map.config
    x, (s, t) = noise(4, 3).float(), (time.repeat(4) for time in clock(path, 0.3, 0.8))
    assert torch.equal(loaded.jump(x, t, s), flow_map.jump(x, t, s))


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="form"):
        AnalyticPreconditioning(wavy(), "sideways")  # type: ignore[arg-type]


def test_statistics_beyond_exponentials_are_refused() -> None:
    """A few samples of an untrained denoiser can give s in the thousands: one line instead of NaN."""
    lam = torch.linspace(-4.0, 6.0, 20, dtype=F64)
    s = 4000.0 * (lam < 0).double()
    wild = TrajectoryStatistics.closed_form(lam, torch.zeros_like(lam), s, torch.zeros(3, dtype=F64), 0.5)
    with pytest.raises(ConfigError, match=r"from noise 19.1 to 11.3 .* more samples"):
        AnalyticPreconditioning(wild)
