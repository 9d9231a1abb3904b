"""The total derivative dN/dt = J_N v + d_t N along the flow (math.md §5.4) and dN/ds, exact or by finite differences.

Forward-mode AD cannot cross every layer: fewstep's own networks are written so that it can (networks/layers.py);
a foreign network with fused attention or nn.GroupNorm on non-contiguous input needs the finite difference. Both
assume a deterministic network: no dropout between the evaluations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.networks.condition import Condition
from fewstep.utils.precision import float32_products, rounding
from fewstep.utils.tensors import check_choice, check_positive, expand

RowsFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""N at (x, t), of the samples of the batch that `rows` (int64) names."""
DerivativeKind = Literal["exact", "finite-difference"]

MIN_STEP = 1e-4
_LOOSE = 0.25  # of a derivative, that forward mode may be off


def finite_difference_nodes(
    t: Tensor, low: Tensor, high: Tensor | float, step: float, scale: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Two offsets (a, b) from t for a second-order difference that stays within [low, high].

    Central (-h, h) inside; (-h, -2h) where t + h > high; (h, 2h) where t - h < low. h shrinks to a third of the
    interval when that is shorter than 3 h, but never below 1e-4. step and that limit are in units of `scale`, the time
    over which the path changes (Path.time_scale).
    """
    h = torch.clamp((high - low) / (3 * scale), min=MIN_STEP, max=step) * scale
    above, below = t + h > high, t - h < low
    first = torch.where(below & ~above, h, -h)
    second = torch.where(above, -2 * h, torch.where(below, 2 * h, h))
    return first, second


def finite_derivative(
    fn: RowsFunction, x: Tensor, t: Tensor, v: Tensor, nodes: tuple[Tensor, Tensor], attached: bool = False
) -> tuple[Tensor, Tensor]:
    """(N, dN/dt) with dN/dt by the parabola through offsets 0, a, b: error O(h^2) inside and at both ends.

    N keeps its graph. Both offsets are evaluated in one batch, (2B, ...), without a graph unless `attached`.
    """
    rows = torch.arange(len(x), device=x.device)
    output = fn(x, t, rows)
    # A difference over h amplifies rounding by 1/h: its three points are taken in full precision.
    rounded = torch.is_autocast_enabled(x.device.type) or (x.is_cuda and rounding())
    exactly = torch.autocast(x.device.type, enabled=False), float32_products(tf32=False)
    with torch.set_grad_enabled(attached and torch.is_grad_enabled()), exactly[0], exactly[1]:
        centre = fn(x, t, rows) if rounded else output
        shifted_x = torch.cat([x + expand(node, x).to(x.dtype) * v for node in nodes])
        shifted = fn(shifted_x, torch.cat([t + node for node in nodes]), rows.repeat(2)).chunk(2)
        return output, parabola_slope(centre, shifted, nodes)


def parabola_slope(centre: Tensor, values: Sequence[Tensor], nodes: tuple[Tensor, Tensor]) -> Tensor:
    """The slope at 0 of the parabola through N_0 = centre and the values (B, ...) at the nodes a and b, (B,) each.

    d = [(N_a - N_0) b^2 - (N_b - N_0) a^2] / (a b (b - a)); for a = -h, b = h it is the central difference.
    """
    (a, b), (at_a, at_b) = nodes, values
    scale = a * b * (b - a)
    weight_a, weight_b = (expand(w, centre).to(centre.dtype) for w in (b * b / scale, -(a * a) / scale))
    return weight_a * (at_a - centre) + weight_b * (at_b - centre)


@final
@dataclass(frozen=True)
class Derivative:
    """How dN/dt, the total derivative of N(x, t, s) along the flow, or dN/ds is taken (math.md section 5.4)."""

    kind: DerivativeKind = "exact"
    """exact, by forward-mode AD, or finite-difference, by evaluations beside the time."""
    step: float = 0.005
    """Step of the finite difference, above 0, in units of the path's or network's time scale; 0.005 in iSD."""

    def __post_init__(self) -> None:
        check_choice("derivative", self.kind, get_args(DerivativeKind))
        check_positive(step=self.step)

    def evaluations(self, bf16: bool = False) -> tuple[float, float]:
        """What it adds to the evaluation of N, in evaluations, a tangent as one; how many bf16 leaves in float32."""
        if self.kind == "exact":
            return 1.0, 0.0
        return (3.0, 3.0) if bf16 else (2.0, 0.0)

    def along(
        self, flow_map: FlowMap, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: Condition, attached: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(N, dN/dt) at (x, t, s) along v; N keeps its graph, dN/dt keeps its own if `attached`."""
        t, s = flow_map.path.clock(t), flow_map.path.clock(s)
        if self.kind == "exact":
            return flow_map.with_tangent(x, t, s, cond, (v, torch.ones_like(t), None), attached)
        nodes = finite_difference_nodes(t, s, flow_map.path.t_max, self.step, _time_scale(flow_map, t))
        return finite_derivative(
            lambda x, t, rows: flow_map.output(x, t, s[rows], cond[rows]), x, t, v, nodes, attached
        )

    def at_end(
        self, flow_map: FlowMap, x: Tensor, t: Tensor, s: Tensor, cond: Condition, attached: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(N, dN/ds) at (x, t, s), s the time where the jump ends; graphs as in `along`."""
        t, s = flow_map.path.clock(t), flow_map.path.clock(s)
        if self.kind == "exact":
            return flow_map.with_tangent(x, t, s, cond, (None, None, torch.ones_like(s)), attached)
        low = torch.full_like(s, flow_map.path.t_min)
        nodes, still = finite_difference_nodes(s, low, t, self.step, _time_scale(flow_map, s)), torch.zeros_like(x)
        return finite_derivative(
            lambda x, s, rows: flow_map.output(x, t[rows], s, cond[rows]), x, s, still, nodes, attached
        )


def forward_mode_fault(exact: Callable[[], Tensor], difference: Callable[[float], Tensor]) -> str:
    """Why forward mode cannot be used, or is not to be trusted; '' where it can be.

    exact: the derivative by forward mode. difference: the same by differences with that share of their step. Forward
    mode fails where a layer has no formula for it, and is wrong where a layer lets a tangent fall: then differences
    of two steps agree with each other, and not with it. Raises what `difference` raises.
    """
    try:
        found = exact().double()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        difference(1.0)  # what fails here too is no matter of forward mode
        return " ".join(str(error).split()).partition(". ")[0][:160]
    with torch.no_grad():
        coarse, fine = (difference(share).double() for share in (1.0, 0.5))
        size, spread, error_size = (float(value.norm()) for value in (fine, fine - coarse, found - fine))
    if not math.isfinite(spread) or error_size <= _LOOSE * size + 4 * spread:
        return ""  # where differences are not finite nothing can be told
    return f"the derivative is off by {100 * error_size / size:.0f} % of that by differences"


def no_forward_mode(reason: str) -> str:
    """What is said where forward mode is given up."""
    return f"forward-mode derivatives do not serve this network ({reason}): finite differences are taken"


def _time_scale(flow_map: FlowMap, t: Tensor) -> Tensor:
    return torch.minimum(flow_map.path.time_scale(t), flow_map.scaling.time_scale(t))
