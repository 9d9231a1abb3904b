"""Attention with forward-mode tangents, in memory that grows as the number of tokens (1706.03762, 2112.05682).

With S = c q k^T, P = softmax(S) and c = 1 / sqrt(D), the derivative of o = P v along (dq, dk, dv) is
    do = (P * dS) v - rowsum(P * dS) o + P dv,    dS = c (dq k^T + q dk^T).
A row of P needs one query alone, so queries go by in tiles, each against all keys; the backward pass computes a tile's
rows anew. A tangent without a graph may come from a kernel instead (attention_kernel.py).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from fewstep.networks.attention_kernel import kernel_tangent
from fewstep.utils.forward_ad import tangents_recorded

TILE = 2**18
"""Scores of one head in a tile, at most, where there is a tangent; as many are written out at once."""
COMPILED_TILES = 8
"""Of one attention in a compiled program, at most."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over tokens, each (B, heads, N, D); PyTorch's fused form where no tangent flows."""
    batched = not torch.compiler.is_compiling() and any(torch._C._functorch.is_batchedtensor(x) for x in (q, k, v))
    if batched:  # torch.func.vmap hides tangents
        return _weights(q, k) @ v
    pairs = [forward_ad.unpack_dual(x) for x in (q, k, v)]
    if all(pair.tangent is None for pair in pairs):
        return functional.scaled_dot_product_attention(q, k, v)
    compiling = torch.compiler.is_compiling()
    if q.shape[-2] * k.shape[-2] <= TILE or (compiling and tangents_recorded()):
        return _weights(q, k) @ v
    primal = [pair.primal for pair in pairs]
    tangent = [torch.zeros_like(x) if dx is None else dx for x, dx in pairs]
    if tangents_recorded():
        found, moved = _Tiled.apply(*primal, *tangent)  # type: ignore[no-untyped-call]
    else:
        found = functional.scaled_dot_product_attention(*primal)
        with torch.no_grad():
            by_kernel = None if compiling else kernel_tangent(*primal, *tangent)
            moved = _tiled(*primal, *tangent)[1] if by_kernel is None else by_kernel
    dual: Tensor = forward_ad.make_dual(found, moved)
    return dual


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """P, (B, heads, N, N)."""
    return ((q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)).softmax(-1)


def _rows(q: Tensor, dq: Tensor, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """(o, do) of some of the queries."""
    scale = 1 / math.sqrt(q.shape[-1])
    weights = _weights(q, k)
    turned = weights * ((scale * dq) @ k.transpose(-2, -1) + (scale * q) @ dk.transpose(-2, -1))
    found = weights @ v
    return found, turned @ v - turned.sum(-1, keepdim=True) * found + weights @ dv


def _tiles(k: Tensor, *of_queries: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors (B, heads, N, D) in the same tiles of queries; a compiled program has each written out one by one."""
    rows = max(1, TILE // k.shape[-2])
    if torch.compiler.is_compiling():
        rows = max(rows, -(-of_queries[0].shape[-2] // COMPILED_TILES))
    return zip(*(x.split(rows, -2) for x in of_queries), strict=True)


def _tiled(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """(o, do), a tile at a time, into places made before: pieces kept between tiles would break up the memory."""
    found, moved = (q.new_empty(*q.shape[:-1], v.shape[-1]) for _ in range(2))
    for into, into_tangent, rows, turned in _tiles(k, found, moved, q, dq):
        o, do = _rows(rows, turned, k, v, dk, dv)
        into.copy_(o)
        into_tangent.copy_(do)
    return found, moved


class _Tiled(torch.autograd.Function):
    """(q, k, v, dq, dk, dv) -> (o, do), which keeps no more than these for the backward pass."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return _tiled(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        device = inputs[0].device.type
        ctx.rounding = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, dq, dk, dv = (x.detach() for x in ctx.saved_tensors)
        keys = [x.requires_grad_() for x in (k, v, dk, dv)]
        device, dtype, rounds = ctx.rounding
        to_q, to_dq = torch.empty_like(q), torch.empty_like(dq)
        of_keys = [torch.zeros_like(x) for x in keys]
        for of_q, of_dq, own, own_tangent, *own_grads in _tiles(k, to_q, to_dq, q, dq, *grads):
            queries = [x.detach().requires_grad_() for x in (own, own_tangent)]
            with torch.enable_grad(), torch.autocast(device, dtype, rounds, False):
                outputs = _rows(*queries, *keys)
            given = [grad.to(output.dtype) for grad, output in zip(own_grads, outputs, strict=True)]
            parts = torch.autograd.grad(outputs, [*queries, *keys], given)
            of_q.copy_(parts[0])
            of_dq.copy_(parts[1])
            for total, part in zip(of_keys, parts[2:], strict=True):
                total += part
        to_k, to_v, to_dk, to_dv = of_keys
        return to_q, to_k, to_v, to_dq, to_dk, to_dv
