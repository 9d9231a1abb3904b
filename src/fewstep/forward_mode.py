"""Forward-mode differentiation with a type that checkers can follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def jvp(fn: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """(fn(*primals), its directional derivative along the tangents)."""
    found = torch.func.jvp(fn, primals, tangents)
    return found[0], found[1]
