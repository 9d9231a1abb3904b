"""MeanFlow (2505.13447): the conditional velocity drives the tangent of the Eulerian identity."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from fewstep.flow.derivatives import Derivative
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.times import LogitNormalTimes
from fewstep.objectives.base import Batch
from fewstep.objectives.eulerian import eulerian_error
from fewstep.objectives.losses import Comparison, Weighting
from fewstep.objectives.pairs import PairObjective, Pairs


@final
@dataclass(frozen=True, kw_only=True)
class MeanFlow(PairObjective):
    """loss = w |N - sg N_target|^2, for linear preconditioning N_target = v* - (t - s)(J_N v* + d_t N).

    v* = alpha' x0 + sigma' eps, with guidance omega v* + (1 - omega) v(x_t, t | null) for samples that keep their
    label, the second term the model's own without gradient. Where s = t the loss is w |v(x_t, t) - v*|^2: nothing but
    the data anchors the map.

    Source: 2505.13447; for any preconditioning math.md section 5.1.
    Deviations: the second mixing scale kappa is left out; weight_eps is added to a mean of squares, but for
    `weighting.eps_of_sum`, which is the paper's.
    """

    pairs: Pairs = Pairs(times=LogitNormalTimes())
    weighting: Weighting = Weighting(weight_power=1.0, weight_eps=0.001)
    derivative: Derivative = Derivative()

    differentiates: ClassVar[bool] = True

    def off_diagonal(self, flow_map: FlowMap, batch: Batch, t: Tensor, s: Tensor) -> Comparison:
        x, v = flow_map.path.sample(batch.x0, batch.noise(), t)
        cond = self.condition(flow_map, batch, t)
        v = self.guide(flow_map, batch, x, t, cond, v)
        output, d_output = self.derivative.along(flow_map, x, v, t, s, cond)
        return eulerian_error(flow_map, x, v, output, d_output, t, s, cond)
