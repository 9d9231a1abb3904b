"""Probability paths: values and derivatives agree, conversions invert each other, both ends are finite."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.flow.paths import EDM, VP, Linear, Path, Trig
from fewstep.utils.errors import ConfigError
from tests.support.cases import F64, PATHS, clock, close, gaussian, means, noise, sample_shapes, sds, units

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


@every_path
@given(u=units)
def test_derivatives_are_those_of_the_values(path: Path, u: float) -> None:
    (t,) = clock(path, u)
    values, tangents = torch.func.jvp(path.values, (t,), (torch.ones_like(t),))
    close(tangents.alpha, values.d_alpha)
    close(tangents.sigma, values.d_sigma)
    h = 1e-5 * t
    above, below = path.values(t + h), path.values(t - h)
    close((above.alpha - below.alpha) / (2 * h), values.d_alpha, rtol=1e-6, atol=1e-7)
    close((above.sigma - below.sigma) / (2 * h), values.d_sigma, rtol=1e-6, atol=1e-7)


@every_path
@given(u=units, shape=sample_shapes, seed=st.integers(0, 99))
def test_conversions_invert_each_other(path: Path, u: float, shape: tuple[int, ...], seed: int) -> None:
    t = clock(path, u)[0].expand(2)
    x, denoised = noise(2, *shape, seed=seed), noise(2, *shape, seed=seed + 1)
    p = path.values(t).over(x)
    v = path.velocity_from_denoised(x, denoised, t)
    e = path.noise_from_velocity(x, v, t)
    close(path.denoised_from_velocity(x, v, t), denoised, rtol=1e-8, atol=1e-8)
    close(e, (x - p.alpha * denoised) / p.sigma, rtol=1e-8, atol=1e-8)
    close(p.alpha * denoised + p.sigma * e, x)
    close(p.d_alpha * denoised + p.d_sigma * e, v)


@pytest.mark.parametrize("path", [Linear(), Trig(0.7)], ids=["linear", "trig"])
@given(mean=means, sd=sds)
def test_pure_noise_is_finite(path: Path, mean: float, sd: float) -> None:
    """At t_max the denoiser is the data's mean, the noise x/sigma, whichever conversion gives them."""
    data, x = gaussian(mean, sd), noise(5, 2)
    t = torch.full((5,), path.t_max, dtype=F64)
    v = data.velocity(path, x, t)
    close(path.denoised_from_velocity(x, v, t), torch.full_like(x, mean), atol=1e-9)
    close(path.noise_from_velocity(x, v, t), x / path.values(t).sigma[:, None], atol=1e-9)
    close(path.velocity_from_denoised(x, data.denoise(path, x, t), t), v)
    assert float(path.tau(t)[0]) > 1e15


@pytest.mark.parametrize("path", [Linear(), Trig(0.7)], ids=["linear", "trig"])
def test_an_infinite_noise_level_is_the_noise_end(path: Path) -> None:
    ends = path.time_from_tau(torch.tensor([0.0, math.inf], dtype=F64))
    close(ends, torch.tensor([0.0, path.t_max], dtype=F64))


@every_path
@given(u=units)
def test_time_from_tau_inverts_tau(path: Path, u: float) -> None:
    (t,) = clock(path, u)
    close(path.time_from_tau(path.tau(t)), t, rtol=1e-8)


@every_path
def test_the_noise_level_grows_with_time(path: Path) -> None:
    tau = path.tau(path.time_from_unit(torch.linspace(0, 1, 200, dtype=F64)))
    assert bool((tau[1:] > tau[:-1]).all())


@every_path
@given(u=units, shape=sample_shapes, seed=st.integers(0, 99))
def test_conditional_velocity_is_the_interpolants_derivative(
    path: Path, u: float, shape: tuple[int, ...], seed: int
) -> None:
    t = clock(path, u)[0].repeat(3)
    x0, eps = noise(3, *shape, seed=seed), noise(3, *shape, seed=seed + 1)
    x, rate = torch.func.jvp(lambda time: path.interpolate(x0, eps, time), (t,), (torch.ones_like(t),))
    v = path.conditional_velocity(x0, eps, t)
    close(rate, v)
    close(path.denoised_from_velocity(x, v, t), x0, rtol=1e-7, atol=1e-7)
    close(path.noise_from_velocity(x, v, t), eps, rtol=1e-7, atol=1e-7)


def check_unit_clock(path: Path) -> None:
    times = path.time_from_unit(torch.linspace(0, 1, 50, dtype=F64))
    assert float(times[0]) == path.t_min
    assert float(times[-1]) == path.t_max
    assert bool((times[1:] > times[:-1]).all())


@every_path
def test_the_unit_clock_spans_the_range_exactly(path: Path) -> None:
    check_unit_clock(path)


@given(low=st.floats(1e-4, 0.9), ratio=st.floats(2, 1e4))
def test_the_unit_clock_spans_any_range_exactly(low: float, ratio: float) -> None:
    check_unit_clock(EDM(low, low * ratio))
    check_unit_clock(VP(epsilon=low))


@given(low=st.floats(1e-4, 0.9), ratio=st.floats(2, 1e4))
def test_the_edm_clock_runs_at_its_ends_too(low: float, ratio: float) -> None:
    """dt/du = t log(sigma_max/sigma_min) at both ends, where a clamp could stop the clock."""
    path, ends = EDM(low, low * ratio), torch.tensor([0.0, 1.0], dtype=F64)
    t, rate = torch.func.jvp(path.time_from_unit, (ends,), (torch.ones_like(ends),))
    close(rate, t * math.log(path.sigma_max / path.sigma_min), rtol=1e-9)


@every_path
def test_the_prior_has_the_noise_ends_scale(path: Path) -> None:
    eps = noise(4, 2)
    close(path.prior(eps), path.values(torch.tensor(path.t_max, dtype=F64)).sigma * eps)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EDM(2.0, 1.0),
        lambda: EDM(-1.0, 1.0),
        lambda: EDM(0.0, 80.0),
        lambda: EDM(0.1, math.inf),
        lambda: EDM(0.1, math.nan),
        lambda: Trig(0.0),
        lambda: Trig(math.nan),
        lambda: VP(epsilon=0.0),
        lambda: VP(epsilon=1.0),
        lambda: VP(beta_min=3.0, beta_max=1.0),
        lambda: VP(beta_min=0.0),
    ],
)
def test_empty_ranges_are_refused(make: type[Path]) -> None:
    with pytest.raises(ConfigError):
        make()
