"""Objectives and settings that only the stability study knows: mistakes and alternatives, kept out of the library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.networks.condition import Condition
from fewstep.objectives import ALONE, ISD, Batch, Companions, Losses, Objective
from fewstep.objectives.eulerian import distillation_error
from fewstep.objectives.losses import Comparison
from fewstep.utils.forward_ad import jvp


def on_the_diagonal(
    base: ISD, flow_map: FlowMap, batch: Batch
) -> tuple[Tensor, Tensor, Tensor, Tensor, Condition, Tensor]:
    """(x_t, v, t, s, condition, anchor's loss) of iSD, before anything is weighted."""
    t, s = base.pairs.draw(flow_map.path, batch)
    x, conditional = flow_map.path.sample(batch.x0, batch.noise(), t)
    cond = base.condition(flow_map, batch, t)
    target = base.guide(flow_map, batch, x, t, cond, conditional)
    v = flow_map.velocity(x, t, cond)
    return x, v, t, s, cond, base.weighting.measure(v - target)


@final
@dataclass(frozen=True)
class ISDApart(Objective):
    """iSD whose two terms are each weighted by their own sg (loss + weight_eps)^-weight_power, per sample."""

    base: ISD = ISD()

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        base = self.base
        x, v, t, s, cond, anchor = on_the_diagonal(base, flow_map, batch)
        rows = batch.split(base.pairs.flow_matching_ratio)[1]
        compared = (
            base.off_diagonal(flow_map, x[rows], v[rows], t[rows], s[rows], cond[rows])
            if len(rows)
            else Comparison(x[rows], x[rows])
        )
        distill = base.weighting.measure(compared.error)
        loss = base.weighting.weight(flow_map.path, anchor, t, x[0].numel()) * anchor
        loss = loss.index_add(0, rows, base.weighting.weight(flow_map.path, distill, t[rows], x[0].numel()) * distill)
        logs = {"anchor": anchor.detach(), "distill": distill.detach()}
        return Losses(loss, t, s, logs)


@final
@dataclass(frozen=True)
class ISDTimeUnit(Objective):
    """iSD with the time-unit error of the published code: dN/dt = J_N v + factor d_t N.

    On the trig path a network clocked in t/(pi/2) whose time tangent is passed as 1 has factor pi/2.
    """

    base: ISD = ISD()
    factor: float = math.pi / 2

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        base = self.base
        x, v, t, s, cond, anchor = on_the_diagonal(base, flow_map, batch)
        rows = batch.split(base.pairs.flow_matching_ratio)[1]
        error = self.error(flow_map, x[rows], v.detach()[rows], t[rows], s[rows], cond[rows])
        total = anchor.index_add(0, rows, base.weighting.measure(error))
        weight = base.weighting.weight(flow_map.path, total, t, x[0].numel())
        return Losses(weight * total, t, s, {"anchor": anchor.detach()})

    def error(self, flow_map: FlowMap, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """N - N_target with the wrong derivative, (B, ...)."""
        if len(x) == 0:
            return x

        def output(x: Tensor, t: Tensor) -> Tensor:
            return flow_map.output(x, t, s, cond)

        value, tangent = jvp(output, (x, t), (v, torch.full_like(t, self.factor)))
        return distillation_error(flow_map, x, v, value, tangent.detach(), t, s)
