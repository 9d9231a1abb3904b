"""Blocks that keep no activations: the backward pass computes them anew (1604.06174), also of a pass with tangents.

Forward-mode tangents are gone when the backward pass comes. A block that they pass through is therefore differentiated
as a whole, as a function of its inputs and their tangents: what it gives is computed without a graph, and once more
with one, from the inputs that are kept. Where no gradient flows through the tangents the second pass goes without them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fewstep.utils.forward_ad import jvp, tangents_recorded
from fewstep.utils.recompute import Anew, first_and_anew


def recomputed(block: nn.Module, *args: Any, draws: bool = False) -> Tensor:
    """block(*args), a tensor; args: tensors and what has no gradient. draws: whether the block draws random numbers,
    which then are the same in the second pass; one that tangents pass through must not.
    """
    pairs = [forward_ad.unpack_dual(x) for x in args if isinstance(x, Tensor)]
    moved, within = any(tangent is not None for _, tangent in pairs), torch._C._functorch.peek_interpreter_stack()
    if moved and within is not None:
        return _through(block, args, pairs)
    if moved or within is not None:  # forward_ad by itself, whose levels do not nest; other transforms of torch.func
        return cast(Tensor, block(*args))
    return cast(
        Tensor,
        checkpoint(block, *args, use_reentrant=False, preserve_rng_state=draws, context_fn=first_and_anew),
    )


def _through(block: nn.Module, args: tuple[Any, ...], pairs: Sequence[Any]) -> Tensor:
    primals = [primal for primal, _ in pairs]
    tangents = [torch.zeros_like(x) if tangent is None else tangent for x, tangent in pairs]
    device, recorded = primals[0].device.type, tangents_recorded()
    weights = [weight for weight in block.parameters() if weight.requires_grad]
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
    run = _Run(block, args, device, autocast, weights, recorded)
    found, moved = _Anew.apply(run, *primals, *tangents, *weights)  # type: ignore[no-untyped-call]
    dual: Tensor = forward_ad.make_dual(found, moved if recorded else moved.detach())
    return dual


@dataclass(frozen=True, eq=False)
class _Run:
    """A pass through a block. args: its arguments, None for each tensor. autocast: enabled, type, cache."""

    block: nn.Module
    args: tuple[Any, ...]
    device: str
    autocast: tuple[bool, torch.dtype, bool]
    weights: list[nn.Parameter]
    recorded: bool

    def __post_init__(self) -> None:
        kept = tuple(None if isinstance(each, Tensor) else each for each in self.args)
        object.__setattr__(self, "args", kept)

    @property
    def count(self) -> int:
        """Of the tensors among the arguments."""
        return sum(each is None for each in self.args)

    def output(self, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        return cast(Tensor, self.block(*(next(given) if each is None else each for each in self.args)))

    def with_tangent(self, tensors: Sequence[Tensor], attached: bool) -> tuple[Tensor, Tensor]:
        primals, tangents = tensors[: self.count], tensors[self.count :]
        return jvp(self.output, tuple(primals), tuple(tangents), attached)

    def as_then(self) -> AbstractContextManager[Any]:
        enabled, dtype, cache = self.autocast
        return torch.autocast(self.device, dtype, enabled, cache)


class _Anew(torch.autograd.Function):
    """(run, inputs, their tangents, weights) -> (output, its tangent)."""

    @staticmethod
    def forward(run: _Run, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return run.with_tangent(tensors[: 2 * run.count], attached=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        run, tensors = inputs[0], inputs[1:]
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[: run.count * (2 if run.recorded else 1)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        run: _Run = ctx.run
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad(), run.as_then(), Anew():
            outputs = run.with_tangent(inputs, attached=True) if run.recorded else (run.output(*inputs),)
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=False) if grad is not None]
        if not pairs:
            return (None,) * (1 + 2 * run.count + len(run.weights))
        found = torch.autograd.grad(
            [out for out, _ in pairs], [*inputs, *run.weights], [grad for _, grad in pairs], allow_unused=True
        )
        of_inputs, of_weights = found[: len(inputs)], found[len(inputs) :]
        return None, *of_inputs, *((None,) * (2 * run.count - len(inputs))), *of_weights
