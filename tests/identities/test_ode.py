"""Solvers of a teacher: measured order against declared, exact cost, and times per sample."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.flow.closed_form import GaussianData, MixtureData
from fewstep.flow.flow_map import FlowMap, at
from fewstep.flow.ode import Denoiser, SolverName, euler_step, reference_solution, solve, trajectory
from fewstep.flow.paths import EDM, Linear, Path
from fewstep.flow.preconditioning.jumps import EulerPreconditioning, LinearPreconditioning
from fewstep.flow.times import edm_grid, uniform_grid
from fewstep.networks.condition import Condition
from fewstep.teachers import denoiser_on
from fewstep.utils.errors import ShapeError
from tests.support.cases import F64, PATHS, clock, close, gaussian, mixture, noise, slope

ORDERS: dict[SolverName, int] = {"euler": 1, "heun": 2, "dpm-solver++": 2}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
every_solver = pytest.mark.parametrize("solver", ORDERS)
CASES = {"gaussian": gaussian(), "mixture": mixture()}


def denoiser(data: GaussianData | MixtureData, path: Path) -> Denoiser:
    return lambda x, t, cond: data.denoise(path, x, t)


class Counting:
    """A denoiser that remembers the batches it was asked for."""

    def __init__(self, denoise: Denoiser) -> None:
        self.denoise = denoise
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.batches.append(len(x))
        return self.denoise(x, t, cond)


def starts(path: Path, t: Tensor, count: int = 6) -> Tensor:
    """Points (count, 2) of a wide cloud at time t (1,) or (count,)."""
    return path.interpolate(noise(count, 2), noise(count, 2, seed=1), t.expand(count))


@cache
def solution(case: str, path: Path, high: float, low: float) -> Tensor:
    """The exact jump of a case from its starts, a mixture's to 1e-7."""
    x = starts(path, torch.tensor([high], dtype=F64))
    data, ends = CASES[case], (at(high, x), at(low, x))
    return data.jump(path, x, *ends, 100) if isinstance(data, MixtureData) else data.jump(path, x, *ends)


def ladder(path: Path, high: Tensor, low: Tensor, steps: int) -> Tensor:
    """(1, steps + 1) times, even in tau^(1/7)."""
    share = torch.linspace(0, 1, steps + 1, dtype=F64)
    ends = [path.tau(time) ** (1 / 7) for time in (high, low)]
    times = path.time_from_tau((ends[0] + share * (ends[1] - ends[0])) ** 7)[None]
    times[:, 0], times[:, -1] = high, low
    return times


@every_path
@every_solver
@pytest.mark.parametrize("case", CASES)
def test_measured_order_is_the_declared(path: Path, solver: SolverName, case: str) -> None:
    data = CASES[case]
    low, high = clock(path, 0.35, 0.85) if path == PATHS["edm"] else clock(path, 0.15, 0.8)
    x = starts(path, high)
    exact = solution(case, path, high.item(), low.item())
    sizes, errors = (64, 128), []
    for n in sizes:
        got = solve(denoiser(data, path), path, x, ladder(path, high, low, n).expand(6, -1), solver)
        errors.append(float((got - exact).square().mean().sqrt()))
    assert slope([1 / n for n in sizes], errors) == pytest.approx(ORDERS[solver], abs=0.2)


@every_path
@pytest.mark.parametrize("solver", ["heun", "dpm-solver++"])
def test_the_whole_range_is_solved_beyond_first_order(path: Path, solver: SolverName) -> None:
    """From pure noise, and down to the data where the path has any: Euler's steps there cost no accuracy."""
    data, high = gaussian(), at(path.t_max, torch.zeros(6))
    x = starts(path, high)
    exact = data.jump(path, x, high, at(path.t_min, x))
    grid = edm_grid if path == PATHS["edm"] else uniform_grid
    coarse, fine = (solve(denoiser(data, path), path, x, grid(path, n), solver) - exact for n in (96, 384))
    assert float(fine.norm()) < min(1e-3, float(coarse.norm()) / 6)


@every_path
@given(times=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2, unique=True))
def test_eulers_step_is_the_jump_of_its_preconditioning(path: Path, times: list[float]) -> None:
    data, (s, t) = mixture(), (time.expand(6) for time in clock(path, *sorted(times)))
    x = starts(path, t)
    flow_map = FlowMap(path, EulerPreconditioning(path), torch.nn.Identity())
    stepped = euler_step(denoiser(data, path), path, x, t, s)
    close(stepped, flow_map.apply_jump(x, data.denoise(path, x, t), t, s))


@every_path
@every_solver
def test_a_constant_denoiser_is_solved_exactly_in_one_step(path: Path, solver: SolverName) -> None:
    t, s = (time.expand(6) for time in clock(path, 0.9, 0.2))
    x0, eps = torch.full((6, 2), 0.3, dtype=F64), noise(6, 2)
    times = torch.stack([t, s], 1)
    got = solve(lambda x, t, cond: x0, path, path.interpolate(x0, eps, t), times, solver)
    close(got, path.interpolate(x0, eps, s))


@every_path
@every_solver
@settings(max_examples=10)
@given(rows=st.lists(st.lists(st.integers(0, 6), min_size=4, max_size=4).map(sorted), min_size=1, max_size=5))
def test_samples_walk_alone(path: Path, solver: SolverName, rows: list[list[int]]) -> None:
    """A batch with times per sample equals solves one by one; what rests is not evaluated."""
    data, grid = mixture(), edm_grid(path, 6)
    times = grid[torch.tensor(rows)]
    x = starts(path, times[:, 0], len(rows))
    together = Counting(denoiser(data, path))
    states = solve(together, path, x, times, solver)
    evaluated = 0
    for i, row in enumerate(rows):
        alone = Counting(denoiser(data, path))
        moves = grid[torch.tensor(sorted(set(row)))]
        close(states[i : i + 1], solve(alone, path, x[i : i + 1], moves, solver))
        assert sum(alone.batches) == evaluations(path, moves, solver)
        evaluated += sum(alone.batches)
    assert sum(together.batches) == evaluated


def evaluations(path: Path, times: Tensor, solver: SolverName) -> int:
    """The documented cost of one sample."""
    steps = len(times) - 1
    if solver != "heun":
        return steps
    from_noise, to_data = float(path.tau(times)[0]) > 1e6, float(path.tau(times)[-1]) == 0
    single = [i for i in range(steps) if (i == 0 and from_noise) or (i == steps - 1 and to_data)]
    return 2 * steps - len(single)


def test_a_batch_at_rest_costs_nothing() -> None:
    path, x = Linear(), noise(3, 2)
    counting = Counting(denoiser(gaussian(), path))
    rest = torch.full((3, 4), 0.5, dtype=F64)
    assert torch.equal(solve(counting, path, x, rest, "heun"), x)
    assert torch.equal(solve(counting, path, x, rest[:, :1], "euler"), x)
    assert counting.batches == []


def test_resting_samples_keep_their_labels_to_themselves() -> None:
    """Each sample's own condition reaches the denoiser, whoever else moves."""
    path, x, labels = Linear(), noise(3, 2), torch.tensor([4, 7, 9])
    seen: list[list[int]] = []

    def denoise(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert cond.labels is not None
        seen.append(cond.labels.tolist())
        return torch.zeros_like(x)

    times = torch.tensor([[0.9, 0.9, 0.3], [0.9, 0.5, 0.5], [0.8, 0.6, 0.0]], dtype=F64)
    solve(denoise, path, x, times, "heun", Condition(labels))
    assert seen == [[7, 9], [7, 9], [4, 9], [4]]


@every_path
@settings(max_examples=8)
@given(units=st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_the_reference_is_the_exact_flow_between_any_times(path: Path, units: list[float]) -> None:
    data = gaussian()
    drawn = path.time_from_unit(torch.tensor(units, dtype=F64)).reshape(2, 4)
    t, s = drawn.amax(0), drawn.amin(0)
    x = starts(path, t, 4)
    close(reference_solution(denoiser(data, path), path, x, t, s), data.jump(path, x, t, s), rtol=1e-4, atol=1e-4)


@every_path
def test_the_whole_range_in_single_precision(path: Path) -> None:
    data = GaussianData(torch.tensor(0.4), 0.7)
    x = starts(path, at(path.t_max, torch.zeros(6))).float()
    t, s = at(path.t_max, x), at(path.t_min, x)
    got = reference_solution(denoiser(data, path), path, x, t, s)
    assert got.dtype == torch.float32
    close(got, data.jump(path, x, t, s), rtol=1e-4, atol=1e-4)


@every_path
def test_a_trajectory_holds_the_solution_at_every_time(path: Path) -> None:
    data, grid = gaussian(), edm_grid(path, 5)
    x = starts(path, at(path.t_max, torch.zeros(6)))
    states = trajectory(denoiser(data, path), path, x, grid, steps=16)
    assert states.shape == (6, 6, 2)
    assert torch.equal(states[0], x)
    for time, state in zip(grid, states, strict=True):
        close(state, data.jump(path, x, at(path.t_max, x), at(float(time), x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own", PATHS.values(), ids=PATHS.keys())
@every_path
def test_a_teacher_travels_to_another_path(path: Path, own: Path) -> None:
    """Inside its own range it is the same denoiser; beyond, the one at the nearest level."""
    data = gaussian()
    teacher = data.flow_map(own, LinearPreconditioning())
    tau = torch.tensor([0.05, 0.3, 1.0, 5.0, 40.0], dtype=F64)
    t = path.time_from_tau(tau)
    x = starts(path, t, 5)
    close(denoiser_on(path, teacher)(x, t, Condition()), data.denoise(path, x, t), rtol=1e-7)
    ends = torch.tensor([path.t_max, path.t_min], dtype=F64)
    x = starts(path, ends, 2)
    close(denoiser_on(path, teacher)(x, ends, Condition()), data.denoise(path, x, ends), rtol=0.05, atol=0.05)


def test_a_network_as_teacher_is_solved_in_its_own_coordinates() -> None:
    data, path = gaussian(), EDM()
    teacher = data.flow_map(Linear(), LinearPreconditioning())
    t, s = at(60.0, torch.zeros(5)), at(0.1, torch.zeros(5))
    x = starts(path, t, 5)
    solved = reference_solution(denoiser_on(path, teacher), path, x, t, s)
    close(solved, data.jump(path, x, t, s), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "times", [torch.tensor([0.2, 0.5]), torch.zeros(2, 3), torch.tensor(0.5), torch.tensor([0.5, float("nan")])]
)
def test_times_that_rise_or_do_not_fit_are_refused(times: Tensor) -> None:
    with pytest.raises(ShapeError):
        solve(denoiser(gaussian(), Linear()), Linear(), noise(3, 2), times, "euler")
    with pytest.raises(ShapeError, match="at least 1"):
        reference_solution(
            denoiser(gaussian(), Linear()), Linear(), noise(1, 2), at(0.5, noise(1)), at(0.1, noise(1)), 0
        )
