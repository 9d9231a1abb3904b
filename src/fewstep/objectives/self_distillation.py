"""Self-distillation of "How to build a consistency model" (2505.18825; math.md section 5.2): ESD, LSD and PSD.

Each holds jumps of the map against one another where s < t. The paper's learned weight in (t, s) is left out of all
three; w of `Weighting`, which the paper does not have, is 1 by default.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from fewstep.flow.derivatives import Derivative
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import Path
from fewstep.networks.condition import Condition
from fewstep.objectives.base import STREAM_U, Batch
from fewstep.objectives.eulerian import eulerian_residual
from fewstep.objectives.losses import Comparison
from fewstep.objectives.pairs import JointObjective, PairObjective
from fewstep.utils.forward_ad import jvp
from fewstep.utils.tensors import check_choice, expand


@final
@dataclass(frozen=True, kw_only=True)
class ESD(JointObjective):
    """Eulerian self-distillation: loss = w (|v(x_t, t) - v*|^2 + |R|^2), R = d/dt X(x_t, t, s), nothing detached.

    R is taken along the model's own velocity. The gradient flows through N, v and dN/dt: reverse mode over the
    forward-mode derivative, or over the points of a finite difference. Its norm is excessive where the spatial
    Jacobian is large; clip it.
    """

    derivative: Derivative = Derivative()

    passes_back_tangents: ClassVar[bool] = True

    def off_diagonal(
        self, flow_map: FlowMap, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: Condition
    ) -> Comparison:
        output, d_output = self.derivative.along(flow_map, x, v, t, s, cond, attached=True)
        return Comparison(-eulerian_residual(flow_map, x, v, output, d_output, t, s, cond), output, d_output)


@final
@dataclass(frozen=True, kw_only=True)
class LSD(PairObjective):
    """Lagrangian self-distillation: |d_s X(x_t, t, s) - sg v(X(x_t, t, s), s)|^2.

    The velocity is detached, and so is the point where it is taken, as in the paper's experiments: what the diagonal
    knows flows outwards, and no spatial Jacobian is multiplied. The gradient flows through d_s X: through N and, in
    reverse mode over forward mode or over a finite difference, through dN/ds.
    """

    derivative: Derivative = Derivative()

    @property
    def anchored(self) -> bool:
        return self.pairs.flow_matching_ratio > 0

    differentiates: ClassVar[bool] = True
    passes_back_tangents: ClassVar[bool] = True

    def off_diagonal(self, flow_map: FlowMap, batch: Batch, t: Tensor, s: Tensor) -> Comparison:
        x = flow_map.path.interpolate(batch.x0, batch.noise(), t)
        cond = self.condition(flow_map, batch, t)
        reached, d_reached, d_output = moving_end(self.derivative, flow_map, x, t, s, cond)
        with torch.no_grad():
            v = flow_map.velocity(reached, s, cond)
        return Comparison(d_reached - v, d_reached, d_output)


@final
@dataclass(frozen=True, kw_only=True)
class PSD(PairObjective):
    """Progressive self-distillation: |X(x_t, t, s) - sg X(X(x_t, t, u), u, s)|^2/(t - s)^2 with s < u < t."""

    u: Literal["uniform", "midpoint"] = "uniform"
    """Where the short jumps meet: uniform between t and s or their middle, where `times` is uniform."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("u", self.u, ("uniform", "midpoint"))

    @property
    def anchored(self) -> bool:
        return self.pairs.flow_matching_ratio > 0

    def off_diagonal(self, flow_map: FlowMap, batch: Batch, t: Tensor, s: Tensor) -> Comparison:
        x = flow_map.path.interpolate(batch.x0, batch.noise(), t)
        u = self.between(flow_map.path, batch)
        cond = self.condition(flow_map, batch, t)
        with torch.no_grad():
            goal = flow_map.jump(flow_map.jump(x, t, u, cond), u, s, cond)
        return semigroup(flow_map, x, t, s, cond, goal)

    def between(self, path: Path, batch: Batch) -> Tensor:
        """u of samples with s < t, (B,): a draw, or the middle, between the quantiles of s and t."""
        return self.pairs.between(path, batch, batch.draws.uniform(STREAM_U) if self.u == "uniform" else 0.5)


def moving_end(
    derivative: Derivative, flow_map: FlowMap, x: Tensor, t: Tensor, s: Tensor, cond: Condition
) -> tuple[Tensor, Tensor, Tensor]:
    """(X, d_s X, dN/ds) at (x, t, s), each with its graph: where a jump ends, and how fast its end moves with s."""
    output, d_output = derivative.at_end(flow_map, x, t, s, cond, attached=True)

    def jump(s: Tensor, output: Tensor) -> Tensor:
        return flow_map.apply_jump(x, output, t, s, cond)

    reached, d_reached = jvp(jump, (s, output), (torch.ones_like(s), d_output))
    return reached, d_reached, d_output


def semigroup(flow_map: FlowMap, x: Tensor, t: Tensor, s: Tensor, cond: Condition, goal: Tensor) -> Comparison:
    """(X(x, t, s) - x)/(t - s) against (goal - x)/(t - s): for linear preconditioning mean velocities."""
    gap = expand(torch.where(t > s, t - s, 1.0), x).to(x.dtype)
    reached = flow_map.jump(x, t, s, cond)
    return Comparison((reached - goal) / gap, (reached - x) / gap)
