"""Objectives that only the stability study knows: a mistake and an alternative, kept out of the library."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fewstep import ISD, Batch, Companions, FlowMap, Losses, Objective
from fewstep.networks.condition import Condition
from fewstep.objectives import ALONE
from fewstep.objectives.eulerian import distillation_error
from fewstep.utils.forward_ad import jvp

Drawn = tuple[Tensor, Tensor, Tensor, Tensor, Condition]


def on_the_diagonal(base: ISD, flow_map: FlowMap, batch: Batch) -> tuple[Drawn, Tensor, Tensor]:
    """(x_t, v, t, s, condition) and the anchor's loss of iSD, before anything is weighted; rows of the second term."""
    t, s = base.pairs.draw(flow_map.path, batch)
    x, conditional = flow_map.path.sample(batch.x0, batch.noise(), t)
    cond = base.condition(flow_map, batch, t)
    target = base.guide(flow_map, batch, x, t, cond, conditional)
    v = flow_map.velocity(x, t, cond)
    return (x, v, t, s, cond), base.weighting.measure(v - target), batch.split(base.pairs.flow_matching_ratio)[1]


@final
@dataclass(frozen=True)
class ISDApart(Objective):
    """iSD whose two terms are each weighted by their own sg (loss + weight_eps)^-weight_power, per sample."""

    base: ISD = ISD()

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        weighting, (drawn, anchor, rows) = self.base.weighting, on_the_diagonal(self.base, flow_map, batch)
        x, _, t, s, _ = drawn
        part = [each[rows] for each in drawn]
        distill = weighting.measure(self.base.off_diagonal(flow_map, *part).error if len(rows) else x[rows])
        loss = weighting.weight(flow_map.path, anchor, t, x[0].numel()) * anchor
        loss = loss.index_add(0, rows, weighting.weight(flow_map.path, distill, t[rows], x[0].numel()) * distill)
        return Losses(loss, t, s, {"anchor": anchor.detach(), "distill": distill.detach()})


@final
@dataclass(frozen=True)
class ISDTimeUnit(Objective):
    """iSD with the time-unit error of the published code: dN/dt = J_N v + factor d_t N.

    On the trig path a network clocked in t/(pi/2) whose time tangent is passed as 1 has factor pi/2.
    """

    base: ISD = ISD()
    factor: float = math.pi / 2

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        weighting, (drawn, anchor, rows) = self.base.weighting, on_the_diagonal(self.base, flow_map, batch)
        x, _, t, s, _ = drawn
        error = self.error(flow_map, *(each[rows] for each in drawn)) if len(rows) else x[rows]
        total = anchor.index_add(0, rows, weighting.measure(error))
        weight = weighting.weight(flow_map.path, total, t, x[0].numel())
        return Losses(weight * total, t, s, {"anchor": anchor.detach()})

    def error(self, flow_map: FlowMap, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """N - N_target with the wrong derivative, (B, ...)."""
        v, dt = v.detach(), torch.full_like(t, self.factor)
        value, tangent = jvp(lambda x, t: flow_map.output(x, t, s, cond), (x, t), (v, dt))
        return distillation_error(flow_map, x, v, value, tangent.detach(), t, s)
