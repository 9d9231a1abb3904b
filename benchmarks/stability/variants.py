"""Objectives and settings that only the stability study knows: mistakes and alternatives, kept out of the library."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.networks.condition import Condition
from fewstep.objectives import ALONE, ISD, Batch, Companions, Losses, Objective
from fewstep.objectives.eulerian import distillation_error
from fewstep.objectives.losses import adaptive_weight, error_norm
from fewstep.objectives.pairs import guided_condition, guided_velocity, noised, rows_on_and_off
from fewstep.utils.forward_ad import jvp


def on_the_diagonal(
    base: ISD, flow_map: FlowMap, batch: Batch
) -> tuple[Tensor, Tensor, Tensor, Tensor, Condition, Tensor]:
    """(x_t, v, t, s, condition, anchor's loss) of iSD, before anything is weighted."""
    t, s = base.draw_times(flow_map, batch)
    x, conditional = noised(flow_map.path, batch, t)
    cond = guided_condition(flow_map, batch, base.dropout, base.guidance)
    target = guided_velocity(flow_map, x, t, cond, conditional, base.guidance, batch)
    v = flow_map.velocity(x, t, cond)
    return x, v, t, s, cond, error_norm(v - target, base.norm, base.huber)


@final
@dataclass(frozen=True)
class ISDApart(Objective):
    """iSD whose two terms are each weighted by its own sg (loss + offset)^-power, per sample."""

    base: ISD = field(default_factory=ISD)

    @property
    def label_dropout(self) -> float:
        return self.base.dropout

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        base = self.base
        x, v, t, s, cond, anchor = on_the_diagonal(base, flow_map, batch)
        rows = rows_on_and_off(t, s)[1]
        compared = base.compare(flow_map, x[rows], v.detach()[rows], t[rows], s[rows], cond[rows])
        distill = error_norm(compared.error, base.norm, base.huber)
        loss = adaptive_weight(anchor, base.power, base.offset) * anchor
        loss = loss.index_add(0, rows, adaptive_weight(distill, base.power, base.offset) * distill)
        logs = {"anchor": anchor.detach(), "distill": distill.detach()}
        return Losses(loss, t, s, logs)


@final
@dataclass(frozen=True)
class ISDTimeUnit(Objective):
    """iSD with the time-unit error of the published code: dN/dt = J_N v + factor d_t N.

    On the trig path a network clocked in t/(pi/2) whose time tangent is passed as 1 has factor pi/2.
    """

    base: ISD = field(default_factory=ISD)
    factor: float = math.pi / 2

    @property
    def label_dropout(self) -> float:
        return self.base.dropout

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        base = self.base
        x, v, t, s, cond, anchor = on_the_diagonal(base, flow_map, batch)
        rows = rows_on_and_off(t, s)[1]
        error = self.error(flow_map, x[rows], v.detach()[rows], t[rows], s[rows], cond[rows])
        total = anchor.index_add(0, rows, error_norm(error, base.norm, base.huber))
        return Losses(adaptive_weight(total, base.power, base.offset) * total, t, s, {"anchor": anchor.detach()})

    def error(self, flow_map: FlowMap, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """N - N_target with the wrong derivative, (B, ...)."""
        if len(x) == 0:
            return x

        def output(x: Tensor, t: Tensor) -> Tensor:
            return flow_map.output(x, t, s, cond)

        value, tangent = jvp(output, (x, t), (v, torch.full_like(t, self.factor)))
        return distillation_error(flow_map, x, v, value, tangent.detach(), t, s)
