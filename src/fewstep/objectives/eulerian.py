"""The Eulerian identity d/dt X(x_t, t, s) = 0 (math.md section 5.1): its residual, and the error of N against it."""

import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.networks.condition import Condition
from fewstep.objectives.losses import Comparison
from fewstep.utils.tensors import expand

Given = Condition | None


def eulerian_residual(
    flow_map: FlowMap, x: Tensor, v: Tensor, output: Tensor, d_output: Tensor, t: Tensor, s: Tensor, cond: Given = None
) -> Tensor:
    """R, the derivative in t of X(x_t, t, s) along the flow: `Preconditioning.residual`; zero at an exact flow map.

    x, v, N = output, dN/dt = d_output: (B, ...); t, s: (B,).
    """
    return flow_map.jumping(cond).residual(flow_map.path, x, v, output, d_output, t, s)


def eulerian_error(
    flow_map: FlowMap, x: Tensor, v: Tensor, output: Tensor, d_output: Tensor, t: Tensor, s: Tensor, cond: Given = None
) -> Comparison:
    """Error against the self-distillation target, with gradient through N = output alone: `step_error` of R."""
    residual = eulerian_residual(flow_map, x, v, output.detach(), d_output, t, s, cond)
    return step_error(flow_map, x, output, d_output, residual, t, s, cond)


def step_error(
    flow_map: FlowMap,
    x: Tensor,
    output: Tensor,
    d_output: Tensor,
    residual: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Given = None,
) -> Comparison:
    """Error against a step along R = residual, or what has become of it; gradient through N = output alone; its sides.

    Where the preconditioning allows it the target is N_target = sg(N + R) and the error N - N_target; otherwise the
    step is taken in the map, X_target = sg(X - (t - s) R), what is compared (X - x)/(t - s), and the error
    (X - X_target)/(t - s) = g/(t - s) (N - sg N) + R, whose limit at s = t has g/(t - s) -> -g_s.
    """
    frozen = output.detach()
    if flow_map.preconditioning.target_in_network:
        return Comparison((output - frozen) - residual, output, d_output)
    gap = torch.where(t > s, t - s, 1.0)
    g, g_s = flow_map.preconditioning.coefficients(t, s)[1], flow_map.preconditioning.diagonal(t)[1]
    error = expand(torch.where(t > s, g / gap, -g_s), x).to(x.dtype) * (output - frozen) + residual
    return Comparison(error, (flow_map.apply_jump(x, frozen, t, s, cond) - x) / expand(gap, x).to(x.dtype), d_output)
