"""What only the stability study knows of iSD: a mistake and an alternative, kept out of the library."""

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from fewstep import ISD, Batch, Companions, Condition, FlowMap, Losses, Objective
from fewstep.objectives import ALONE
from fewstep.utils.forward_ad import jvp


@final
@dataclass(frozen=True)
class ISDApart(Objective):
    """iSD whose two terms are each weighted by their own sg (loss + weight_eps)^-weight_power, per sample."""

    base: ISD = ISD()

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        weighting, numbers = self.base.weighting, batch.x0[0].numel()
        found = replace(self.base, weighting=replace(weighting, weight_power=0.0))(flow_map, batch, companions)
        weights = {key: weighting.weight(flow_map.path, term, found.t, numbers) for key, term in found.terms.items()}
        terms = {key: weights[key] * term for key, term in found.terms.items()}
        return replace(found, loss=terms["anchor"] + terms["distill"], terms=terms)


@final
@dataclass(frozen=True)
class TimeUnitError:
    """The derivative of the published code, dN/dt = J_N v + factor d_t N, in place of `Derivative`.

    On the trig path a network clocked in t/(pi/2) whose time tangent is passed as 1 has factor pi/2.
    """

    factor: float = math.pi / 2

    def along(
        self, flow_map: FlowMap, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: Condition
    ) -> tuple[Tensor, Tensor]:
        """(N, dN/dt) at (x, t, s) along v, dN/dt without its graph."""
        tangents = (v, torch.full_like(t, self.factor))
        return jvp(lambda x, t: flow_map.output(x, t, s, cond), (x, t), tangents, attached=False)
