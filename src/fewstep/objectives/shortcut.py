"""Shortcut models (2410.12557): one jump of 2 d against two of d."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import Path
from fewstep.flow.times import TimeDistribution, UniformTimes
from fewstep.networks.condition import Condition
from fewstep.objectives.base import ALONE, STREAM_S, STREAM_T, Batch, Companions, Losses
from fewstep.objectives.losses import Comparison
from fewstep.objectives.pairs import AnchoredObjective
from fewstep.objectives.self_distillation import semigroup
from fewstep.utils.errors import ConfigError
from fewstep.utils.tensors import check_share

STREAM_SIZE = 16


@final
@dataclass(frozen=True, kw_only=True)
class Shortcut(AnchoredObjective):
    """|X(x_t, t, s) - sg X(X(x_t, t, u), u, s)|^2/(t - s)^2, t - u = u - s = d, d = 1/2, 1/4, ... 1/steps of the clock.

    This is of the share `bootstrap` of the batch, with t a multiple of 2 d and every d equally often; the rest is flow
    matching, |v(x_t, t) - v*|^2 at `times`, v* as in iSD. The short jumps of the smallest size are taken with N of the
    diagonal, which the data teach: nothing else does.

    Source: 2410.12557.
    Deviations: for any path and preconditioning; w of `weighting`, 1 by default, is not of the paper.
    """

    steps: int = 128
    """Jumps of the smallest size that make up the clock: a power of 2, at least 2; 128 in the paper."""
    bootstrap: float = 0.25
    """Share of the batch in [0, 1) that compares jumps; the rest is flow matching; 1/4 in the paper."""
    target_decay: float | None = 0.999
    """Decay per step, in [0, 1), of the slow average that takes the short jumps; None takes the model itself."""
    times: TimeDistribution = UniformTimes()

    def method(self, preconditioning: str, labelled: bool) -> str:
        return "shortcut"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("bootstrap", self.bootstrap)
        if self.steps < 2 or self.steps & (self.steps - 1):
            raise ConfigError(f"shortcut steps are {self.steps}; they must be a power of 2 and at least 2")

    @property
    def anchored(self) -> bool:
        return self.bootstrap < 1

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        short = flow_map if self.target_decay is None else companions.ema_target
        t, u, s = self.draw_times(flow_map.path, batch)
        return self.split(
            flow_map,
            batch,
            (t, s),
            1 - self.bootstrap,
            lambda own, rows: self.off_diagonal(flow_map, own, (t[rows], u[rows], s[rows]), short),
        )

    def target_times(self, path: Path, batch: Batch) -> Tensor | None:
        return self.draw_times(path, batch)[0]

    def draw_times(self, path: Path, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(t, u, s), each (B,) float64, all one where the sample is matched to the data."""
        on_diagonal = batch.matched(1 - self.bootstrap)
        size = 0.5 ** batch.draws.integers(STREAM_SIZE, self.steps.bit_length() - 1).double()
        place = torch.floor(batch.draws.uniform(STREAM_S) / size)
        t, u, s = (path.time_from_unit((place + end) * size) for end in (1.0, 0.5, 0.0))
        matched = self.times.quantile(path, batch.draws.uniform(STREAM_T))
        t, u, s = (torch.where(on_diagonal, matched, time) for time in (t, u, s))
        return t, u, s

    def off_diagonal(
        self, flow_map: FlowMap, batch: Batch, times: tuple[Tensor, Tensor, Tensor], short: FlowMap
    ) -> Comparison:
        """The long jump against the two short ones, over t - s."""
        t, u, s = times
        x = flow_map.path.interpolate(batch.x0, batch.noise(), t)
        cond = self.condition(flow_map, batch, t)
        smallest = batch.draws.integers(STREAM_SIZE, self.steps.bit_length() - 1) == self.steps.bit_length() - 2
        with torch.no_grad():
            middle = short_jump(short, x, t, u, cond, smallest)
            goal = short_jump(short, middle, u, s, cond, smallest)
        return semigroup(flow_map, x, t, s, cond, goal)


def short_jump(model: FlowMap, x: Tensor, t: Tensor, s: Tensor, cond: Condition, smallest: Tensor) -> Tensor:
    """X(x, t, s), with N(x, t, t) in place of N(x, t, s) where the jump is of the smallest size."""
    return model.apply_jump(x, model.output(x, t, torch.where(smallest, t, s), cond), t, s, cond)
