"""Jump coefficients and inner scaling: boundary condition, diagonal, derivatives, and the identities between them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import EDM, Path, PathConfig
from fewstep.flow.preconditioning.jumps import (
    BCMPreconditioning,
    CMPreconditioning,
    EulerPreconditioning,
    TrigPreconditioningConfig,
)
from fewstep.flow.preconditioning.network_scaling import EDMInputScaling, EDMScaling, Scaling, UnitScaling
from fewstep.utils import parts
from fewstep.utils.errors import ConfigError, UnsupportedError
from tests.support.cases import F64, PAIRS, PATHS, SD, clock, close, noise, pair, random_network, unit_triples, units

every_pair = pytest.mark.parametrize(("path_name", "name"), PAIRS)
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


@every_pair
@given(u=st.floats(0, 1))
def test_boundary_condition(path_name: str, name: str, u: float) -> None:
    path, coefficients = pair(path_name, name)
    (t,) = clock(path, u)
    f, g = coefficients.coefficients(t, t)
    close(f, torch.ones_like(f), rtol=1e-15)
    close(g, torch.zeros_like(g), atol=1e-15 * path.t_max)


@every_pair
@given(u=units)
def test_diagonal_is_the_derivative_in_s(path_name: str, name: str, u: float) -> None:
    path, preconditioning = pair(path_name, name)
    (t,) = clock(path, u)
    one = torch.ones_like(t)
    _, (f_s, g_s) = torch.func.jvp(lambda s: preconditioning.coefficients(t, s), (t,), (one,))
    close(f_s, preconditioning.diagonal(t)[0])
    close(g_s, preconditioning.diagonal(t)[1])


@every_pair
@given(times=unit_triples)
def test_derivatives_agree_with_finite_differences(path_name: str, name: str, times: list[float]) -> None:
    path, preconditioning = pair(path_name, name)
    s, t = clock(path, times[0], times[2])
    h = 1e-5 * t
    d = preconditioning.derivatives(t, s)
    above, below = (preconditioning.coefficients(t + sign * h, s) for sign in (1, -1))
    for now, slope, value, up, down in zip(d[:2], d[2:], preconditioning.coefficients(t, s), above, below, strict=True):
        close(now, value)
        close((up - down) / (2 * h), slope, rtol=1e-6, atol=1e-6 * float(1 / t))


@every_pair
@given(u=units)
def test_derivatives_in_t_and_s_cancel_on_the_diagonal(path_name: str, name: str, u: float) -> None:
    """f(t, t) = 1 and g(t, t) = 0 for all t, so f_t = -f_s and g_t = -g_s there."""
    path, preconditioning = pair(path_name, name)
    (t,) = clock(path, u)
    d = preconditioning.derivatives(t, t)
    f_s, g_s = preconditioning.diagonal(t)
    close(d.f_t, -f_s)
    close(d.g_t, -g_s)


@every_path
@given(times=unit_triples, sd=st.floats(0.2, 2))
def test_euler_with_edm_scaling_is_bcm(path: Path, times: list[float], sd: float) -> None:
    """math.md §2, for an arbitrary network."""
    network, x = random_network(), noise(4, 3)
    s, t = (time.expand(4) for time in clock(path, times[0], times[2]))
    euler = FlowMap(path, EulerPreconditioning(path), network, EDMScaling(sd, path))
    bcm = FlowMap(path, BCMPreconditioning(sd, path), network, EDMInputScaling(sd, path))
    close(euler.jump(x, t, s), bcm.jump(x, t, s), rtol=1e-8)
    close(euler.velocity(x, t), bcm.velocity(x, t), rtol=1e-8)


@given(t=st.floats(0.002, 80), sd=st.floats(0.2, 2))
def test_cm_coefficients_are_the_published_ones(t: float, sd: float) -> None:
    low = 0.002
    f, g = CMPreconditioning(sd, low).coefficients(torch.tensor([t], dtype=F64), torch.tensor([low], dtype=F64))
    assert float(f) == pytest.approx(sd**2 / ((t - low) ** 2 + sd**2), rel=1e-12)
    assert float(g) == pytest.approx(sd * (t - low) / math.sqrt(sd**2 + t**2), rel=1e-12, abs=1e-15)


def test_cm_refuses_what_it_cannot_mean() -> None:
    t, s = torch.tensor([1.0, 2.0]), torch.tensor([0.002, 0.5])
    with pytest.raises(UnsupportedError, match="t_min"):
        CMPreconditioning().coefficients(t, s)
    with pytest.raises(UnsupportedError, match="diagonal"):
        CMPreconditioning().diagonal(t)


@every_path
@pytest.mark.parametrize("kind", [EulerPreconditioning, lambda path: BCMPreconditioning(SD, path)])
@given(times=unit_triples)
def test_coefficients_travel_between_paths(path: Path, kind: type, times: list[float]) -> None:
    """f_path = (alpha_s/alpha_t) f(tau_t, tau_s), g_path = alpha_s g(tau_t, tau_s): math.md §3.5."""
    s, t = clock(path, times[0], times[2])
    f, g = kind(path).coefficients(t, s)
    f_edm, g_edm = kind(EDM()).coefficients(path.tau(t), path.tau(s))
    alpha_t, alpha_s = path.values(t).alpha, path.values(s).alpha
    close(f, alpha_s / alpha_t * f_edm, rtol=1e-8)
    close(g, alpha_s * g_edm, rtol=1e-8)


@every_path
@given(times=unit_triples, seed=st.integers(0, 99))
def test_euler_is_the_ddim_step(path: Path, times: list[float], seed: int) -> None:
    s, t = clock(path, times[0], times[2])
    x, denoised = noise(1, seed=seed), noise(1, seed=seed + 1)
    f, g = EulerPreconditioning(path).coefficients(t, s)
    at_t, at_s = path.values(t), path.values(s)
    estimate = (x - at_t.alpha * denoised) / at_t.sigma
    close(f * x + g * denoised, at_s.alpha * denoised + at_s.sigma * estimate, rtol=1e-8, atol=1e-9)


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_broadcasting(path_name: str, name: str, dtype: torch.dtype) -> None:
    path, preconditioning = pair(path_name, name)
    times = path.time_from_unit(torch.linspace(0.1, 0.9, 5, dtype=F64)).to(dtype)
    table = preconditioning.derivatives(times[2:, None], times[None, :2])
    for value in table:
        assert value.shape == (3, 2)
        assert value.dtype == F64
    for value, single in zip(table, preconditioning.derivatives(times[4:], times[1:2]), strict=True):
        torch.testing.assert_close(value[2, 1:], single)
    assert all(value.dtype == F64 for value in preconditioning.diagonal(times))


@pytest.mark.parametrize("path_name", ["linear", "trig", "vp"])
def test_trig_needs_a_short_clock(path_name: str) -> None:
    with pytest.raises(ConfigError, match="pi/2"):
        TrigPreconditioningConfig().build(EDM(), SD)
    path = parts.kind(PathConfig, path_name).build(SD)
    g = TrigPreconditioningConfig().build(path, SD).coefficients(torch.tensor(0.5), torch.tensor(0.5))[1]
    assert float(g) == 0


@pytest.mark.parametrize("kind", [BCMPreconditioning, CMPreconditioning, EDMScaling, EDMInputScaling, UnitScaling])
@pytest.mark.parametrize("sd", [0.0, -1.0, math.nan])
def test_a_data_deviation_must_be_positive(kind: type, sd: float) -> None:
    with pytest.raises(ConfigError, match="sigma_data"):
        kind(sd)


@every_path
@given(u=units, sd=st.floats(0.2, 2))
def test_edm_scaling_gives_the_network_unit_variance_in_and_out(path: Path, u: float, sd: float) -> None:
    """EDM's derivation: Var(c_in x_t) = 1 and Var((x0 - c_skip x_t)/c_out) = 1 for data of deviation sd."""
    (t,) = clock(path, u)
    p, c = path.values(t), EDMScaling(sd, path).values(t)
    one = torch.ones_like(t)
    close(c.c_in**2 * (p.alpha**2 * sd**2 + p.sigma**2), one)
    target = ((1 - c.c_skip * p.alpha) ** 2 * sd**2 + c.c_skip**2 * p.sigma**2) / c.c_out**2
    close(target, one, rtol=1e-6)


@given(t=st.floats(0.002, 80), sd=st.floats(0.2, 2))
def test_edm_scaling_on_its_own_path_is_the_published_one(t: float, sd: float) -> None:
    time, scaling = torch.tensor([t], dtype=F64), EDMScaling(sd)
    total = t * t + sd * sd
    expected = torch.tensor([sd * sd / total, t * sd / math.sqrt(total), 1 / math.sqrt(total)], dtype=F64)
    close(torch.cat(scaling.values(time)), expected)
    assert float(scaling.c_noise(time)) == pytest.approx(math.log(t) / 4)


@every_path
@pytest.mark.parametrize("kind", [EDMScaling, EDMInputScaling])
def test_c_noise_and_its_derivative_are_finite_at_both_ends(path: Path, kind: type[Scaling]) -> None:
    ends = torch.tensor([path.t_min, path.t_max], dtype=F64)
    value, rate = torch.func.jvp(kind(SD, path).c_noise, (ends,), (torch.ones_like(ends),))
    assert bool(value.isfinite().all() and rate.isfinite().all())
    assert float(value[0]) < float(value[1])
