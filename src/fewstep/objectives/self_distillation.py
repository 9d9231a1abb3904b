"""Self-distillation without derivatives along the flow (math.md §5.2): LSD, PSD and shortcut models.

Each compares jumps of the map with one another on the samples with s < t and anchors the diagonal to the data on the
others: without the anchor the comparison is zero at maps that are no flow map of the data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from fewstep.flow.derivatives import DerivativeKind, OutputDerivative
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import NoGuidance, TrainingGuidance
from fewstep.flow.paths import Path
from fewstep.flow.times import TimeDistribution, UniformTimes
from fewstep.networks.condition import Condition
from fewstep.objectives.base import ALONE, STREAM_S, STREAM_T, Batch, Companions, Losses, Objective
from fewstep.objectives.distillation import STREAM_U, check_decay
from fewstep.objectives.losses import LossNorm
from fewstep.objectives.pairs import (
    Comparison,
    Measure,
    anchor_error,
    check_settings,
    draw_pair,
    guided_condition,
    is_diagonal,
    noised,
    rows_on_and_off,
    split_losses,
)
from fewstep.utils.errors import ConfigError
from fewstep.utils.forward_ad import jvp
from fewstep.utils.tensors import check_choice, expand

STREAM_SIZE = 16


@final
@dataclass(frozen=True)
class LSD(Objective):
    """Lagrangian self-distillation (2505.18825): |d_s X(x_t, t, s) - sg v(X(x_t, t, s), s)|^2 for samples with s < t.

    The velocity is detached, and so is the point where it is taken, as in the paper's experiments: what the diagonal
    knows flows outwards, and no spatial Jacobian is multiplied. The gradient flows through d_s X: through N and, in
    reverse mode over forward mode or over a finite difference, through dN/ds. Samples with s = t have the anchor
    |v(x_t, t) - v*|^2, v* as in ISD.

    times: of t and s, ordered. w = sg (loss + offset)^-power per sample; the paper's learned weight in (t, s) is left
    out.
    """

    times: TimeDistribution = field(default_factory=UniformTimes)
    diagonal: float = 0.75
    """Share in (0, 1] of samples with s = t, which learn from the data alone."""
    guidance: TrainingGuidance = field(default_factory=NoGuidance)
    dropout: float = 0.1
    """Probability in [0, 1] of hiding a sample's label; guidance needs a model without labels too."""
    derivative: DerivativeKind = "exact"
    """How dN/ds is taken: exact, by forward-mode AD, or finite-difference, by evaluations beside s."""
    step: float = 0.005
    """Step of the finite difference, above 0, in units of the path's or network's time scale."""
    norm: LossNorm = "l2"
    """How errors are measured: l2, their mean square, or pseudo-huber, which counts large ones less."""
    huber: float = 0.03
    """The c of pseudo-huber, above 0: an error much larger counts by its size, a smaller one by its square."""
    power: float = 0.0
    """Power of the adaptive weight w, at least 0; 0 is no weight."""
    offset: float = 0.01
    """Added to the loss in the adaptive weight w, above 0."""

    def __post_init__(self) -> None:
        check_settings(self.dropout, self.diagonal)
        self.measure.check()
        OutputDerivative(self.derivative, self.step).check()

    @property
    def measure(self) -> Measure:
        """What makes a loss of its errors."""
        return Measure(self.norm, self.huber, self.power, self.offset)

    @property
    def differentiates(self) -> bool:
        return True

    @property
    def anchored(self) -> bool:
        return self.diagonal > 0

    @property
    def label_dropout(self) -> float:
        return self.dropout

    @property
    def target_guidance(self) -> TrainingGuidance:
        return self.guidance

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        t, s = draw_pair(self.times, self.diagonal, flow_map.path, batch)
        on, off = rows_on_and_off(t, s)
        anchor = anchor_error(flow_map, batch[on], t[on], self.dropout, self.guidance)
        compared = self.compare(flow_map, batch[off], t[off], s[off])
        return split_losses(batch, t, s, anchor, compared, self.measure)

    def compare(self, flow_map: FlowMap, batch: Batch, t: Tensor, s: Tensor) -> Comparison:
        """d_s X against sg v(X, s); its derivative is dN/ds."""
        if len(t) == 0:
            return Comparison(batch.x0, batch.x0, batch.x0)
        x = noised(flow_map.path, batch, t)[0]
        cond = guided_condition(flow_map, batch, self.dropout, self.guidance)
        derivative = OutputDerivative(self.derivative, self.step, attached=True)
        reached, d_reached, d_output = jump_with_derivative(flow_map, x, t, s, cond, derivative)
        with torch.no_grad():
            v = flow_map.velocity(reached, s, cond)
        return Comparison(d_reached - v, d_reached, d_output)


def jump_with_derivative(
    flow_map: FlowMap, x: Tensor, t: Tensor, s: Tensor, cond: Condition, derivative: OutputDerivative
) -> tuple[Tensor, Tensor, Tensor]:
    """(X, d_s X, dN/ds), (B, ...) each, with d_s X = f_s x + g_s N + g dN/ds and the origin's terms, for t -> s."""
    output, d_output = derivative.at_end(flow_map, x, t, s, cond)

    def jump(s: Tensor, output: Tensor) -> Tensor:
        return flow_map.apply_jump(x, output, t, s)

    return *jvp(jump, (s, output), (torch.ones_like(s), d_output)), d_output


def semigroup(flow_map: FlowMap, x: Tensor, t: Tensor, s: Tensor, cond: Condition, goal: Tensor) -> Comparison:
    """(X(x, t, s) - x)/(t - s) against (goal - x)/(t - s): for linear preconditioning mean velocities."""
    gap = expand(t - s, x).to(x.dtype)
    reached = flow_map.jump(x, t, s, cond)
    return Comparison((reached - goal) / gap, (reached - x) / gap)


@final
@dataclass(frozen=True)
class PSD(Objective):
    """Progressive self-distillation (2505.18825): |X(x_t, t, s) - sg X(X(x_t, t, u), u, s)|^2/(t - s)^2, s < u < t.

    The two short jumps have no gradient. Samples with s = t have the anchor |v(x_t, t) - v*|^2, v* as in ISD.

    times: of t and s, ordered. w = sg (loss + offset)^-power per sample; the paper's learned weight in (t, s) is left
    out.
    """

    u: Literal["uniform", "midpoint"] = "uniform"
    """Where the short jumps meet: uniform between t and s or their middle, where `times` is uniform."""
    times: TimeDistribution = field(default_factory=UniformTimes)
    diagonal: float = 0.75
    """Share in (0, 1] of samples with s = t, which learn from the data alone."""
    guidance: TrainingGuidance = field(default_factory=NoGuidance)
    dropout: float = 0.1
    """Probability in [0, 1] of hiding a sample's label; guidance needs a model without labels too."""
    norm: LossNorm = "l2"
    """How errors are measured: l2, their mean square, or pseudo-huber, which counts large ones less."""
    huber: float = 0.03
    """The c of pseudo-huber, above 0: an error much larger counts by its size, a smaller one by its square."""
    power: float = 0.0
    """Power of the adaptive weight w, at least 0; 0 is no weight."""
    offset: float = 0.01
    """Added to the loss in the adaptive weight w, above 0."""

    def __post_init__(self) -> None:
        check_settings(self.dropout, self.diagonal)
        check_choice("u", self.u, ("uniform", "midpoint"))
        self.measure.check()

    @property
    def measure(self) -> Measure:
        """What makes a loss of its errors."""
        return Measure(self.norm, self.huber, self.power, self.offset)

    @property
    def anchored(self) -> bool:
        return self.diagonal > 0

    @property
    def label_dropout(self) -> float:
        return self.dropout

    @property
    def target_guidance(self) -> TrainingGuidance:
        return self.guidance

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        t, s = draw_pair(self.times, self.diagonal, flow_map.path, batch)
        on, off = rows_on_and_off(t, s)
        anchor = anchor_error(flow_map, batch[on], t[on], self.dropout, self.guidance)
        compared = self.compare(flow_map, batch[off], t[off], s[off])
        return split_losses(batch, t, s, anchor, compared, self.measure)

    def between(self, path: Path, batch: Batch) -> Tensor:
        """u of the samples with s < t, (B,): a draw, or the middle, between the quantiles of s and t."""
        first, second = batch.draws.uniform(STREAM_T), batch.draws.uniform(STREAM_S)
        share = batch.draws.uniform(STREAM_U) if self.u == "uniform" else 0.5
        return self.times.quantile(path, first + share * (second - first))

    def compare(self, flow_map: FlowMap, batch: Batch, t: Tensor, s: Tensor) -> Comparison:
        """The long jump against the two short ones, over t - s."""
        if len(t) == 0:
            return Comparison(batch.x0, batch.x0)
        x, u = noised(flow_map.path, batch, t)[0], self.between(flow_map.path, batch)
        cond = guided_condition(flow_map, batch, self.dropout, self.guidance)
        with torch.no_grad():
            goal = flow_map.jump(flow_map.jump(x, t, u, cond), u, s, cond)
        return semigroup(flow_map, x, t, s, cond, goal)


@final
@dataclass(frozen=True)
class Shortcut(Objective):
    """Shortcut models (2410.12557): one jump of 2 d against two of d, for d = 1/2, 1/4, ... 1/steps of the unit clock.

    |X(x_t, t, s) - sg X(X(x_t, t, u), u, s)|^2/(t - s)^2 on the share `bootstrap` of the batch, with t - u = u - s = d,
    t a multiple of 2 d and every d equally often; the rest is flow matching, |v(x_t, t) - v*|^2 at `times`, v* as in
    ISD. The short jumps of the smallest size are taken with N of the diagonal, which the data teach: nothing else does.

    w = sg (loss + offset)^-power per sample.
    """

    steps: int = 128
    """Jumps of the smallest size that make up the clock: a power of 2, at least 2; 128 in the paper."""
    bootstrap: float = 0.25
    """Share of the batch in [0, 1) that compares jumps; the rest is flow matching; 1/4 in the paper."""
    decay: float | None = 0.999
    """Decay per step, in [0, 1), of the slow average that takes the short jumps; None takes the model itself."""
    times: TimeDistribution = field(default_factory=UniformTimes)
    guidance: TrainingGuidance = field(default_factory=NoGuidance)
    dropout: float = 0.1
    """Probability in [0, 1] of hiding a sample's label; guidance needs a model without labels too."""
    norm: LossNorm = "l2"
    """How errors are measured: l2, their mean square, or pseudo-huber, which counts large ones less."""
    huber: float = 0.03
    """The c of pseudo-huber, above 0: an error much larger counts by its size, a smaller one by its square."""
    power: float = 0.0
    """Power of the adaptive weight w, at least 0; 0 is no weight."""
    offset: float = 0.01
    """Added to the loss in the adaptive weight w, above 0."""

    def __post_init__(self) -> None:
        check_settings(self.dropout, 1 - self.bootstrap)
        self.measure.check()
        if self.decay is not None:
            check_decay(self.decay)
        if self.steps < 2 or self.steps & (self.steps - 1):
            raise ConfigError(f"shortcut steps are {self.steps}; they must be a power of 2 and at least 2")

    @property
    def measure(self) -> Measure:
        """What makes a loss of its errors."""
        return Measure(self.norm, self.huber, self.power, self.offset)

    @property
    def anchored(self) -> bool:
        return self.bootstrap < 1

    @property
    def label_dropout(self) -> float:
        return self.dropout

    @property
    def target_guidance(self) -> TrainingGuidance:
        return self.guidance

    @property
    def target_decay(self) -> float | None:
        return self.decay

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        short = flow_map if self.decay is None else companions.slow()
        t, u, s = self.draw_times(flow_map.path, batch)
        on, off = rows_on_and_off(t, s)
        anchor = anchor_error(flow_map, batch[on], t[on], self.dropout, self.guidance)
        compared = self.compare(flow_map, batch[off], (t[off], u[off], s[off]), short)
        return split_losses(batch, t, s, anchor, compared, self.measure)

    def draw_times(self, path: Path, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(t, u, s), each (B,) float64, all one where the sample is matched to the data."""
        on_diagonal = is_diagonal(batch.draws.indices, 1 - self.bootstrap)
        size = 0.5 ** batch.draws.integers(STREAM_SIZE, self.steps.bit_length() - 1).double()
        place = torch.floor(batch.draws.uniform(STREAM_S) / size)
        t, u, s = (path.time_from_unit((place + end) * size) for end in (1.0, 0.5, 0.0))
        matched = self.times.quantile(path, batch.draws.uniform(STREAM_T))
        t, u, s = (torch.where(on_diagonal, matched, time) for time in (t, u, s))
        return t, u, s

    def compare(
        self, flow_map: FlowMap, batch: Batch, times: tuple[Tensor, Tensor, Tensor], short: FlowMap
    ) -> Comparison:
        """The long jump against the two short ones, over t - s."""
        t, u, s = times
        if len(t) == 0:
            return Comparison(batch.x0, batch.x0)
        x = noised(flow_map.path, batch, t)[0]
        cond = guided_condition(flow_map, batch, self.dropout, self.guidance)
        smallest = batch.draws.integers(STREAM_SIZE, self.steps.bit_length() - 1) == self.steps.bit_length() - 2
        with torch.no_grad():
            middle = short_jump(short, x, t, u, cond, smallest)
            goal = short_jump(short, middle, u, s, cond, smallest)
        return semigroup(flow_map, x, t, s, cond, goal)


def short_jump(model: FlowMap, x: Tensor, t: Tensor, s: Tensor, cond: Condition, smallest: Tensor) -> Tensor:
    """X(x, t, s), with N(x, t, t) in place of N(x, t, s) where the jump is of the smallest size."""
    return model.apply_jump(x, model.output(x, t, torch.where(smallest, t, s), cond), t, s)
