"""Consistency training, maps to s = t_min alone (math.md sections 4 and 5.2): CT and ECT compare adjacent points."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import Path
from fewstep.flow.times import LogNormalTimes, TimeDistribution, edm_grid
from fewstep.objectives.base import ALONE, STREAM_T, Batch, Companions, Losses
from fewstep.objectives.losses import Comparison, Distance, DistanceObjective
from fewstep.utils.errors import ConfigError
from fewstep.utils.tensors import check_least, check_positive


@dataclass(frozen=True, kw_only=True)
class AdjacentObjective(DistanceObjective):
    """d( X(x_t, t, t_min), sg X(x_u, u, t_min) ) / (t - u), x_t and x_u of the same image and noise; 0 where t = u."""

    times: TimeDistribution = LogNormalTimes(-1.1, 2.0)
    target_decay: float | None = None
    """Decay per step, in [0, 1), of the slow average that gives the target; None is the model itself (iCT, ECT)."""
    distance: Distance = Distance("pseudo-huber")

    endpoint_only = True
    needs_velocity: ClassVar[bool] = False

    @abstractmethod
    def neighbours(self, path: Path, batch: Batch) -> tuple[Tensor, Tensor]:
        """(t, u), u <= t as near as this moment of training says; equal at t_min alone; (B,) float64."""

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        target = flow_map if self.target_decay is None else companions.ema_target
        t, u = self.neighbours(flow_map.path, batch)
        flow_map.preconditioning.check_end(flow_map.path)
        path, eps = flow_map.path, batch.noise()
        s, cond = torch.full_like(t, path.t_min), self.condition(flow_map, batch, t)
        x, x_u = path.interpolate(batch.x0, eps, t), path.interpolate(batch.x0, eps, u)
        devices = [x.device] if x.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):  # both evaluations see the same dropout
            goal = target.jump(x_u, u, s, cond)
        reached = flow_map.jump(x, t, s, cond)
        error = self.distance(batch, reached, goal, companions)
        weight = torch.where(t > u, 1 / torch.where(t > u, t - u, 1.0), 0.0).to(error.dtype)
        logs = Comparison(reached - goal, reached).sizes() | {"consistency": error.detach()}
        return Losses(weight * error, t, s, logs)


@final
@dataclass(frozen=True, kw_only=True)
class CT(AdjacentObjective):
    """Consistency training: d( X(x_t, t, t_min), sg X(x_u, u, t_min) ) / (t - u), t and u neighbours on EDM's grid.

    t is the grid's first time above a draw of `times`. The grid's cells double from `first` to `last` over `duration`
    images seen.

    Source: 2303.01469, iCT 2310.14189.
    Deviations: times are drawn continuously and rounded up to the grid, where iCT draws a grid point by the same law.
    """

    first: int = 10
    """Cells of the grid when training begins, at least 1; 10 in iCT."""
    last: int = 1280
    """Cells of the grid in the end, at least `first`; 1280 in iCT."""
    duration: int = 1_000_000
    """Images seen over which the grid grows from `first` to `last`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(first=self.first, duration=self.duration)
        if self.last < self.first:
            raise ConfigError(f"the grid grows from {self.first} cells to {self.last}: last must be at least first")

    def neighbours(self, path: Path, batch: Batch) -> tuple[Tensor, Tensor]:
        cells = self.cells(batch.images)
        rising = edm_grid(path, cells).flip(0).to(batch.x0.device, non_blocking=True)
        drawn = self.times.quantile(path, batch.draws.uniform(STREAM_T))
        n = torch.searchsorted(rising, drawn, right=True).clamp(1, cells)
        return rising[n], rising[n - 1]

    def cells(self, images: int) -> int:
        """Cells of the grid, min(first 2^k, last) with k = floor(images / (duration / (log2 floor(last / first) + 1))).

        The stages are equally long, but for a shorter last one where the logarithm is not whole.
        """
        stages = math.log2(self.last // self.first) + 1
        return min(self.first << math.floor(min(images * stages / self.duration, stages) + 1e-9), self.last)


@final
@dataclass(frozen=True, kw_only=True)
class ECT(AdjacentObjective):
    """Easy consistency tuning: d( X(x_t, t, t_min), sg X(x_u, u, t_min) ) / (t - u), u = t (1 - n(t)/q^a).

    n(t) = 1 + k sigmoid(-b t), both at the noise levels tau, u held above t_min. a = 1, 2, ... `stages` grows by one
    every `stage_images` images seen; from a diffusion model's weights (a = 0 would be one) training is a fine-tuning.

    Source: 2406.14548.
    Deviations: none but pseudo-huber divided by the root of the dimension.
    """

    q: int = 2
    """Base of the stages, at least 2: with each the gap between t and u shrinks to 1/q."""
    stage_images: int = 125_000
    """Images seen in one stage."""
    stages: int = 8
    """Stages in all; the last one goes on to the end."""
    k: float = 8.0
    """How much wider the gap is at low noise, at least 0; 8 in the paper."""
    b: float = 1.0
    """How soon that fades as noise grows, at least 0; 1 in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(stage_images=self.stage_images, stages=self.stages)
        check_least(0, k=self.k, b=self.b)
        if self.q < 2:
            raise ConfigError(f"q is {self.q}; it must be at least 2")

    def neighbours(self, path: Path, batch: Batch) -> tuple[Tensor, Tensor]:
        t = self.times.quantile(path, batch.draws.uniform(STREAM_T))
        tau = path.tau(t)
        return t, path.time_from_tau(tau * self.ratio(tau, batch.images)).clamp(min=path.t_min)

    def ratio(self, tau: Tensor, images: int) -> Tensor:
        """tau_u/tau_t = 1 - n(tau)/q^a, at least 0, a = 1 + floor(images / stage_images), at most `stages`; (B,)."""
        a = min(1 + images // self.stage_images, self.stages)
        ratio: Tensor = 1 - (1 + self.k * torch.sigmoid(-self.b * tau)) / self.q**a
        return ratio.clamp(min=0)
