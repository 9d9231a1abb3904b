"""Alignment: how far a student's jumps end from the solution of its teacher's ODE (math.md §4).

Errors are root mean squares per element, in the student's coordinates at the time where the jump ends.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.flow.flow_map import at
from fewstep.flow.ode import Denoiser, reference_solution, trajectory
from fewstep.flow.paths import Path
from fewstep.flow.times import check_grid
from fewstep.networks.condition import Condition
from fewstep.sampling.generate import evaluating
from fewstep.teachers import Teacher, denoiser_on
from fewstep.utils.errors import ShapeError
from fewstep.utils.random import Draws
from fewstep.utils.tensors import per_sample_mean

STREAM_START = 2000
_UNCONDITIONAL = Condition()
_MEASURED = (1e-4, 1e3)  # noise levels beyond which a solution is a single step, whatever its length in log tau


class Student(Protocol):
    """What jumps: a flow map, or one wrapped in guidance."""

    path: Path

    def jump(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor: ...


@dataclass(frozen=True)
class Alignment:
    """Errors of the jumps between all pairs of K times.

    method: the student, as figures show it. times: falling, (K,). rmse: (K, K) float64, rmse[i, j] of the jumps from
    times[i] to times[j] for i < j, NaN elsewhere; stderr: their standard errors over samples. samples: how many jumps
    for each pair. seed: of the noise. teacher_steps: Runge-Kutta steps of the truth between two times.
    """

    method: str
    times: tuple[float, ...]
    rmse: Tensor
    stderr: Tensor
    samples: int
    seed: int
    teacher_steps: int

    def at(self, t: float, s: float) -> float:
        """The error from t to s. Raises ShapeError unless both are on the grid and s < t."""
        if t not in self.times or s not in self.times or not s < t:
            raise ShapeError(f"no jump from {t} to {s} was measured: the times are {', '.join(map(str, self.times))}")
        return float(self.rmse[self.times.index(t), self.times.index(s)])

    def row(self) -> dict[str, Any]:
        """The fields in order, ready for JSON: matrices as rows, None where there is no jump."""
        return asdict(self) | {"times": list(self.times), "rmse": _rows(self.rmse), "stderr": _rows(self.stderr)}


@dataclass(frozen=True)
class TrajectoryAlignment:
    """Error of a student's samples in k steps against the teacher's ODE from the same noise.

    method: the student, as figures show it. steps: k. times: falling, (k + 1,). rmse: of the samples at the last time;
    stderr: its standard error. stops, stops_stderr: the same after each of the k steps, where the student stops on its
    way, against the teacher's solution at that time; the last is the samples'. samples: how many. teacher_steps:
    Runge-Kutta steps of the truth.
    """

    method: str
    steps: int
    times: tuple[float, ...]
    rmse: float
    stderr: float
    samples: int
    teacher_steps: int
    stops: tuple[float, ...]
    stops_stderr: tuple[float, ...]

    def row(self) -> dict[str, Any]:
        """The fields in order, ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class AlignmentSettings:
    """How alignment is measured.

    seed: of the noise. teacher_steps: Runge-Kutta steps of the truth between two times. batch_size: samples at once.
    ends_only: measure the jumps to the last time alone, of a student that learns no others.
    """

    seed: int = 0
    teacher_steps: int = 4
    batch_size: int = 512
    ends_only: bool = False


@torch.no_grad()
def alignment(
    student: Student,
    teacher: Teacher,
    x0: Tensor,
    times: Tensor,
    *,
    method: str,
    cond: Condition = _UNCONDITIONAL,
    settings: AlignmentSettings = AlignmentSettings(),
) -> Alignment:
    """Errors of the student's jumps between all pairs of times t > s, from x_t = alpha x0 + sigma eps at every t.

    x0: real samples (n, ...), n at least 2, on the models' device; cond: theirs. times: (K,) falling, in the student's
    clock. The teacher may live on another path. Each x_t is carried down all later times by one trajectory of the
    teacher, about 2 K (K - 1) teacher_steps evaluations for each sample, which the student's K (K - 1) / 2 are compared
    with. The noise of sample k is a function of (seed, t's place, k). Raises ShapeError on times or counts that do
    not fit.
    """
    times = check_grid(student.path, times.to(x0.device))
    _check_counts(x0, settings.batch_size)
    parts = []
    with _at_rest(student, teacher):
        for rows in torch.arange(len(x0), device=x0.device).split(settings.batch_size):
            parts.append(_squared_errors(student, teacher, x0[rows], times, cond[rows], rows, settings))
    rmse, stderr = _root_mean(torch.cat(parts, dim=2))
    return Alignment(method, tuple(times.tolist()), rmse, stderr, len(x0), settings.seed, settings.teacher_steps)


@torch.no_grad()
def trajectory_alignment(
    student: Student,
    teacher: Teacher,
    eps: Tensor,
    grids: Sequence[Tensor],
    *,
    method: str,
    cond: Condition = _UNCONDITIONAL,
    teacher_steps: int = 64,
    batch_size: int = 512,
) -> tuple[TrajectoryAlignment, ...]:
    """Errors of the student's samples by each of `grids`, and of their stops on the way, against the teacher's solution
    from the same noise.

    eps: standard normal (n, ...), n at least 2, on the models' device; x = sigma eps at the first time. grids: each
    (k + 1,) falling, all from the same first to the same last time. One result for each. teacher_steps: of the truth,
    spread over the intervals between the stops of all grids by their length in log tau. Raises ShapeError on grids or
    counts that do not fit.
    """
    _check_counts(eps, batch_size)
    grids = [check_grid(student.path, grid.to(eps.device)) for grid in grids]
    if len({(float(grid[0]), float(grid[-1])) for grid in grids}) != 1:
        raise ShapeError("give one or more grids of times that share their first and last time")
    errors: list[list[Tensor]] = [[] for _ in grids]
    denoise, times = denoiser_on(student.path, teacher), torch.unique(torch.cat(grids)).flip(0)
    with _at_rest(student, teacher):
        for part in torch.arange(len(eps), device=eps.device).split(batch_size):
            own, sigma = cond[part], student.path.values(at(float(times[0]), eps[part])).over(eps[part]).sigma
            truth = _solutions(denoise, student.path, sigma * eps[part], times, teacher_steps, own)
            for found, grid in zip(errors, grids, strict=True):
                found.append(_errors_on_the_way(student, sigma * eps[part], grid, own, truth))
    results = []
    for found, grid in zip(errors, grids, strict=True):
        rmse, stderr = (tuple(values.tolist()) for values in _root_mean(torch.cat(found, dim=1)))
        ends = (len(grid) - 1, tuple(grid.tolist()), rmse[-1], stderr[-1], len(eps), teacher_steps)
        results.append(TrajectoryAlignment(method, *ends, rmse, stderr))
    return tuple(results)


def rmse(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of (B, ...) - (B, ...) per element."""
    return float(_root_mean(_squared(actual, expected))[0])


def _squared_errors(
    student: Student,
    teacher: Teacher,
    x0: Tensor,
    times: Tensor,
    cond: Condition,
    indices: Tensor,
    settings: AlignmentSettings,
) -> Tensor:
    """Mean squared error of every sample's jumps, (K, K, B) float64 on the CPU; NaN where none is measured."""
    path, denoise = student.path, denoiser_on(student.path, teacher)
    draws = Draws(settings.seed, 0, indices)
    errors = torch.full((len(times), len(times), len(x0)), torch.nan, dtype=torch.float64)
    for i, t in enumerate(times.tolist()[:-1]):
        eps = draws.normal(STREAM_START + i, tuple(x0.shape[1:]), x0.dtype)
        x = path.interpolate(x0, eps, at(t, x0))
        states = trajectory(denoise, path, x, times[i:], settings.teacher_steps, cond)
        for j, s in enumerate(times.tolist()[i + 1 :], start=1):
            if settings.ends_only and i + j < len(times) - 1:
                continue
            errors[i, i + j] = _squared(student.jump(x, at(t, x), at(s, x), cond), states[j])
    return errors


def _solutions(
    denoise: Denoiser, path: Path, x: Tensor, times: Tensor, steps: int, cond: Condition
) -> dict[float, Tensor]:
    """The teacher's solution at each of `times`, from x at the first; about `steps` steps in all."""
    if steps < 1:
        raise ShapeError(f"{steps} steps of the teacher asked for: give at least 1")
    lengths = -torch.log(path.tau(times).clamp(*_MEASURED)).diff()
    counts = (steps * lengths / lengths.sum()).ceil().int().clamp(min=1).tolist()
    found, ends = {float(times[0]): x}, times.tolist()
    for t, s, count in zip(ends[:-1], ends[1:], counts, strict=True):
        x = reference_solution(denoise, path, x, at(t, x), at(s, x), count, cond)
        found[s] = x
    return found


def _errors_on_the_way(
    student: Student, x: Tensor, grid: Tensor, cond: Condition, truth: dict[float, Tensor]
) -> Tensor:
    """Mean squared error of every sample after each step along `grid`, (k, B) float64 on the CPU."""
    errors = []
    for t, s in pairwise(grid.tolist()):
        x = student.jump(x, at(t, x), at(s, x), cond)
        errors.append(_squared(x, truth[s]))
    return torch.stack(errors)


def _squared(actual: Tensor, expected: Tensor) -> Tensor:
    """Mean squared difference per sample, (B,) float64 on the CPU."""
    return per_sample_mean((actual.double() - expected.double()).square()).cpu()


def _root_mean(squared: Tensor) -> tuple[Tensor, Tensor]:
    """Root of the mean over the last dimension and its standard error, that of the mean divided by twice the root."""
    root = squared.mean(-1).sqrt()
    error = squared.std(-1) / squared.shape[-1] ** 0.5
    return root, torch.where(root == 0, 0.0, error / (2 * root))


def _rows(matrix: Tensor) -> list[list[float | None]]:
    return [[None if value != value else value for value in row] for row in matrix.tolist()]


def _check_counts(samples: Tensor, batch_size: int) -> None:
    if len(samples) < 2 or batch_size < 1:
        raise ShapeError(f"{len(samples)} samples in batches of {batch_size}: give at least 2 in batches of at least 1")


@contextmanager
def _at_rest(*models: object) -> Iterator[None]:
    """Evaluation mode (no dropout) inside for those models that are modules."""
    with ExitStack() as stack:
        for model in models:
            if isinstance(model, nn.Module):
                stack.enter_context(evaluating(model))
        yield
