"""Objectives of pairs of times: how (t, s) are drawn, and how the anchor and a method's own error become one loss."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import NoGuidance, TrainingGuidance
from fewstep.flow.paths import Path
from fewstep.flow.times import TimeDistribution, UniformTimes
from fewstep.networks.condition import Condition
from fewstep.objectives.base import ALONE, STREAM_S, STREAM_T, Batch, Companions, Losses, Objective, Velocities
from fewstep.objectives.losses import Comparison, Weighting
from fewstep.utils.serialization import later
from fewstep.utils.tensors import check_share

STREAM_END = 17
Times = tuple[Tensor, Tensor]


@final
@dataclass(frozen=True)
class Pairs:
    """How the pair of times s <= t of a sample is drawn: two ordered draws of `times`, or one with s = t.

    `endpoint_share` is of no paper: what holds for each s by itself needs no other than the last call's.
    """

    times: TimeDistribution = UniformTimes()
    flow_matching_ratio: float = 0.75
    """Share in [0, 1] of samples with s = t, which learn from the data alone; 0.75 in MeanFlow."""
    endpoint_share: float = later(float)
    """Share in [0, 1] of the other samples with s at the data end, as in the last call when sampling."""

    def __post_init__(self) -> None:
        check_share("flow matching ratio", self.flow_matching_ratio)
        check_share("endpoint share", self.endpoint_share)

    def draw(self, path: Path, batch: Batch) -> tuple[Tensor, Tensor]:
        """(t, s), each (B,) float64; t is one draw where s = t or s is the data end, the larger of two elsewhere."""
        one, other = (self.times.quantile(path, batch.draws.uniform(stream)) for stream in (STREAM_T, STREAM_S))
        on_diagonal, ending = batch.matched(self.flow_matching_ratio), self._ending(batch)
        t = torch.where(on_diagonal | ending, one, torch.maximum(one, other))
        s = torch.where(ending, path.t_min, torch.minimum(one, other))
        return t, torch.where(on_diagonal, t, s)

    def between(self, path: Path, batch: Batch, share: Tensor | float) -> Tensor:
        """The time at that share of the way from one quantile to the other, of samples with s < t; (B,) float64."""
        first, second = batch.draws.uniform(STREAM_T), batch.draws.uniform(STREAM_S)
        second = torch.where(self._ending(batch), 0.0, second)
        return self.times.quantile(path, first + share * (second - first))

    def _ending(self, batch: Batch) -> Tensor:
        if self.endpoint_share == 0:
            return torch.zeros_like(batch.draws.indices, dtype=torch.bool)
        return batch.draws.uniform(STREAM_END) < self.endpoint_share


@dataclass(frozen=True, kw_only=True)
class AnchoredObjective(Objective):
    """loss = w (anchor + error): |v(x_t, t) - v*|^2 ties the map to the data, the error makes its jumps agree.

    v* = alpha' x0 + sigma' eps, the conditional velocity, guided where `guidance` says (math.md section 5.3). Without
    the anchor an error between jumps is zero at maps that are no flow map of the data (math.md section 5.2).
    """

    label_dropout: float = 0.1
    weighting: Weighting = Weighting()
    guidance: TrainingGuidance = NoGuidance()

    def on_path(
        self, flow_map: FlowMap, batch: Batch, t: Tensor, teacher: Velocities | None = None
    ) -> tuple[Tensor, Condition, Tensor, Tensor]:
        """(x_t, its condition, v(x_t, t) with its graph, v*); v* is the teacher's where there is one."""
        x, conditional = flow_map.path.sample(batch.x0, batch.noise(), t)
        cond = self.condition(flow_map, batch, t)
        if teacher is None:
            target = self.guide(flow_map, batch, x, t, cond, conditional)
        else:
            target = self.guided_velocity(teacher, batch, x, t, cond)
        return x, cond, flow_map.velocity(x, t, cond), target

    def split(
        self,
        flow_map: FlowMap,
        batch: Batch,
        times: Times,
        share: float,
        compare: Callable[[Batch, Tensor], Comparison],
        teacher: Velocities | None = None,
    ) -> Losses:
        """The anchor on a `share` of the samples, those with s = t, the method's own error on the others alone.

        compare: those others and their rows (k,) to what they give. teacher: as in `on_path`.
        """
        (matched, own), rows = batch.halves(share)
        on, off = rows
        anchor = matched.x0
        if len(on):
            _, _, v, target = self.on_path(flow_map, matched, times[0][on], teacher)
            anchor = v - target
        compared = compare(own, off) if len(off) else self.nothing(own.x0)
        errors = zip((anchor, compared.error), rows, strict=True)
        terms = [self.weighting.measure(batch.masked(error, each)) for error, each in errors]
        return self.weighted(flow_map, batch, times, rows, terms, compared)

    def nothing(self, x: Tensor) -> Comparison:
        """The comparison of no samples; x (0, ...)."""
        return Comparison(x, x, x if self.differentiates else None)

    def weighted(
        self,
        flow_map: FlowMap,
        batch: Batch,
        times: Times,
        rows: Sequence[Tensor],
        values: Sequence[Tensor],
        compared: Comparison,
    ) -> Losses:
        """w (anchor + distill); the values (k,) of either are of its own rows (k,), and zero elsewhere."""
        (t, s), pairs, count = times, zip(rows, values, strict=True), len(batch.x0)
        anchor, distill = (own.new_zeros(count).index_copy(0, each, own) for each, own in pairs)
        weight = self.weighting.weight(flow_map.path, anchor + distill, t, batch.x0[0].numel())
        parts = {"anchor": weight * anchor, "distill": weight * distill}
        logs = {key: own.detach() for key, own in zip(parts, values, strict=True)}
        return Losses(parts["anchor"] + parts["distill"], t, s, compared.sizes() | logs, parts)


@dataclass(frozen=True, kw_only=True)
class PairObjective(AnchoredObjective):
    """The anchor on the samples with s = t alone, the method's own error on the others alone."""

    pairs: Pairs = Pairs()

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        t, s = self.pairs.draw(flow_map.path, batch)
        ratio = self.pairs.flow_matching_ratio
        return self.split(
            flow_map, batch, (t, s), ratio, lambda own, rows: self.off_diagonal(flow_map, own, t[rows], s[rows])
        )

    def target_times(self, path: Path, batch: Batch) -> Tensor | None:
        return self.pairs.draw(path, batch)[0]

    @abstractmethod
    def off_diagonal(self, flow_map: FlowMap, batch: Batch, t: Tensor, s: Tensor) -> Comparison:
        """The error of samples with s < t."""


@dataclass(frozen=True, kw_only=True)
class JointObjective(AnchoredObjective):
    """The anchor on every sample; on those with s < t the method's own error is added to it.

    Both read the model's own velocity v = v(x_t, t), which is evaluated once.
    """

    pairs: Pairs = Pairs()

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        t, s = self.pairs.draw(flow_map.path, batch)
        off = batch.split(self.pairs.flow_matching_ratio)[1]
        x, cond, v, target = self.on_path(flow_map, batch, t)
        compared = self.nothing(x[off])
        if len(off):
            compared = self.off_diagonal(flow_map, x[off], v[off], t[off], s[off], cond[off])
        anchor = self.anchor_loss(batch.masked(v - target), v, target)
        own = self.share * self.weighting.measure(batch.masked(compared.error, off))
        rows = torch.arange(len(t), device=off.device), off
        return self.weighted(flow_map, batch, (t, s), rows, (anchor, own), compared)

    def anchor_loss(self, error: Tensor, v: Tensor, target: Tensor) -> Tensor:
        """|v - v*|^2 (B,) of the error between them, (B, ...) with zeros for what does not count."""
        return self.weighting.measure(error)

    def target_times(self, path: Path, batch: Batch) -> Tensor | None:
        return self.pairs.draw(path, batch)[0]

    @property
    def share(self) -> float:
        """Weight of the method's own error; the anchor has 1."""
        return 1.0

    differentiates: ClassVar[bool] = True

    @abstractmethod
    def off_diagonal(
        self, flow_map: FlowMap, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: Condition
    ) -> Comparison:
        """The error of samples with s < t; v has its graph."""
