"""The skip over any (f, g): boundary, the diagonal's meaning, exactness on Gaussians of any covariance, residuals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.flow.derivatives import Derivative
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import EDM, Path
from fewstep.flow.preconditioning.covariance import (
    CosineVariances,
    Covariance,
    PrincipalComponents,
)
from fewstep.flow.preconditioning.jumps import (
    CMPreconditioning,
    CMPreconditioningConfig,
    EulerPreconditioning,
    LinearPreconditioning,
)
from fewstep.flow.preconditioning.skip import SkipPreconditioning, SkipPreconditioningConfig
from fewstep.objectives import eulerian_error, eulerian_residual
from fewstep.utils.errors import ConfigError
from fewstep.utils.serialization import from_json, to_json
from tests.support.cases import (
    F64,
    PAIRS,
    PATHS,
    Callback,
    clock,
    close,
    covering,
    noise,
    pair,
    random_network,
    unit_triples,
)

every_pair = pytest.mark.parametrize(("path_name", "name"), PAIRS)
SHAPE = (2, 3, 2)
SIZE = 12
seeds = st.integers(0, 99)


def components(seed: int = 0, kept: int = SIZE, shape: tuple[int, ...] = SHAPE) -> PrincipalComponents:
    """A random mean, random orthonormal directions, variances from 0.01 to 4."""
    vectors = torch.linalg.qr(noise(SIZE, SIZE, seed=seed))[0]
    variances = torch.logspace(-2, 0.6, SIZE, dtype=F64)[SIZE - kept :]
    return PrincipalComponents(noise(*shape, seed=seed + 1), vectors[:, :kept], variances, 0.05)


def cosine(seed: int = 0) -> CosineVariances:
    channels = torch.linalg.qr(noise(2, 2, seed=seed))[0]
    return CosineVariances(noise(*SHAPE, seed=seed + 1), channels, noise(*SHAPE, seed=seed + 2).square())


COVARIANCES = {"components": components(), "few components": components(kept=3), "cosine": cosine()}
every_covariance = pytest.mark.parametrize("covariance", COVARIANCES.values(), ids=COVARIANCES.keys())
MEETINGS = covering((*each, kind) for each in PAIRS for kind in COVARIANCES)
every_meeting = pytest.mark.parametrize(("path_name", "name", "kind"), MEETINGS)


def matrix(covariance: Covariance) -> Tensor:
    """C (SIZE, SIZE), column by column."""
    return covariance.scaled(torch.eye(SIZE, dtype=F64).reshape(SIZE, *SHAPE), lambda lam: lam).reshape(SIZE, SIZE)


def denoiser(covariance: Covariance, path: Path, x: Tensor, t: Tensor) -> Tensor:
    """m + alpha C (alpha^2 C + sigma^2)^-1 (x - alpha m), by a matrix solved anew for each sample."""
    c, p = matrix(covariance), path.values(t)
    total = p.alpha[:, None, None] ** 2 * c + p.sigma[:, None, None] ** 2 * torch.eye(SIZE, dtype=F64)
    centred = (x - p.over(x).alpha * covariance.mean).flatten(1)
    solved = torch.linalg.solve(total, centred[..., None])[..., 0] @ c
    return covariance.mean + p.over(x).alpha * solved.reshape(x.shape)


def gaussian_network(covariance: Covariance, path_name: str, name: str) -> Callback:
    """What a perfect network gives on N(m, C), whose jumps all come from the skip: its denoiser, or its velocity."""
    path, base = pair(path_name, name)

    def output(x: Tensor, t: Tensor, s: Tensor, cond: object) -> Tensor:
        found = denoiser(covariance, path, x, t)
        if base.denoises:
            return found
        f_s, g_s = (c.reshape(-1, 1, 1, 1) for c in base.diagonal(t))
        return (path.velocity_from_denoised(x, found, t) - f_s * x) / g_s

    return Callback(output)


def skipped(path_name: str, name: str, covariance: Covariance, network: torch.nn.Module) -> FlowMap:
    path, base = pair(path_name, name)
    return FlowMap(path, SkipPreconditioning(base, covariance, path), network)


def cases(path_name: str, times: list[float], seed: int) -> tuple[Tensor, list[Tensor]]:
    """Samples (3, *SHAPE) and times s < u < t, (3,) each."""
    return noise(3, *SHAPE, seed=seed), [time.repeat(3) for time in clock(PATHS[path_name], *times)]


def assert_residual_is_the_slope(flow_map: FlowMap, x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> None:
    """The Eulerian residual against a central difference of the jump along (v, 1)."""
    terms = Derivative().along(flow_map, x, v, t, s, None)  # type: ignore[arg-type]  # networks without conditions
    residual = eulerian_residual(flow_map, x, v, *terms, t, s)
    h = 1e-6 * t
    across = [flow_map.jump(x + sign * h[:, None, None, None] * v, t + sign * h, s) for sign in (1, -1)]
    slope = (across[0] - across[1]) / (2 * h[:, None, None, None])
    close(residual.detach(), slope.detach(), rtol=1e-4, atol=1e-5 * float(1 + slope.detach().abs().max()))


@every_covariance
def test_a_covariance_is_symmetric_and_scales_its_directions(covariance: Covariance) -> None:
    c = matrix(covariance)
    close(c, c.T)
    assert float(torch.linalg.eigvalsh(c).min()) > -1e-12
    x = noise(3, *SHAPE)
    close(covariance.scaled(x, lambda lam: lam).flatten(1), x.flatten(1) @ c)
    close(covariance.scaled(x, torch.ones_like), x)
    twice = covariance.scaled(covariance.scaled(x, torch.sqrt), torch.sqrt)
    close(twice.flatten(1), x.flatten(1) @ c)


@given(seed=seeds)
def test_cosines_are_orthonormal(seed: int) -> None:
    x, covariance = noise(2, *SHAPE, seed=seed), cosine(seed)
    close(covariance.coordinates(x).square().sum(), x.square().sum())
    close(covariance.scaled(x, torch.ones_like), x)


@every_meeting
@settings(max_examples=4)
@given(times=unit_triples, seed=seeds)
def test_any_network_keeps_the_boundary_and_the_diagonal(
    path_name: str, name: str, kind: str, times: list[float], seed: int
) -> None:
    """X(x, t, t) = x, and d/ds X at s = t is the velocity that the network has under the base, for every C."""
    network = random_network(SHAPE)
    flow_map = skipped(path_name, name, COVARIANCES[kind], network)
    plain = FlowMap(*pair(path_name, name), network)
    x, (t, *_) = cases(path_name, times, seed)
    close(flow_map.jump(x, t, t), x, rtol=1e-9, atol=1e-9)
    _, rate = torch.func.jvp(lambda s: flow_map.jump(x, t, s), (t,), (torch.ones_like(t),))
    size = float(1 + plain.velocity(x, t).detach().abs().max())
    close(rate, plain.velocity(x, t), atol=1e-7 * size)
    close(flow_map.denoise(x, t), plain.denoise(x, t))


@every_meeting
@settings(max_examples=4)
@given(times=unit_triples, seed=seeds)
def test_it_is_exact_on_gaussians_of_any_covariance(
    path_name: str, name: str, kind: str, times: list[float], seed: int
) -> None:
    """With the Gaussian's N on the diagonal every jump follows the velocity, and jumps compose."""
    path, covariance = PATHS[path_name], COVARIANCES[kind]
    flow_map = skipped(path_name, name, covariance, gaussian_network(covariance, path_name, name))
    x, (s, middle, t) = cases(path_name, times, seed)
    x = path.interpolate(x, noise(3, *SHAPE, seed=seed + 1), t)
    landed, rate = torch.func.jvp(lambda s: flow_map.jump(x, t, s), (s,), (torch.ones_like(s),))
    velocity = path.velocity_from_denoised(landed, denoiser(covariance, path, landed, s), s)
    size = float(1 + velocity.abs().max())
    close(rate, velocity, atol=1e-7 * size)
    close(flow_map.jump(flow_map.jump(x, t, middle), middle, s), landed, atol=1e-7 * float(1 + landed.abs().max()))


@every_pair
@settings(max_examples=4)
@given(times=unit_triples, seed=seeds)
def test_the_residual_is_the_derivative_of_the_jump_along_the_flow(
    path_name: str, name: str, times: list[float], seed: int
) -> None:
    """For any network and velocity, against a central difference; zero on the Gaussian."""
    covariance, path = COVARIANCES["components"], PATHS[path_name]
    flow_map = skipped(path_name, name, covariance, random_network(SHAPE))
    x, (s, _, t) = cases(path_name, times, seed)
    v = noise(3, *SHAPE, seed=seed + 2)
    assert_residual_is_the_slope(flow_map, x, v, t, s)
    exact = skipped(path_name, name, covariance, gaussian_network(covariance, path_name, name))
    v = path.velocity_from_denoised(x, denoiser(covariance, path, x, t), t)
    terms = Derivative().along(exact, x, v, t, s, None)  # type: ignore[arg-type]
    size = 1e-7 * float(1 + x.abs().max() + terms[1].abs().max())
    close(eulerian_residual(exact, x, v, *terms, t, s), torch.zeros_like(x), atol=size)
    close(eulerian_error(exact, x, v, *terms, t, s).error, torch.zeros_like(x), atol=size / float((t - s).min()))


@pytest.mark.parametrize("path_name", ["edm", "linear"])
def test_without_variance_it_is_finite_at_both_ends(path_name: str) -> None:
    """A direction that does not vary, at the clock's ends."""
    path = PATHS[path_name]
    covariance = PrincipalComponents(
        torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64)[:, :2], torch.zeros(2, dtype=F64), 0.0
    )
    flow_map = FlowMap(path, SkipPreconditioning(EulerPreconditioning(path), covariance, path), random_network())
    ends = (
        torch.tensor([path.t_max, path.t_max, path.t_min], dtype=F64),
        torch.tensor([path.t_min, path.t_max, path.t_min], dtype=F64),
    )
    assert bool(flow_map.jump(noise(3, 3), *ends).isfinite().all())
    for base in (EulerPreconditioning(path), LinearPreconditioning()):
        skip = SkipPreconditioning(base, covariance, path)
        middle = 0.5 * (path.t_min + path.t_max)
        for t, s in ((middle, path.t_min), (path.t_max, path.t_min), (middle, middle)):
            times = tuple(torch.tensor([time], dtype=F64) for time in (t, s))
            both = torch.func.jvp(lambda t, s: skip.linear(noise(1, 3), t, s), times, (torch.ones(1).double(),) * 2)  # noqa: B023
            assert bool(both[1].isfinite().all())


def test_a_share_of_the_gaussian_explains_what_euler_does_not() -> None:
    """Before training, with N = D: X(80 -> 0.002) has the data's variance where Euler's jump has the mean's."""
    covariance, path = components(), EDM()
    network = Callback(lambda x, t, s, cond: denoiser(covariance, path, x, t))
    t, s = (torch.full((500,), time, dtype=F64) for time in (80.0, 0.002))
    x = covariance.mean + 80 * noise(500, *SHAPE, seed=5)
    euler, skip = EulerPreconditioning(path), SkipPreconditioning(EulerPreconditioning(path), covariance, path)
    spread = [
        float((FlowMap(path, each, network).jump(x, t, s) - covariance.mean).square().sum(dim=(1, 2, 3)).mean())
        for each in (euler, skip)
    ]
    total = float(matrix(covariance).trace())
    assert spread[1] == pytest.approx(total, rel=0.1)
    assert spread[0] < 0.01 * total


@every_covariance
def test_it_is_stored_and_read_back(covariance: Covariance) -> None:
    own = SkipPreconditioning(EulerPreconditioning(), covariance)
    again = from_json(SkipPreconditioning, to_json(own))
    x, t, s = noise(3, *SHAPE), torch.full((3,), 5.0, dtype=F64), torch.full((3,), 0.5, dtype=F64)
    assert torch.equal(again.jump(EDM(), x, x, t, s), own.jump(EDM(), x, x, t, s))
    assert to_json(again) == to_json(own)


def test_what_has_no_velocity_or_no_covariance_is_refused() -> None:
    with pytest.raises(ConfigError, match="velocity"):
        SkipPreconditioning(CMPreconditioning(), components())
    with pytest.raises(ConfigError, match="velocity"):
        SkipPreconditioningConfig(CMPreconditioningConfig())
    with pytest.raises(ConfigError, match="covariance"):
        SkipPreconditioningConfig().let_through(EulerPreconditioning(), EDM(), None)
    with pytest.raises(ConfigError, match="do not fit"):
        PrincipalComponents(torch.zeros(3), torch.eye(2), torch.ones(2), 1.0)
    with pytest.raises(ConfigError, match="do not fit"):
        CosineVariances(torch.zeros(1, 2, 2), torch.eye(1), torch.ones(1, 2, 3))
