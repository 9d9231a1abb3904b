"""Objectives of pairs of times: how (t, s) are drawn, and how the anchor and a method's own error become one loss."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import NoGuidance, TrainingGuidance
from fewstep.flow.paths import Path
from fewstep.flow.times import TimeDistribution, UniformTimes, ordered_pair
from fewstep.networks.condition import Condition
from fewstep.objectives.base import ALONE, STREAM_S, STREAM_T, Batch, Companions, Losses, Objective
from fewstep.objectives.losses import Comparison, Weighting
from fewstep.utils.serialization import later
from fewstep.utils.tensors import check_share

STREAM_END = 17


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
        u, w = batch.draws.uniform(STREAM_T), batch.draws.uniform(STREAM_S)
        t, s = ordered_pair(self.times, path, u, w)
        on_diagonal = batch.matched(self.flow_matching_ratio)
        if self.endpoint_share > 0:
            ending = self._ending(batch)
            t = torch.where(ending, self.times.quantile(path, u), t)
            s = torch.where(ending, path.t_min, s)
        t = torch.where(on_diagonal, self.times.quantile(path, u), t)
        return t, torch.where(on_diagonal, t, s)

    def between(self, path: Path, batch: Batch, share: Tensor | float) -> Tensor:
        """The time at that share of the way from one quantile to the other, of samples with s < t; (B,) float64."""
        first, second = batch.draws.uniform(STREAM_T), batch.draws.uniform(STREAM_S)
        if self.endpoint_share > 0:
            second = torch.where(self._ending(batch), 0.0, second)
        return self.times.quantile(path, first + share * (second - first))

    def _ending(self, batch: Batch) -> Tensor:
        return batch.draws.uniform(STREAM_END) < self.endpoint_share


@dataclass(frozen=True, kw_only=True)
class AnchoredObjective(Objective):
    """loss = w (anchor + error): |v(x_t, t) - v*|^2 ties the map to the data, the error makes its jumps agree.

    v* = alpha' x0 + sigma' eps, the conditional velocity, guided where `guidance` says (math.md section 5.3). Without
    the anchor an error between jumps is zero at maps that are no flow map of the data (math.md section 5.2).
    """

    label_dropout: float = 0.1
    pairs: Pairs = Pairs()
    weighting: Weighting = Weighting()
    guidance: TrainingGuidance = NoGuidance()


@dataclass(frozen=True, kw_only=True)
class PairObjective(AnchoredObjective):
    """The anchor on the samples with s = t alone, the method's own error on the others alone."""

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        t, s = self.pairs.draw(flow_map.path, batch)
        rows = on, off = batch.split(self.pairs.flow_matching_ratio)
        anchor = anchor_error(self, flow_map, batch[on], t[on])
        own = batch[off]
        compared = self.off_diagonal(flow_map, own, t[off], s[off]) if len(off) else nothing(self, own.x0)
        return split_losses(batch, flow_map.path, (t, s), rows, anchor, compared, self.weighting)

    @abstractmethod
    def off_diagonal(self, flow_map: FlowMap, batch: Batch, t: Tensor, s: Tensor) -> Comparison:
        """The error of samples with s < t."""


@dataclass(frozen=True, kw_only=True)
class JointObjective(AnchoredObjective):
    """The anchor on every sample; on those with s < t the method's own error is added to it.

    Both read the model's own velocity v = v(x_t, t), which is evaluated once.
    """

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        t, s = self.pairs.draw(flow_map.path, batch)
        off = batch.split(self.pairs.flow_matching_ratio)[1]
        x, conditional = flow_map.path.sample(batch.x0, batch.noise(), t)
        cond = self.condition(flow_map, batch, t)
        target = self.guide(flow_map, batch, x, t, cond, conditional)
        v = flow_map.velocity(x, t, cond)
        own = x[off]
        compared = (
            self.off_diagonal(flow_map, own, v[off], t[off], s[off], cond[off]) if len(off) else nothing(self, own)
        )
        anchor = self.anchor_loss(batch.masked(v - target), v, target)
        return joint_losses(batch, flow_map.path, (t, s), off, anchor, compared, self.weighting, self.share)

    def anchor_loss(self, error: Tensor, v: Tensor, target: Tensor) -> Tensor:
        """|v - v*|^2 (B,) of the error between them, (B, ...) with zeros for what does not count."""
        return self.weighting.measure(error)

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


def anchor_error(objective: Objective, flow_map: FlowMap, batch: Batch, t: Tensor) -> Tensor:
    """v(x_t, t) - v*, (B, ...)."""
    if len(t) == 0:
        return batch.x0
    x, conditional = flow_map.path.sample(batch.x0, batch.noise(), t)
    cond = objective.condition(flow_map, batch, t)
    target = objective.guide(flow_map, batch, x, t, cond, conditional)
    return flow_map.velocity(x, t, cond) - target


def nothing(objective: Objective, x: Tensor) -> Comparison:
    """The comparison of no samples; x (0, ...)."""
    return Comparison(x, x, x if objective.differentiates else None)


def split_losses(
    batch: Batch,
    path: Path,
    times: tuple[Tensor, Tensor],
    rows: tuple[Tensor, Tensor],
    anchor: Tensor,
    compared: Comparison,
    weighting: Weighting,
) -> Losses:
    """The anchor's errors of the rows with s = t and the comparison of the others, weighted."""
    terms = [
        _spread(weighting.measure(batch.masked(error, own)), own, len(batch.x0))
        for error, own in zip((anchor, compared.error), rows, strict=True)
    ]
    return _weighted(batch, path, times, (terms[0], terms[1]), rows, compared, weighting)


def joint_losses(
    batch: Batch,
    path: Path,
    times: tuple[Tensor, Tensor],
    off: Tensor,
    anchor: Tensor,
    compared: Comparison,
    weighting: Weighting,
    share: float,
) -> Losses:
    """The anchor's losses (B,) and, added with weight `share`, the comparison of the rows `off`, weighted."""
    every = torch.arange(len(anchor), device=off.device)
    own = share * weighting.measure(batch.masked(compared.error, off))
    terms = anchor, _spread(own, off, len(anchor))
    return _weighted(batch, path, times, terms, (every, off), compared, weighting)


def _spread(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Values of some samples as values of all, (count,); zero where there is none."""
    return values.new_zeros(count).index_copy(0, rows, values)


def _weighted(
    batch: Batch,
    path: Path,
    times: tuple[Tensor, Tensor],
    terms: tuple[Tensor, Tensor],
    rows: tuple[Tensor, Tensor],
    compared: Comparison,
    weighting: Weighting,
) -> Losses:
    """w (anchor + distill); terms (B,), zero outside their rows."""
    (t, s), numbers = times, batch.x0[0].numel()
    weight = weighting.weight(path, terms[0] + terms[1], t, numbers)
    named = dict(zip(("anchor", "distill"), terms, strict=True))
    logs = {key: term.detach()[own] for (key, term), own in zip(named.items(), rows, strict=True)}
    parts = {key: weight * term for key, term in named.items()}
    return Losses(parts["anchor"] + parts["distill"], t, s, compared.sizes() | logs, parts)
