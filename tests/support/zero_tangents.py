"""Forward mode of small tensors without the cost of torch's shapes in Python.

Where one factor has a tangent and the other has none, torch takes the other's to be a tensor of zeros without memory,
and asks its Meta kernels for the product's shape. These are decompositions in Python: a millisecond an operation, most
of what a test of a derivative takes. Shapes by broadcasting alone say the same of a tensor that has no memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest

import torch
from torch import Tensor


def common(one: torch.Size, other: torch.Size) -> torch.Size:
    """As torch.broadcast_shapes, of shapes that are known to fit."""
    if one == other:
        return one
    sizes = zip_longest(reversed(one), reversed(other), fillvalue=1)
    return torch.Size([second if first == 1 else first for first, second in sizes][::-1])


def broadcast(one: Tensor | float, other: Tensor | float, alpha: float = 1) -> Tensor:
    """An empty tensor of the result's shape and dtype; its strides mean nothing."""
    if not isinstance(one, Tensor):
        one, other = other, one
    assert isinstance(one, Tensor)
    if not isinstance(other, Tensor):
        return torch.empty(one.shape, dtype=torch.result_type(one, other), device="meta")
    dtype = one.dtype if one.dtype == other.dtype else torch.result_type(one, other)
    return torch.empty(common(one.shape, other.shape), dtype=dtype, device="meta")


def quotient(one: Tensor | float, other: Tensor | float) -> Tensor:
    """The same for a division, whose result is never of integers."""
    found = broadcast(one, other)
    return found if found.dtype.is_floating_point else found.to(torch.get_default_dtype())


OPERATIONS = {"add.Tensor": broadcast, "sub.Tensor": broadcast, "mul.Tensor": broadcast, "div.Tensor": quotient}


@contextmanager
def shapes_by_broadcasting() -> Iterator[None]:
    """While it is on nothing may be compiled or traced, which asks Meta kernels for strides."""
    library = torch.library.Library("aten", "IMPL")
    for name, shape in OPERATIONS.items():
        library.impl(name, shape, "Meta", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
