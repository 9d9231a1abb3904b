"""Training by the Eulerian identity d/dt X(x_t, t, s) = 0 (math.md §5.1, §5.2): iSD, iSD-T, MeanFlow and ESD.

They differ in the velocity that drives the tangent and in what the gradient flows through.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from fewstep.flow.derivatives import DerivativeKind, OutputDerivative
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import NoGuidance, TrainingGuidance
from fewstep.flow.preconditioning.base import origin_weight_derivative
from fewstep.flow.times import BetaTimes, LogitNormalTimes, TimeDistribution, UniformTimes
from fewstep.networks.condition import Condition
from fewstep.objectives.base import ALONE, Batch, Companions, Losses, Objective
from fewstep.objectives.losses import LossNorm
from fewstep.objectives.pairs import (
    Comparison,
    Measure,
    anchor_error,
    check_settings,
    draw_pair,
    guided_condition,
    guided_velocity,
    joint_losses,
    noised,
    rows_on_and_off,
    split_losses,
)
from fewstep.utils.serialization import later
from fewstep.utils.tensors import expand


def eulerian_residual(
    flow_map: FlowMap, x: Tensor, v: Tensor, output: Tensor, d_output: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    """R = f_t x + f v + g_t N + g dN/dt, the derivative in t of X(x_t, t, s) along the flow (math.md §5.1).

    x, v, N = output, dN/dt = d_output: (B, ...); t, s: (B,). Zero at an exact flow map. A preconditioning with an
    origin m adds (-alpha_t' f - alpha_t f_t - g_t) m (math.md §3.6).
    """
    derivatives = flow_map.preconditioning.derivatives(t, s)
    f, g, f_t, g_t = (expand(c, x).to(x.dtype) for c in derivatives)
    residual = f_t * x + f * v + g_t * output + g * d_output
    origin = flow_map.preconditioning.origin
    if origin is None:
        return residual
    weight = origin_weight_derivative(flow_map.path, derivatives, t)
    return residual + expand(weight, x).to(x.dtype) * origin.to(x)


def distillation_error(
    flow_map: FlowMap, x: Tensor, v: Tensor, output: Tensor, d_output: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    """Error against the self-distillation target, with gradient through N = output alone.

    Where the preconditioning allows it the target is N_target = sg(N + R) and the error N - N_target; otherwise the
    step is taken in the map, X_target = sg(X - (t - s) R), and the error is (X - X_target)/(t - s)
    = g/(t - s) (N - sg N) + R, whose limit at s = t has g/(t - s) -> -g_s.
    """
    frozen = output.detach()
    residual = eulerian_residual(flow_map, x, v, frozen, d_output, t, s)
    if flow_map.preconditioning.target_in_network:
        return (output - frozen) - residual
    gap = t - s
    g = flow_map.preconditioning.coefficients(t, s)[1]
    g_s = flow_map.preconditioning.diagonal(t)[1]
    slope = torch.where(gap > 0, g / torch.where(gap > 0, gap, 1.0), -g_s)
    return expand(slope, x).to(x.dtype) * (output - frozen) + residual


def self_distilled(
    flow_map: FlowMap, x: Tensor, v: Tensor, output: Tensor, d_output: Tensor, t: Tensor, s: Tensor
) -> Comparison:
    """`distillation_error` with its sides: N and its target, or (X - x)/(t - s) where the step is taken in the map."""
    error = distillation_error(flow_map, x, v, output, d_output, t, s)
    if flow_map.preconditioning.target_in_network:
        return Comparison(error, output, d_output)
    gap = expand(torch.where(t > s, t - s, 1.0), x).to(x.dtype)
    return Comparison(error, (flow_map.apply_jump(x, output.detach(), t, s) - x) / gap, d_output)


def _one() -> float:
    return 1.0


@final
@dataclass(frozen=True)
class ISD(Objective):
    """iSD (2601.22679): the tangent of the Eulerian identity is driven by the model's own velocity, without gradient.

    loss = w (|v(x_t, t) - v*|^2 + distill |N - N_target|^2), the anchor on every sample and the second term on those
    with s < t; w = sg (loss + offset)^-power per sample. With guidance (iSD-T) v* = v_null + omega (v_cond - v_null),
    where v_cond is the conditional velocity alpha' x0 + sigma' eps and v_null the model's own without a label.

    times: of t and s, ordered. to_end is not of the paper: the identity holds for each s by itself, and a sample's last
    call needs no other. On too large a `distill` see studies/degeneracy.md. |.|^2 may be pseudo-Huber (`norm`).
    """

    times: TimeDistribution = field(default_factory=BetaTimes)
    diagonal: float = 0.0
    """Share in [0, 1] of samples with s = t, which have the anchor alone."""
    to_end: float = later(float)
    """Share in [0, 1] of the other samples with s at the data end, as in the last call when sampling."""
    guidance: TrainingGuidance = field(default_factory=NoGuidance)
    dropout: float = 0.1
    """Probability in [0, 1] of hiding a sample's label; guidance needs a model without labels too."""
    derivative: DerivativeKind = "exact"
    """How dN/dt is taken: exact, by forward-mode AD, or finite-difference, by evaluations beside t."""
    step: float = 0.005
    """Step of the finite difference, above 0, in units of the path's or network's time scale; 0.005 in the paper."""
    norm: LossNorm = "l2"
    """How errors are measured: l2, their mean square, or pseudo-huber, which counts large ones less."""
    huber: float = 0.03
    """The c of pseudo-huber, above 0: an error much larger counts by its size, a smaller one by its square."""
    power: float = 1.0
    """Power of the adaptive weight w, at least 0; 1 in the paper, 0 is no weight."""
    offset: float = 0.01
    """Added to the loss in the adaptive weight w, above 0; 0.01 in the paper."""
    distill: float = later(_one)
    """Weight of the second term, above 0; 1 in the paper. Too much, and the anchor holds no longer."""

    def __post_init__(self) -> None:
        check_settings(self.dropout, self.diagonal, self.to_end, distill=self.distill)
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
    def label_dropout(self) -> float:
        return self.dropout

    @property
    def target_guidance(self) -> TrainingGuidance:
        return self.guidance

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        t, s = self.draw_times(flow_map, batch)
        x, conditional = noised(flow_map.path, batch, t)
        cond = guided_condition(flow_map, batch, self.dropout, self.guidance)
        target = guided_velocity(flow_map, x, t, cond, conditional, self.guidance, batch)

        v = flow_map.velocity(x, t, cond)
        rows = rows_on_and_off(t, s)[1]
        compared = self.compare(flow_map, x[rows], v.detach()[rows], t[rows], s[rows], cond[rows])
        return joint_losses(batch, t, s, v - target, compared, self.measure, self.distill)

    def draw_times(self, flow_map: FlowMap, batch: Batch) -> tuple[Tensor, Tensor]:
        """(t, s), s = t for the diagonal share; float64."""
        return draw_pair(self.times, self.diagonal, flow_map.path, batch, self.to_end)

    def compare(self, flow_map: FlowMap, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Comparison:
        """N against N_target for samples with s < t; v is the velocity that drives the tangent."""
        if len(x) == 0:
            return Comparison(x, x, x)
        output, d_output = OutputDerivative(self.derivative, self.step).along_flow(flow_map, x, v, t, s, cond)
        return self_distilled(flow_map, x, v, output, d_output, t, s)


@final
@dataclass(frozen=True)
class MeanFlow(Objective):
    """MeanFlow (2505.13447): the conditional velocity drives the tangent and stands in the target.

    loss = w |N - sg N_target|^2 (math.md §5.1), for linear preconditioning N_target = v~ - (t - s)(J_N v~ + d_t N);
    where s = t it is |v(x_t, t) - v~|^2. v~ = alpha' x0 + sigma' eps, and with guidance omega v~ +
    (1 - omega) v(x_t, t | null) for samples that keep their label, the second term the model's own without gradient.
    Nothing but the data anchors the map: there is no further term. The paper's second mixing scale kappa is left out.

    times: of t and s, ordered. w = sg (loss + offset)^-power per sample.
    """

    times: TimeDistribution = field(default_factory=LogitNormalTimes)
    diagonal: float = 0.75
    """Share in [0, 1] of samples with s = t, which learn from the data alone; 0.75 in the paper."""
    to_end: float = later(float)
    """Share in [0, 1] of the other samples with s at the data end, as in the last call when sampling."""
    guidance: TrainingGuidance = field(default_factory=NoGuidance)
    dropout: float = 0.1
    """Probability in [0, 1] of hiding a sample's label; guidance needs a model without labels too."""
    derivative: DerivativeKind = "exact"
    """How dN/dt is taken: exact, by forward-mode AD, or finite-difference, by evaluations beside t."""
    step: float = 0.005
    """Step of the finite difference, above 0, in units of the path's or network's time scale."""
    norm: LossNorm = "l2"
    """How errors are measured: l2, their mean square, or pseudo-huber, which counts large ones less."""
    huber: float = 0.03
    """The c of pseudo-huber, above 0: an error much larger counts by its size, a smaller one by its square."""
    power: float = 1.0
    """Power of the adaptive weight w, at least 0; 1 in the paper, 0 is no weight."""
    offset: float = 0.001
    """Added to the loss in the adaptive weight w, above 0; 0.001 in the paper."""

    def __post_init__(self) -> None:
        check_settings(self.dropout, self.diagonal, self.to_end)
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
    def label_dropout(self) -> float:
        return self.dropout

    @property
    def target_guidance(self) -> TrainingGuidance:
        return self.guidance

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        t, s = draw_pair(self.times, self.diagonal, flow_map.path, batch, self.to_end)
        on, off = rows_on_and_off(t, s)
        anchor = anchor_error(flow_map, batch[on], t[on], self.dropout, self.guidance)
        compared = self.compare(flow_map, batch[off], t[off], s[off])
        return split_losses(batch, t, s, anchor, compared, self.measure)

    def compare(self, flow_map: FlowMap, batch: Batch, t: Tensor, s: Tensor) -> Comparison:
        """N against N_target, with gradient through N alone."""
        if len(t) == 0:
            return Comparison(batch.x0, batch.x0, batch.x0)
        x, conditional = noised(flow_map.path, batch, t)
        cond = guided_condition(flow_map, batch, self.dropout, self.guidance)
        v = guided_velocity(flow_map, x, t, cond, conditional, self.guidance, batch)
        output, d_output = OutputDerivative(self.derivative, self.step).along_flow(flow_map, x, v, t, s, cond)
        return self_distilled(flow_map, x, v, output, d_output, t, s)


@final
@dataclass(frozen=True)
class ESD(Objective):
    """Eulerian self-distillation (2505.18825): loss = w (|v(x_t, t) - v*|^2 + |R|^2), nothing in it detached.

    R = d/dt X(x_t, t, s) along the model's own velocity (math.md §5.1). The gradient flows through N, v and dN/dt:
    reverse mode over the forward-mode derivative, or over the three points of a finite difference. Its norm is
    excessive where the spatial Jacobian is large; clip it. The anchor is on every sample, R on those with s < t.

    v*, times, w: as in ISD; the paper's learned weight in (t, s) is left out.
    """

    times: TimeDistribution = field(default_factory=UniformTimes)
    diagonal: float = 0.75
    """Share in [0, 1] of samples with s = t, which have the anchor alone."""
    to_end: float = later(float)
    """Share in [0, 1] of the other samples with s at the data end, as in the last call when sampling."""
    guidance: TrainingGuidance = field(default_factory=NoGuidance)
    dropout: float = 0.1
    """Probability in [0, 1] of hiding a sample's label; guidance needs a model without labels too."""
    derivative: DerivativeKind = "exact"
    """How dN/dt is taken: exact, by forward-mode AD, or finite-difference, by evaluations beside t."""
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
        check_settings(self.dropout, self.diagonal, self.to_end)
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
    def label_dropout(self) -> float:
        return self.dropout

    @property
    def target_guidance(self) -> TrainingGuidance:
        return self.guidance

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        t, s = draw_pair(self.times, self.diagonal, flow_map.path, batch, self.to_end)
        x, conditional = noised(flow_map.path, batch, t)
        cond = guided_condition(flow_map, batch, self.dropout, self.guidance)
        target = guided_velocity(flow_map, x, t, cond, conditional, self.guidance, batch)

        v = flow_map.velocity(x, t, cond)
        rows = rows_on_and_off(t, s)[1]
        compared = self.compare(flow_map, x[rows], v[rows], t[rows], s[rows], cond[rows])
        return joint_losses(batch, t, s, v - target, compared, self.measure)

    def compare(self, flow_map: FlowMap, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Comparison:
        """N against N + R for samples with s < t, with gradient through all of it."""
        if len(x) == 0:
            return Comparison(x, x, x)
        derivative = OutputDerivative(self.derivative, self.step, attached=True)
        output, d_output = derivative.along_flow(flow_map, x, v, t, s, cond)
        return Comparison(-eulerian_residual(flow_map, x, v, output, d_output, t, s), output, d_output)
