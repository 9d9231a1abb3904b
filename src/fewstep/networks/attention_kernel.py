"""The tangent of attention by the kernel of jvp-flash-attention (extra [gpu]), where it serves.

JVPAttn.forward gives do of attention.py in blocks of 32 queries and 32 keys, without a score in memory. It returns do
as a constant, whose gradient its backward pass drops, so that it serves where reverse mode does not pass through
tangents. The number of tokens must be a multiple of its blocks, and its products in float32 are rounded to TF32.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

DEVICES, DTYPES = ("cuda",), (torch.float16, torch.bfloat16)
BLOCK, WIDTHS = 32, (32, 64, 128, 256)
"""What tokens are a multiple of; and D of a head."""
_BROKEN_TRITON = (3, 9)
"""The first version in which its kernel for GPUs before Hopper does not compile."""
_wanted = True


@contextmanager
def tangent_kernel(wanted: bool) -> Iterator[None]:
    """Inside, the kernel is taken where it serves, or never."""
    global _wanted
    before, _wanted = _wanted, wanted
    try:
        yield
    finally:
        _wanted = before


def kernel_tangent(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor | None:
    """do (B, heads, N, D) without a graph, in the type that autocast gives to products; None where the kernel does
    not serve: its package is not there, or these tensors are not for it.
    """
    if not (_wanted and q.device.type in DEVICES):
        return None
    inputs = [_cast(x) for x in (q, k, v, dq, dk, dv)]
    if not (_serves(inputs) and kernel_installed()):
        return None
    found: Tensor = attention_tangent(*(x.contiguous() for x in inputs))
    return found


def _cast(x: Tensor) -> Tensor:
    """As autocast casts the factors of a product."""
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if cast else x


def _serves(inputs: list[Tensor]) -> bool:
    q = inputs[0]
    alike = all(x.shape == q.shape and x.dtype == q.dtype for x in inputs)
    return alike and q.dtype in DTYPES and q.shape[-1] in WIDTHS and q.shape[-2] % BLOCK == 0


def kernel_installed() -> bool:
    """Whether the package, and a Triton that it works with, can be imported."""
    return _kernel() is not None


@cache
def _kernel() -> Any:
    try:
        from jvp_flash_attention.jvp_attention import JVPAttn
    except ImportError:
        return None
    version = getattr(sys.modules.get("triton"), "__version__", "0.0")
    usable = tuple(int(part) for part in version.split(".")[:2]) < _BROKEN_TRITON
    return JVPAttn if usable else None


@torch.library.custom_op("fewstep::attention_tangent", mutates_args=())
def attention_tangent(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """do of contiguous tensors of one shape and type: an operation, which functorch unwraps for and FLOPs count."""
    found: Tensor = _kernel().forward(q, k, v, dq, dk, dv)[1][0]
    return found
