"""Times of any type are taken in float64, the ends of a clock exactly: every function that a caller may give times."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fewstep.flow import ode
from fewstep.flow.derivatives import Derivative
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import ClassifierFreeGuidance, omega_at
from fewstep.flow.paths import Path
from fewstep.flow.preconditioning.gap import GapSettings, consistency_gap
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.flow.preconditioning.network_scaling import EDMScaling
from fewstep.flow.times import check_grid
from fewstep.networks.condition import Condition
from fewstep.sampling.samplers import euler_sampler, gamma_sampler, heun_sampler, map_sampler
from fewstep.teachers import denoiser_on
from fewstep.utils.random import Draws
from tests.support.cases import F64, PATHS, SD, gaussian, mixture, noise, preconditionings, random_network

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
X, EPS = noise(3, 2), noise(3, 2, seed=1)
COND, LABELS = Condition(), torch.tensor([0, 1, 1])
Function = Callable[[Path, Tensor], object]


def flow_map(path: Path, classes: int = 0) -> FlowMap:
    return FlowMap(path, EulerPreconditioning(path), random_network((2,), classes), EDMScaling(SD, path))


def denoise(path: Path, x: Tensor, t: Tensor, cond: Condition = COND) -> Tensor:
    return mixture().denoise(path, x, t)


def pairs(times: Tensor) -> tuple[Tensor, Tensor]:
    """Jumps between neighbours of the falling times."""
    return times[:-1], times[1:]


def solved(solver: ode.SolverName, path: Path, times: Tensor) -> Tensor:
    return ode.solve(partial(denoise, path), path, X, times, solver)


def stepped(step: Callable[..., Tensor], path: Path, times: Tensor) -> Tensor:
    return step(partial(denoise, path), path, X, *pairs(times))


def sampled(sampler: Callable[..., Tensor], path: Path, times: Tensor) -> Tensor:
    inner = times[:-1] if sampler in (euler_sampler, heun_sampler) else times
    return sampler(flow_map(path), X, inner, COND, Draws(0, 0, torch.arange(3)))


def on_another(teacher_path: Path, path: Path, times: Tensor) -> Tensor:
    """The denoiser of a teacher on another path."""
    return denoiser_on(path, flow_map(teacher_path))(X, times[:-1], COND)


def guided(path: Path, times: Tensor) -> tuple[Tensor, ...]:
    model, (t, s), cond = ClassifierFreeGuidance(flow_map(path, 2), 2.0), pairs(times), Condition(LABELS)
    rows = torch.tensor([[1.0, 0.0, 1.0]], dtype=F64).expand(3, 3)
    return model.jump(X, t, s, cond), model.velocity(X, t, cond), omega_at(path, rows, t, LABELS >= 0)


def along(kind: str, path: Path, times: Tensor) -> tuple[Tensor, ...]:
    derivative, (t, s) = Derivative(kind), pairs(times)  # type: ignore[arg-type]
    return *derivative.along(flow_map(path), X, EPS, t, s, COND), *derivative.at_end(flow_map(path), X, t, s, COND)


def converted(path: Path, times: Tensor) -> tuple[Tensor, ...]:
    t = times[:-1]
    return (
        path.interpolate(X, EPS, t),
        path.conditional_velocity(X, EPS, t),
        path.denoised_from_velocity(X, EPS, t),
        path.noise_from_velocity(X, EPS, t),
        path.velocity_from_denoised(X, EPS, t),
        path.time_scale(times),
        path.tau(times[1:]),
        path.time_from_tau(path.tau(times)),
        *path.values(times),
    )


def coefficients(path: Path, times: Tensor) -> list[Tensor]:
    t, s = pairs(times)
    found = preconditionings(path).values()
    return [value for own in found for value in (*own.derivatives(t, s), *own.diagonal(t))]


def jumps(path: Path, times: Tensor) -> tuple[Tensor, ...]:
    model, (t, s) = flow_map(path), pairs(times)
    return model(X, t, s), model(X, t), model.velocity(X, t), model.output(X, t, s), model.apply_jump(X, EPS, t, s)


def closed_forms(path: Path, times: Tensor) -> tuple[Tensor, ...]:
    (t, s), exact, inner = pairs(times), gaussian(), times[1:-1]
    own = mixture()
    return (
        *(exact.denoise(path, X, t), exact.velocity(path, X, t), exact.jump(path, X, t, s)),
        *(own.denoise(path, X, t), own.velocity(path, X, t), own.jump(path, X[:1], inner[:1], inner[1:], steps=4)),
    )


def gaps(path: Path, times: Tensor) -> Tensor:
    own = EulerPreconditioning(path)
    t, s = times[1:2], times[2:3]
    return consistency_gap(
        own, partial(denoise, path), X, t, s, path=path, settings=GapSettings(samples=4, solver_steps=4)
    ).rms


FUNCTIONS: dict[str, Function] = {
    "path": converted,
    "preconditioning": coefficients,
    "flow map": jumps,
    "guidance": guided,
    "exact derivative": partial(along, "exact"),
    "finite difference": partial(along, "finite-difference"),
    "closed forms": closed_forms,
    "gap": gaps,
    "grid": check_grid,
    "euler step": partial(stepped, ode.euler_step),
    "heun step": partial(stepped, ode.heun_step),
    "reference": partial(stepped, ode.reference_solution),
    "trajectory": lambda path, times: ode.trajectory(partial(denoise, path), path, X, times),
    **{f"solve by {name}": partial(solved, name) for name in ("euler", "heun", "dpm-solver++")},
    **{f"teacher on {name}": partial(on_another, other) for name, other in PATHS.items()},
    **{f.__name__: partial(sampled, f) for f in (map_sampler, euler_sampler, heun_sampler)},
    "gamma sampler": partial(sampled, gamma_sampler(0.5)),
}


@every_path
@pytest.mark.parametrize("name", FUNCTIONS)
def test_narrow_times_are_taken_in_float64(name: str, path: Path) -> None:
    """What comes back is what the same times give in float64, and finite, from end to end of the clock."""
    exact = path.time_from_unit(torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=F64)).float().double()
    exact[0], exact[-1] = path.t_max, path.t_min
    found, expected = FUNCTIONS[name](path, exact.float()), FUNCTIONS[name](path, exact)
    rounding = 1e-6 if name == "preconditioning" else 0.0  # some know no path, and so no ends
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)
    for value in found if isinstance(found, (tuple, list)) else [found]:
        assert bool(value.isfinite().all())


@every_path
def test_alpha_is_never_negative(path: Path) -> None:
    """Nor is sigma above the noise end of the clock: rounding errors of a time lose no sign."""
    ends = torch.tensor([path.t_min, path.t_max], dtype=F64)
    above = torch.nextafter(ends.float(), torch.tensor(torch.inf))
    for times in (ends, ends.float(), ends.bfloat16(), ends * (1 + 1e-6), above):
        values = path.values(times)
        assert bool((values.alpha >= 0).all())
        assert bool((values.sigma >= 0).all())


@every_path
def test_a_derivative_passes_through_the_end_of_a_clock(path: Path) -> None:
    t = torch.tensor([path.t_max])
    values, tangents = torch.func.jvp(path.values, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(tangents.sigma, values.d_sigma, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tangents.alpha, values.d_alpha, rtol=1e-12, atol=1e-12)


@every_path
def test_whole_numbers_are_times(path: Path) -> None:
    one = torch.tensor([1])
    torch.testing.assert_close(path.values(one), path.values(one.double()), rtol=0, atol=0)


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
def test_every_noise_level_has_a_time(path: Path, dtype: torch.dtype) -> None:
    """From none to infinity, in order: at least t_max where the path has no such level."""
    ends = path.tau(torch.tensor([path.t_min, path.t_max], dtype=F64))
    levels = torch.tensor([0.0, *ends.tolist(), torch.inf]).to(dtype)
    times = path.time_from_tau(levels)
    assert times.dtype == F64
    assert bool((times.diff() >= 0).all())
    assert float(times[0]) <= path.t_min
    assert float(times[-1]) >= path.t_max
