"""Whether an objective's forward-mode derivatives serve its network: tried once, where and as it is trained."""

import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor

from fewstep.flow.derivatives import Derivative, DerivativeKind, forward_mode_fault, no_forward_mode
from fewstep.flow.flow_map import FlowMap
from fewstep.objectives import Batch, Objective
from fewstep.utils.errors import FewstepWarning

T = TypeVar("T")
_T, _S = 0.6, 0.3  # unit times of the jump that is tried


def derivatives(value: object) -> list[Derivative]:
    """The derivatives among an objective's settings, in its parts too."""
    if isinstance(value, Derivative):
        return [value]
    inner = (getattr(value, item.name) for item in fields(value)) if is_dataclass(value) else ()
    return [found for each in inner for found in derivatives(each)]


def with_derivatives(value: T, kind: DerivativeKind) -> T:
    """An objective with all its derivatives of that kind."""
    if isinstance(value, Derivative):
        return replace(value, kind=kind)
    if not is_dataclass(value) or not derivatives(value):
        return value
    return replace(value, **{item.name: with_derivatives(getattr(value, item.name), kind) for item in fields(value)})  # type: ignore[type-var]


def needs_probe(objective: Objective) -> bool:
    """Whether it takes any derivative by forward mode."""
    return any(each.kind == "exact" for each in derivatives(objective))


def differentiable(
    objective: Objective, chosen: str | None, flow_map: FlowMap, batch: Callable[[], Batch], bf16: bool, loud: bool
) -> tuple[Objective, str]:
    """The objective with derivatives that serve the network, and their kind where that is not the objective's own.

    chosen: what a checkpoint says of them; None before the first step, when they are tried, as `serving` does.
    """
    kind = serving(objective, flow_map, batch, bf16, loud) if chosen is None else cast(DerivativeKind, chosen)
    return (with_derivatives(objective, kind) if kind else objective), kind


def serving(
    objective: Objective, flow_map: FlowMap, batch: Callable[[], Batch], bf16: bool, loud: bool
) -> Literal["", "finite-difference"]:
    """The kind of derivatives that serve a network, by a few samples of its own; '' for the objective's own.

    A FewstepWarning where forward mode is given up, if it may be said.
    """
    reason = fault(objective, flow_map, batch(), bf16) if needs_probe(objective) else ""
    if reason and loud:
        warnings.warn(no_forward_mode(reason), FewstepWarning, stacklevel=5)
    return "finite-difference" if reason else ""


def fault(objective: Objective, flow_map: FlowMap, batch: Batch, bf16: bool = False) -> str:
    """Why forward mode cannot be used on a few samples, or is not to be trusted; '' where it can be.

    Where the objective's gradient passes back through the derivative, that is tried too.
    """
    path, weights = flow_map.path, [each for each in flow_map.parameters() if each.requires_grad]
    t, s = (path.time_from_unit(torch.full_like(batch.draws.uniform(0), u)) for u in (_T, _S))
    x, v = path.sample(batch.x0, batch.noise(), t)
    cond, attached = objective.condition(flow_map, batch, t), objective.passes_back_tangents
    step = derivatives(objective)[0].step

    def exact() -> Tensor:
        _, along = Derivative("exact").along(flow_map, x, v, t, s, cond, attached)
        if attached and weights:
            torch.autograd.grad(along.sum(), weights, allow_unused=True)
        return along.detach()

    def difference(share: float) -> Tensor:
        with torch.no_grad():
            return Derivative("finite-difference", share * step).along(flow_map, x, v, t, s, cond)[1]

    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
        return forward_mode_fault(exact, difference)
