"""What the backward pass computes anew, so that it need not be kept (1604.06174), is told apart from first passes."""

import threading
from contextlib import AbstractContextManager, nullcontext


class _Now(threading.local):
    def __init__(self) -> None:
        self.depth = 0


_NOW = _Now()


def recomputing() -> bool:
    """Whether what is computed now has been computed before."""
    return _NOW.depth > 0


class Anew(AbstractContextManager[None]):
    """Inside, what is computed has been computed before; entered as often as gradients are taken of one graph."""

    def __enter__(self) -> None:
        _NOW.depth += 1

    def __exit__(self, *error: object) -> None:
        _NOW.depth -= 1


def first_and_anew() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first pass and the one that repeats it, as `torch.utils.checkpoint.checkpoint` takes them."""
    return nullcontext(), Anew()
