"""Flow maps: the boundary condition for any network, and composition, velocity and denoiser of exact maps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.flow.closed_form import GaussianData, MixtureData
from fewstep.flow.flow_map import FlowMap, at
from fewstep.flow.paths import Linear, Path
from fewstep.flow.preconditioning.jumps import CMPreconditioning, EulerPreconditioning, LinearPreconditioning
from fewstep.utils.errors import ShapeError, UnsupportedError
from tests.support.cases import (
    F64,
    PAIRS,
    PATHS,
    SD,
    Callback,
    clock,
    close,
    gaussian,
    means,
    mixture,
    noise,
    pair,
    random_network,
    sample_shapes,
    scalings,
    sds,
    slope,
    unit_triples,
    units,
)

every_pair = pytest.mark.parametrize(("path_name", "name"), PAIRS)
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


@every_pair
@settings(max_examples=6)
@given(u=st.floats(0, 1), shape=sample_shapes)
def test_a_jump_of_no_length_changes_nothing(path_name: str, name: str, u: float, shape: tuple[int, ...]) -> None:
    """With every scaling."""
    (path, preconditioning), network = pair(path_name, name), random_network(shape)
    t, x = clock(path, u)[0].repeat(2), noise(2, *shape)
    for scaling in scalings(path).values():
        flow_map = FlowMap(path, preconditioning, network, scaling)
        close(flow_map.jump(x, t, t), x, rtol=1e-12, atol=1e-12)
        assert float(flow_map.output(x, t, t).detach().abs().min()) > 0


@every_pair
@settings(max_examples=12)
@given(times=unit_triples, mean=means, sd=sds, shape=sample_shapes)
def test_exact_maps_compose(
    path_name: str, name: str, times: list[float], mean: float, sd: float, shape: tuple[int, ...]
) -> None:
    path, preconditioning = pair(path_name, name)
    data = gaussian(mean, sd)
    flow_map = data.flow_map(path, preconditioning)
    s, middle, t = (time.repeat(3) for time in clock(path, *times))
    x = path.interpolate(noise(3, *shape), noise(3, *shape, seed=1), t)
    direct = flow_map.jump(x, t, s)
    size = 1e-9 * float(1 + x.abs().max())
    close(flow_map.jump(flow_map.jump(x, t, middle), middle, s), direct, atol=size)
    close(direct, data.jump(path, x, t, s), atol=size)


@every_pair
@given(u=units, mean=means, sd=sds)
def test_exact_maps_give_the_velocity_and_the_denoiser(
    path_name: str, name: str, u: float, mean: float, sd: float
) -> None:
    path, preconditioning = pair(path_name, name)
    data = gaussian(mean, sd)
    flow_map = data.flow_map(path, preconditioning)
    t = clock(path, u)[0].repeat(3)
    x = path.interpolate(noise(3, 2), noise(3, 2, seed=1), t)
    close(flow_map.velocity(x, t), data.velocity(path, x, t), rtol=1e-8, atol=1e-8)
    close(flow_map.denoise(x, t), data.denoise(path, x, t), rtol=1e-7, atol=1e-7)
    assert torch.equal(flow_map(x, t), flow_map.denoise(x, t))


@every_path
@pytest.mark.parametrize("u", [0.0, 1.0])
def test_a_network_that_denoises_does_so_at_both_ends(path: Path, u: float) -> None:
    data, t = gaussian(0.3, SD), path.time_from_unit(torch.full((3,), u, dtype=F64))
    x = noise(3, 2)
    exact = Callback(lambda x, t, s, cond: data.denoise(path, x, t))
    found = FlowMap(path, EulerPreconditioning(path), exact).denoise(x, t)
    assert torch.equal(found, data.denoise(path, x, t))
    assert bool(found.isfinite().all())


@every_path
@given(u=units, mean=means, sd=sds)
def test_the_gaussian_jump_follows_its_velocity(path: Path, u: float, mean: float, sd: float) -> None:
    """d/ds X(x, t, s) = v(X(x, t, s), s), the definition of the flow."""
    data, x = gaussian(mean, sd), noise(3, 2)
    t, s = (time.repeat(3) for time in clock(path, 0.99, u))
    landed, rate = torch.func.jvp(lambda s: data.jump(path, x, t, s), (s,), (torch.ones_like(s),))
    close(rate, data.velocity(path, landed, s), rtol=1e-8, atol=1e-8)


@every_path
@given(u=units)
def test_gaussian_velocity_and_denoiser_convert(path: Path, u: float) -> None:
    data, x = gaussian(), noise(3, 2)
    t = clock(path, u)[0].repeat(3)
    v = path.velocity_from_denoised(x, data.denoise(path, x, t), t)
    close(v, data.velocity(path, x, t), rtol=1e-8, atol=1e-8)


def log_density(data: MixtureData, path: Path, x: Tensor, t: Tensor) -> Tensor:
    """log p(x_t): the mixture's components widened by the path."""
    p = path.values(t)
    parts = []
    for weight, mean, sd in zip(data.weights, data.means, data.sds, strict=True):
        scale = torch.sqrt(p.alpha**2 * sd**2 + p.sigma**2)[:, None]
        parts.append(weight.log() + torch.distributions.Normal(p.alpha[:, None] * mean, scale).log_prob(x).sum(1))
    return torch.logsumexp(torch.stack(parts), 0)


@every_path
@given(u=st.floats(0.2, 0.9), seed=st.integers(0, 99))
def test_the_mixture_denoiser_obeys_tweedie(path: Path, u: float, seed: int) -> None:
    """alpha D = x + sigma^2 grad log p(x_t)."""
    data, t = mixture(), clock(path, u)[0].repeat(4)
    x = path.interpolate(noise(4, 2, seed=seed), noise(4, 2, seed=seed + 1), t).requires_grad_()
    (score,) = torch.autograd.grad(log_density(data, path, x, t).sum(), x)
    p = path.values(t).over(x)
    close((x + p.sigma**2 * score) / p.alpha, data.denoise(path, x, t), rtol=1e-7, atol=1e-7)


def test_the_mixture_denoiser_is_the_posterior_mean() -> None:
    """Self-normalised importance sampling from the data itself, within 5 standard errors."""
    data, path = mixture(), Linear()
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(200_000, dtype=F64, generator=generator)
    x0 = data.sample(u, torch.randn(200_000, 2, dtype=F64, generator=generator))
    for time in (0.3, 0.5, 0.8):
        x, t = torch.tensor([[0.2, -0.1]], dtype=F64), torch.tensor([time], dtype=F64)
        weight = torch.exp(-0.5 * (x - (1 - time) * x0).square().sum(1) / time**2)
        weight = (weight / weight.sum())[:, None]
        estimate = (weight * x0).sum(0)
        error = (weight**2 * (x0 - estimate) ** 2).sum(0).sqrt()
        assert bool(((estimate - data.denoise(path, x, t)[0]).abs() < 5 * error).all())


@every_path
def test_a_mixture_of_one_is_a_gaussian(path: Path) -> None:
    mean = torch.tensor([[0.4, -0.2]], dtype=F64)
    one = MixtureData(torch.ones(1, dtype=F64), mean, torch.tensor([SD], dtype=F64))
    data = GaussianData(mean[0], SD)
    s, t = (time.repeat(3) for time in clock(path, 0.3, 0.8))
    x = noise(3, 2)
    close(one.denoise(path, x, t), data.denoise(path, x, t))
    close(one.jump(path, x, t, s, steps=50), data.jump(path, x, t, s), rtol=1e-6, atol=1e-6)


@every_path
def test_mixture_jumps_compose_with_order_four(path: Path) -> None:
    data = mixture()
    s, middle, t = (time.repeat(4) for time in clock(path, 0.4, 0.6, 0.85))
    x = path.interpolate(noise(4, 2), noise(4, 2, seed=1), t)
    exact = data.jump(path, x, t, s, steps=60)
    composed = data.jump(path, data.jump(path, x, t, middle, 30), middle, s, 30)
    close(composed, exact, rtol=1e-5, atol=1e-5)
    steps = [5, 10, 20]
    errors = [float((data.jump(path, x, t, s, steps=n) - exact).abs().max()) for n in steps]
    assert slope([1 / n for n in steps], errors) == pytest.approx(4, abs=0.4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    flow_map = gaussian().flow_map(Linear(), LinearPreconditioning())
    x, t = noise(3, 2), torch.full((3,), 0.5, dtype=F64)
    for bad in (t[:2], t[:1], t[0], t[:, None]):
        with pytest.raises(ShapeError, match="one time per sample"):
            flow_map.jump(x, t, bad)
        with pytest.raises(ShapeError, match="one time per sample"):
            flow_map.jump(x, bad, t)
        with pytest.raises(ShapeError, match="one time per sample"):
            flow_map.velocity(x, bad)
        with pytest.raises(ShapeError, match="one time per sample"):
            flow_map.denoise(x, bad)
    with pytest.raises(ShapeError, match="sample shape"):
        _ = flow_map.sample_shape


def test_a_consistency_model_jumps_to_data_and_has_no_velocity() -> None:
    path, x = PATHS["edm"], noise(2, 3)
    flow_map = FlowMap(path, CMPreconditioning(SD), random_network(), scalings(path)["edm-input"])
    close(flow_map.jump(x, at(0.002, x), at(0.002, x)), x)
    assert bool(flow_map.jump(x, at(5.0, x), at(0.002, x)).isfinite().all())
    with pytest.raises(UnsupportedError):
        flow_map.velocity(x, at(5.0, x))


def test_coefficients_keep_the_precision_of_the_times() -> None:
    """float32 samples with float64 times: the jump of no length is still the identity to the last bit."""
    flow_map = FlowMap(PATHS["edm"], pair("edm", "bcm")[1], random_network().float(), scalings(PATHS["edm"])["unit"])
    x = noise(2, 3).float()
    jumped = flow_map.jump(x, at(79.9, x), at(79.9, x))
    assert jumped.dtype == torch.float32
    assert torch.equal(jumped, x)
