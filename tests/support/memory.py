"""What a computation holds at once, by its tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Largest:
    """The elements of the largest tensor that an operation gave."""

    elements: int = 0


class _Watch(TorchDispatchMode):
    def __init__(self, seen: Largest) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(value, torch.Tensor):
                self.seen.elements = max(self.seen.elements, value.numel())
        return found


@contextmanager
def largest_tensor() -> Iterator[Largest]:
    """The largest tensor that any operation within gives, in the backward pass too."""
    seen = Largest()
    with _Watch(seen):
        yield seen
