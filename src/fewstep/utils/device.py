"""The device of work that is not training, which places itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_STAYS = ContextVar("stays on the CPU", default=False)


def best_device() -> torch.device:
    """The GPU where there is one, outside `placed(cpu=True)`."""
    return torch.device("cuda" if torch.cuda.is_available() and not _STAYS.get() else "cpu")


@contextmanager
def placed(cpu: bool) -> Iterator[None]:
    """Inside, `best_device` is the CPU where `cpu` says so."""
    token = _STAYS.set(cpu or _STAYS.get())
    try:
        yield
    finally:
        _STAYS.reset(token)
