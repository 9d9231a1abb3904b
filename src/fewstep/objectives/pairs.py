"""What objectives from scratch draw and aim at: pairs of times, conditions, guided velocities (math.md §5.2, §5.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, get_args

import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import TrainingGuidance, guide, omega_at
from fewstep.flow.paths import Path
from fewstep.flow.times import TimeDistribution, ordered_pair
from fewstep.networks.condition import Condition
from fewstep.objectives.base import STREAM_S, STREAM_T, Batch, Losses
from fewstep.objectives.flow_matching import check_dropout, conditioned
from fewstep.objectives.losses import LossNorm, adaptive_weight, error_norm
from fewstep.utils.errors import ConfigError
from fewstep.utils.tensors import check_choice

STREAM_END = 17


class Velocities(Protocol):
    """What has a velocity on a path: a flow map, or a teacher carried over to the flow map's path."""

    @property
    def path(self) -> Path: ...

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor: ...


def is_diagonal(indices: Tensor, share: float) -> Tensor:
    """Which samples of the global batch take s = t: evenly spread, a function of their index alone. (B,) bool."""
    count = indices.double()  # float32 would miscount
    return torch.floor((count + 1) * share + 1e-9) > torch.floor(count * share + 1e-9)


def draw_pair(
    times: TimeDistribution, diagonal: float, path: Path, batch: Batch, to_end: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(t, s): two ordered draws of `times`, or one with s = t for the diagonal share; float64.

    to_end: share of the others that have s at the data end, and for t one draw.
    """
    u, w = batch.draws.uniform(STREAM_T), batch.draws.uniform(STREAM_S)
    t, s = ordered_pair(times, path, u, w)
    on_diagonal = is_diagonal(batch.draws.indices, diagonal)
    if to_end > 0:
        ending = batch.draws.uniform(STREAM_END) < to_end
        t = torch.where(ending, times.quantile(path, u), t)
        s = torch.where(ending, path.t_min, s)
    t = torch.where(on_diagonal, times.quantile(path, u), t)
    return t, torch.where(on_diagonal, t, s)


def noised(path: Path, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, alpha' x0 + sigma' eps), each (B, ...)."""
    eps = batch.noise()
    return path.interpolate(batch.x0, eps, t), path.conditional_velocity(batch.x0, eps, t)


def guided_condition(flow_map: FlowMap, batch: Batch, dropout: float, guidance: TrainingGuidance) -> Condition:
    """Labels with dropout, and the drawn guidance for networks that take it."""
    cond = conditioned(batch, dropout)
    if guidance.conditions_network and cond.labels is not None and not flow_map.guided:
        raise ConfigError("drawn guidance needs a network that takes it as an input: build it with guided=True")
    return replace(cond, guidance=guidance.draw(batch.draws)) if flow_map.guided else cond


def guided_velocity(
    model: Velocities,
    x: Tensor,
    t: Tensor,
    cond: Condition,
    conditional: Tensor,
    guidance: TrainingGuidance,
    batch: Batch,
) -> Tensor:
    """v_null + omega (conditional - v_null), v_null the model's own velocity without a label and without gradient.

    Guided where a label is kept and t lies in the guidance interval; the conditional velocity (B, ...) elsewhere.
    """
    if not guidance.active or cond.labels is None:
        return conditional
    omega = omega_at(model.path, guidance.draw(batch.draws), t, cond.labels)
    rows = torch.nonzero(omega != 1).squeeze(1)
    if len(rows) == 0:
        return conditional
    with torch.no_grad():
        null = model.velocity(x[rows], t[rows], cond[rows].without_labels())
    return conditional.index_copy(0, rows, guide(null, conditional[rows], omega[rows]))


def anchor_error(flow_map: FlowMap, batch: Batch, t: Tensor, dropout: float, guidance: TrainingGuidance) -> Tensor:
    """v(x_t, t) - v* on the diagonal, (B, ...): v* the conditional velocity, guided where `guidance` says."""
    if len(t) == 0:
        return batch.x0
    x, conditional = noised(flow_map.path, batch, t)
    cond = guided_condition(flow_map, batch, dropout, guidance)
    target = guided_velocity(flow_map, x, t, cond, conditional, guidance, batch)
    return flow_map.velocity(x, t, cond) - target


@dataclass(frozen=True)
class Comparison:
    """An error (B, ...), prediction less target, with the sides that it compares.

    prediction: what the gradient moves: N, or what an objective compares in its place. derivative: the dN/dt or dN/ds
    that the target is made of, where there is one.
    """

    error: Tensor
    prediction: Tensor
    derivative: Tensor | None = None

    def sizes(self) -> dict[str, Tensor]:
        """Root mean square of a sample's numbers, (B,) each, detached: prediction, target and derivative."""
        prediction, error = self.prediction.detach(), self.error.detach()
        found = {} if self.derivative is None else {"derivative_rms": rms(self.derivative.detach())}
        return found | {"target_rms": rms(prediction - error), "prediction_rms": rms(prediction)}


def rms(values: Tensor) -> Tensor:
    """Root mean square of a sample's numbers: (B, ...) -> (B,)."""
    return values.flatten(1).square().mean(1).sqrt()


def spread(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Values of some samples as values of all, (count,); zero where there is none."""
    return values.new_zeros(count).index_copy(0, rows, values)


@dataclass(frozen=True)
class Measure:
    """How an error becomes a loss: its norm (`error_norm`), weighted by sg (loss + offset)^-power."""

    norm: LossNorm
    huber: float
    power: float
    offset: float

    def check(self) -> None:
        """Raise ConfigError for an unknown norm, a power below 0, or other numbers that are not positive and finite."""
        check_choice("norm", self.norm, get_args(LossNorm))
        check_settings(0.0, 0.0, huber=self.huber, offset=self.offset)
        if not 0 <= self.power < math.inf:
            raise ConfigError(f"power of the adaptive weight is {self.power}; it must be finite and at least 0")

    def __call__(self, error: Tensor) -> Tensor:
        """(B, ...) -> (B,), not weighted yet."""
        return error_norm(error, self.norm, self.huber)


def split_losses(batch: Batch, t: Tensor, s: Tensor, anchor: Tensor, compared: Comparison, measure: Measure) -> Losses:
    """The anchor's errors of the samples with s = t and the comparison of the others, weighted adaptively."""
    on, off = rows_on_and_off(t, s)
    anchored = spread(measure(batch.count(anchor, on)), on, len(t))
    distilled = spread(measure(batch.count(compared.error, off)), off, len(t))
    return weighted_losses(t, s, (anchored, distilled), (on, off), compared, measure)


def joint_losses(
    batch: Batch, t: Tensor, s: Tensor, anchor: Tensor, compared: Comparison, measure: Measure, share: float = 1.0
) -> Losses:
    """The anchor's errors of all samples and, added to them, the comparison of those with s < t, weighted together.

    share: of the comparison; the anchor has 1.
    """
    off = rows_on_and_off(t, s)[1]
    every = torch.arange(len(t), device=off.device)
    distilled = share * measure(batch.count(compared.error, off))
    terms = measure(batch.count(anchor)), spread(distilled, off, len(t))
    return weighted_losses(t, s, terms, (every, off), compared, measure)


def weighted_losses(
    t: Tensor,
    s: Tensor,
    terms: tuple[Tensor, Tensor],
    rows: tuple[Tensor, Tensor],
    compared: Comparison,
    measure: Measure,
) -> Losses:
    """w (anchor + distill), w = sg (anchor + distill + offset)^-power; terms (B,), zero outside their rows."""
    weight = adaptive_weight(terms[0] + terms[1], measure.power, measure.offset)
    named = dict(zip(("anchor", "distill"), terms, strict=True))
    logs = {key: term.detach()[own] for (key, term), own in zip(named.items(), rows, strict=True)}
    parts = {key: weight * term for key, term in named.items()}
    return Losses(parts["anchor"] + parts["distill"], t, s, compared.sizes() | logs, parts)


def rows_on_and_off(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the samples with s = t, and of the others."""
    return torch.nonzero(s == t).squeeze(1), torch.nonzero(s != t).squeeze(1)


def check_settings(dropout: float, diagonal: float, to_end: float = 0.0, **positive: float) -> None:
    """Raise ConfigError unless dropout and the shares lie in [0, 1] and the rest are positive and finite."""
    check_dropout(dropout)
    for name, share in (("diagonal share", diagonal), ("share to the data end", to_end)):
        if not 0 <= share <= 1:
            raise ConfigError(f"{name} is {share}; it must lie in [0, 1]")
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} is {value}; it must be positive and finite")
