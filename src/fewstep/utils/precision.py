"""What products may be rounded to: TF32's 10 bits on a GPU, bf16 under autocast."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def rounding() -> bool:
    """Whether products or convolutions in float32 may be rounded."""
    return bool(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Inside, products and convolutions in float32 are rounded to TF32 where the GPU has it, or exact."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def without_autocast(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A method (self, x, ...) whose products keep the type of x, whatever autocast is on around it."""

    @wraps(method)
    def kept(self: object, x: Tensor, *given: Any) -> Tensor:
        device = x.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return method(self, x, *given)
        with torch.autocast(device, enabled=False):
            return method(self, x, *given)

    return kept
