"""Whether a GPU may round the factors of float32 products to TF32's 10 bits, which is quicker."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
