"""Distillation from a diffusion teacher (math.md section 4): its walk along a grid, and consistency distillation.

The teacher's ODE carries x_t down to x_u; the student's jump from t must end where its slow average, started at x_u,
ends.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import NoGuidance, TrainingGuidance, guided_denoiser
from fewstep.flow.ode import Denoiser, SolverName, solve
from fewstep.flow.paths import Path
from fewstep.flow.times import edm_grid
from fewstep.networks.condition import Condition
from fewstep.objectives.base import ALONE, STREAM_S, STREAM_T, STREAM_U, Batch, Companions, Losses
from fewstep.objectives.losses import DistanceObjective
from fewstep.teachers import denoiser_on
from fewstep.utils.errors import ConfigError
from fewstep.utils.serialization import later, later_value
from fewstep.utils.tensors import check_choice, rows_where

_MOST_POINTS = 10**6
_STEEPEST = 10


@final
@dataclass(frozen=True)
class TeacherSteps:
    """The teacher's grid and its walk: t = t_n, n uniform over the grid of `points` noise levels (EDM, rho = 7).

    `draws` published, as CTM's published code has it: first h, the cells of the walk, with odds h, at most `longest`;
    then t among the points that have h cells below them, u = h cells on, and s from u on, each uniform. h is two thirds
    of the longest on average, and t lies nearer the noise end. That code draws h once for a whole batch. With
    `odds_power` p a walk of h cells has odds h^p: 0 makes all lengths as likely, so that more jumps are short.
    """

    points: int = 18
    """Noise levels of the grid, at least 2; 18 in CTM at 32 x 32."""
    solver: SolverName = "heun"
    """The teacher's solver, one step a cell: euler and dpm-solver++ call it once a step, heun twice."""
    u: Literal["drawn", "adjacent"] = "drawn"
    """The grid point where the teacher stops: drawn between s and t (CTM), or the next one below t (CD)."""
    longest: int = 0
    """Most grid cells between t and u; 0 for no limit."""
    draws: Literal["uniform", "published"] = later(lambda: "uniform")
    """How t, u and s are drawn: t, s and u in turn, each uniform, or the length of the walk first."""
    odds_power: float = later(lambda: 1.0)
    """Of published draws: a walk of h cells has odds h^odds_power; 1 in CTM's published code."""

    def __post_init__(self) -> None:
        if not 2 <= self.points <= _MOST_POINTS or self.longest < 0:
            raise ConfigError(
                f"a teacher's grid needs at least 2 points, {_MOST_POINTS} at most, and longest of at least 0: {self}"
            )
        check_choice("draws", self.draws, ("uniform", "published"))
        if self.draws == "published" and self.u == "adjacent":
            raise ConfigError(
                "published draws are of walks of many cells: set --objective.steps.draws uniform with u adjacent"
            )
        if not abs(self.odds_power) <= _STEEPEST:
            raise ConfigError(f"odds_power lies between -{_STEEPEST} and {_STEEPEST}; it is {self.odds_power}")
        if self.odds_power != 1 and self.draws != "published":
            raise ConfigError("odds_power is of published draws: set --objective.steps.draws published with it")

    @property
    def evaluations(self) -> int:
        """Of the teacher for a sample, at most: all of a batch walk as long as the one with the longest way."""
        cells = min(self.longest or self.points - 1, self.points - 1)
        return cells * (2 if self.solver == "heun" else 1)

    def draw(self, batch: Batch, endpoint_only: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Grid indices n < k <= j of t, u and s, (B,) int64; j is the last where every jump goes to the data end."""
        last = self.points - 1
        if self.draws == "published":
            return self._published(batch, endpoint_only)
        n = batch.draws.integers(STREAM_T, last)
        spread = (batch.draws.uniform(STREAM_S) * (last - n)).long().clamp(max=last - 1)
        j = torch.full_like(n, last) if endpoint_only else n + 1 + torch.minimum(spread, last - 1 - n)
        if self.u == "adjacent":
            return n, n + 1, j
        reach = j - n if self.longest == 0 else (j - n).clamp(max=self.longest)
        k = n + 1 + torch.minimum((batch.draws.uniform(STREAM_U) * reach).long(), reach - 1)
        return n, k, j

    def _published(self, batch: Batch, endpoint_only: bool) -> tuple[Tensor, Tensor, Tensor]:
        last = self.points - 1
        device = batch.draws.indices.device
        lengths = torch.arange(1, min(self.longest or last, last) + 1, device=device)
        odds = (lengths.double() ** self.odds_power).cumsum(0)
        h = 1 + torch.searchsorted(odds / odds[-1], batch.draws.uniform(STREAM_U).double(), right=True)
        h = h.clamp(max=len(odds))
        n = (batch.draws.uniform(STREAM_T) * (last - h + 1)).long().minimum(last - h)
        k = n + h
        j = k + (batch.draws.uniform(STREAM_S) * (last - k + 1)).long().minimum(last - k)
        return n, k, torch.full_like(n, last) if endpoint_only else j

    def times(self, path: Path, batch: Batch, endpoint_only: bool) -> "Walk":
        """The draws of a batch and their times, by its random numbers on the host."""
        n, k, j = self.draw(batch.on_host(), endpoint_only)
        grid = edm_grid(path, self.points - 1)
        t, u, s = (grid[each].to(batch.x0.device, non_blocking=True) for each in (n, k, j))
        return Walk(n, k, j, t, u, s)

    def walk(self, flow_map: FlowMap, x: Tensor, n: Tensor, k: Tensor, cond: Condition, teacher: FlowMap) -> Tensor:
        """x_u: the teacher's solution at grid point k from x at grid point n; without gradient. n, k: on the host.

        cond: with the strength and interval by which the teacher is guided, if it is (`Objective.teacher_condition`).
        """
        cells = torch.arange(int((k - n).numpy().max()) + 1)
        times = edm_grid(flow_map.path, self.points - 1)[torch.minimum(n[:, None] + cells, k[:, None])]
        with torch.no_grad():
            return solve(teacher_denoiser(flow_map.path, teacher), flow_map.path, x, times, self.solver, cond)


class Walk(NamedTuple):
    """Grid indices n < k <= j (B,) int64, on the host, and their times t, u, s (B,) float64, where the samples are."""

    n: Tensor
    k: Tensor
    j: Tensor
    t: Tensor
    u: Tensor
    s: Tensor


def teacher_denoiser(path: Path, teacher: FlowMap) -> Denoiser:
    """The teacher's denoiser on a path, guided as the condition says: by its own input, or from its own without label
    and prompt."""
    denoise = denoiser_on(path, teacher)
    return denoise if teacher.takes_guidance else guided_denoiser(path, denoise, waiting=False)


@dataclass(frozen=True, kw_only=True)
class GuidedDistillation(DistanceObjective):
    """Compares jumps with those from where a teacher, guided or not, arrives."""

    guidance: TrainingGuidance = later_value(NoGuidance())
    """How the teacher is guided: fixed, which the student has distilled in, or drawn, which it takes as an input."""


@final
@dataclass(frozen=True, kw_only=True)
class CD(GuidedDistillation):
    """Consistency distillation: d( X(x_t, t, t_min), sg X_ema(x_u, u, t_min) ), u adjacent to t.

    Source: 2303.01469.
    Deviations: none; the paper's distance is of LPIPS features.
    """

    steps: TeacherSteps = TeacherSteps(u="adjacent")
    target_decay: float = 0.95
    """Decay per step, in [0, 1), of the slow average that gives the target."""

    def method(self, preconditioning: str, labelled: bool) -> str:
        return f"CD, {preconditioning}"

    endpoint_only = True
    needs_velocity: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        target = companions.ema_target
        n, k, j, t, u, s = self.steps.times(flow_map.path, batch, endpoint_only=True)
        cond = self.condition(flow_map, batch, t)
        x = flow_map.path.interpolate(batch.x0, batch.noise(), t)
        x_u = self.steps.walk(flow_map, x, n, k, self.teacher_condition(batch, cond), companions.teacher)
        with torch.no_grad():
            goal = jump_where_apart(target, x_u, (u, s), cond, k < j)
        error = self.distance(batch, flow_map.jump(x, t, s, cond), goal, companions)
        return Losses(error, t, s, {"consistency": error.detach()})


def jump_where_apart(model: FlowMap, x: Tensor, times: tuple[Tensor, Tensor], cond: Condition, apart: Tensor) -> Tensor:
    """X(x, t, s), times = (t, s), evaluated for the samples with s < t alone: the others stay where they are.

    apart: (B,) bool on the host, which these are.
    """
    (t, s), rows = times, rows_where(apart, x.device)
    if len(rows) == len(x):
        return model.jump(x, t, s, cond)
    if len(rows) == 0:
        return x
    return x.index_copy(0, rows, model.jump(x[rows], t[rows], s[rows], cond[rows]).to(x.dtype))
