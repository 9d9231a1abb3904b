"""Forward-mode differentiation with a type that checkers can follow, and without a graph where none is wanted."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _Tangents(threading.local):
    def __init__(self) -> None:
        self.recorded = True  # of the instance: torch.compile reads a class's attribute once for all


_TANGENTS = _Tangents()


def tangents_recorded() -> bool:
    """Whether reverse mode will pass through tangents: layers may take theirs without a graph where it will not."""
    return _TANGENTS.recorded


@contextmanager
def _recording(tangents: bool) -> Iterator[None]:
    before, _TANGENTS.recorded = _TANGENTS.recorded, tangents
    try:
        yield
    finally:
        _TANGENTS.recorded = before


def jvp(
    fn: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], attached: bool = True
) -> tuple[Any, Any]:
    """(fn(*primals), its directional derivative along the tangents); the derivative has no graph unless `attached`.

    Products with weights in fewstep's layers then record none on the way either, which takes a third off the memory of
    a transformer's pass. A derivative within `fn` that has to keep its graph is taken by this function, not by torch's.
    """
    with _recording(attached):
        found = torch.func.jvp(fn, primals, tangents)
    return found[0], found[1] if attached else found[1].detach()
