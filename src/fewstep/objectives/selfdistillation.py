"""Self-distillation from scratch by the Eulerian identity (math.md §5): iSD and iSD-T (2601.22679)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from fewstep.conditions import Condition
from fewstep.derivatives import DerivativeKind, exact_derivative, finite_derivative, finite_difference_nodes
from fewstep.errors import ConfigError
from fewstep.flowmap import FlowMap
from fewstep.guidance import NoGuidance, TrainingGuidance, drop_labels, guide, omega_at
from fewstep.objectives.base import STREAM_S, STREAM_T, Batch, Losses, Objective
from fewstep.objectives.matching import check_dropout
from fewstep.shapes import expand
from fewstep.times import BetaTimes, TimeDistribution, ordered_pair
from fewstep.weights import LossNorm, adaptive_weight, error_norm


def eulerian_residual(
    flow_map: FlowMap, x: Tensor, v: Tensor, output: Tensor, d_output: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    """R = f_t x + f v + g_t N + g dN/dt, the derivative in t of X(x_t, t, s) along the flow (math.md §5.1).

    x, v, N = output, dN/dt = d_output: (B, ...); t, s: (B,). Zero at an exact flow map.
    """
    f, g, f_t, g_t = (expand(c, x).to(x.dtype) for c in flow_map.preconditioning.derivatives(t, s))
    return f_t * x + f * v + g_t * output + g * d_output


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


def is_diagonal(indices: Tensor, share: float) -> Tensor:
    """Which samples of the global batch take s = t: evenly spread, a function of their index alone. (B,) bool."""
    count = indices.double()  # float32 would miscount
    return torch.floor((count + 1) * share + 1e-9) > torch.floor(count * share + 1e-9)


@final
@dataclass(frozen=True)
class ISD(Objective):
    """iSD: the tangent of the Eulerian identity is driven by the model's own velocity, without its gradient.

    loss = w (|v(x_t, t) - v*|^2 + |N - N_target|^2), the anchor on every sample and the second term on those with
    s < t; w = sg (loss + offset)^-power per sample. With guidance (iSD-T) v* = v_null + omega (v_cond - v_null), where
    v_cond is the conditional velocity alpha' x0 + sigma' eps and v_null the model's own without a label.

    times: of t and s, ordered. diagonal: share of samples with s = t. derivative, step: how dN/dt is taken
    (fewstep.derivatives). norm, huber: |.|^2 or pseudo-Huber.
    """

    times: TimeDistribution = field(default_factory=BetaTimes)
    diagonal: float = 0.0
    guidance: TrainingGuidance = field(default_factory=NoGuidance)
    dropout: float = 0.1
    derivative: DerivativeKind = "exact"
    step: float = 0.005
    norm: LossNorm = "l2"
    huber: float = 0.03
    power: float = 1.0
    offset: float = 0.01

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        if not 0 <= self.diagonal <= 1:
            raise ConfigError(f"diagonal share is {self.diagonal}; it must lie in [0, 1]")
        if not (self.step > 0 and self.huber > 0 and self.offset > 0):
            raise ConfigError("step, huber and offset must be positive")

    @property
    def label_dropout(self) -> float:
        return self.dropout

    @property
    def guided(self) -> bool:
        return self.guidance.conditions_network

    def __call__(self, flow_map: FlowMap, batch: Batch) -> Losses:
        path = flow_map.path
        t, s = self.draw_times(flow_map, batch)
        eps = batch.noise()
        x = path.interpolate(batch.x0, eps, t)
        cond = self.condition(flow_map, batch)
        target = self.anchor_target(flow_map, x, t, cond, path.conditional_velocity(batch.x0, eps, t), batch)

        v = flow_map.velocity(x, t, cond)
        anchor = error_norm(v - target, self.norm, self.huber)
        rows = torch.nonzero(s < t).squeeze(1)
        distill = self.distillation(flow_map, x[rows], v.detach()[rows], t[rows], s[rows], cond[rows])
        total = anchor.index_add(0, rows, distill)
        weighted = adaptive_weight(total, self.power, self.offset) * total
        spread = torch.full_like(anchor, torch.nan).index_copy(0, rows, distill.detach())
        return Losses(weighted, t, s, {"anchor": anchor.detach(), "distill": spread})

    def draw_times(self, flow_map: FlowMap, batch: Batch) -> tuple[Tensor, Tensor]:
        """(t, s), s = t for the diagonal share; float64."""
        u, w = batch.draws.uniform(STREAM_T), batch.draws.uniform(STREAM_S)
        t, s = ordered_pair(self.times, flow_map.path, u, w)
        on_diagonal = is_diagonal(batch.draws.indices, self.diagonal)
        t = torch.where(on_diagonal, self.times.quantile(flow_map.path, u), t)
        return t, torch.where(on_diagonal, t, s)

    def condition(self, flow_map: FlowMap, batch: Batch) -> Condition:
        """Labels with dropout, and the drawn guidance for networks that take it."""
        labels = None if batch.labels is None else drop_labels(batch.labels, self.dropout, batch.draws)
        cond = Condition(labels)
        if self.guidance.conditions_network and labels is not None and not flow_map.guided:
            raise ConfigError("drawn guidance needs a network that takes it as an input: build it with guided=True")
        return replace(cond, guidance=self.guidance.draw(batch.draws)) if flow_map.guided else cond

    def anchor_target(
        self, flow_map: FlowMap, x: Tensor, t: Tensor, cond: Condition, conditional: Tensor, batch: Batch
    ) -> Tensor:
        """v*: the conditional velocity, guided where a label is kept and t lies in the guidance interval."""
        if not self.guidance.active or cond.labels is None:
            return conditional
        omega = omega_at(flow_map.path, self.guidance.draw(batch.draws), t, cond.labels)
        rows = torch.nonzero(omega != 1).squeeze(1)
        if len(rows) == 0:
            return conditional
        with torch.no_grad():
            null = flow_map.velocity(x[rows], t[rows], cond[rows].without_labels())
        return conditional.index_copy(0, rows, guide(null, conditional[rows], omega[rows]))

    def distillation(self, flow_map: FlowMap, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """|N - N_target|^2 per sample for samples with s < t; v is the velocity that drives the tangent."""
        if len(x) == 0:
            return x.new_zeros(0)
        output, d_output = self.total_derivative(flow_map, x, v, t, s, cond)
        error = distillation_error(flow_map, x, v, output, d_output, t, s)
        return error_norm(error, self.norm, self.huber)

    def total_derivative(
        self, flow_map: FlowMap, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: Condition
    ) -> tuple[Tensor, Tensor]:
        """(N, dN/dt) at (x, t, s) along v; N keeps its graph."""

        def output(x: Tensor, t: Tensor) -> Tensor:
            return flow_map.output(x, t, s, cond)

        if self.derivative == "exact":
            return exact_derivative(output, x, t, v)

        def pair(x: Tensor, t: Tensor) -> Tensor:
            return flow_map.output(x, t, torch.cat([s, s]), Condition.cat(cond, cond))

        scale = torch.minimum(flow_map.path.time_scale(t), flow_map.scaling.time_scale(t))
        nodes = finite_difference_nodes(t, s, flow_map.path.t_max, self.step, scale)
        return finite_derivative(output, pair, x, t, v, nodes)
