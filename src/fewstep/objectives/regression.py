"""Least squares: what a policy cloned without any flow does."""

from dataclasses import dataclass
from typing import final

import torch

from fewstep.flow.flow_map import FlowMap, at
from fewstep.objectives.base import ALONE, Acting, Batch, Companions, Losses, Objective
from fewstep.utils.tensors import per_sample_mean


@final
@dataclass(frozen=True, kw_only=True)
class Regression(Objective):
    """|X(0, t_max, t_min) - x0|^2: one jump from no noise at all, which learns E[x0 | condition].

    With the network and the loop of the others it is the baseline that has no answer where demonstrations differ. A
    policy of it starts from zero in place of noise.
    """

    def method(self, preconditioning: str, labelled: bool) -> str:
        return "regression"

    endpoint_only = True

    @property
    def acting(self) -> Acting:
        return "mean"

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        x0, path = batch.x0, flow_map.path
        t, s = at(path.t_max, x0), at(path.t_min, x0)
        mean = flow_map.jump(torch.zeros_like(x0), t, s, self.condition(flow_map, batch, t))
        loss = per_sample_mean(batch.masked(mean - x0).square())
        return Losses(loss, t, s, {"regression": loss.detach()})
