"""Shapes and choices: expand per-sample values over samples, and say clearly what does not fit."""

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fewstep.utils.errors import ConfigError, ShapeError


def expand(value: Tensor, like: Tensor) -> Tensor:
    """View per-sample values (B,) or a scalar () so that they broadcast over `like` (B, ...)."""
    if value.ndim == 0:
        return value
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


class Copies:
    """Tensors in other types and on other devices, by name: each copied once, for what is used in every step.

    Copied or pickled it is empty.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def of(self, name: str, own: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """`own`, which the name stands for, in a type on a device."""
        key = (name, device, dtype)
        if key in self._found:
            return self._found[key]
        found = own.to(device, dtype)
        # What is traced, made in inference mode, or wrapped by a transform of torch.func is of no use afterwards.
        if type(found) is Tensor and not (torch.compiler.is_compiling() or found.is_inference() or is_wrapped(found)):
            self._found[key] = found
        return found

    def __reduce__(self) -> tuple[type["Copies"], tuple[()]]:
        return Copies, ()


def is_wrapped(x: Tensor) -> bool:
    """Whether a transform of torch.func stands around it."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def rows_where(mask: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Rows (k,) int64 where a mask (B,) on the host holds, on a device, the host where none is given.

    A mask on another device would make the host wait for it: TypeError.
    """
    rows = torch.from_numpy(np.flatnonzero(_array(mask)))
    return rows if device is None else rows.to(device, non_blocking=True)


def on_host(value: Tensor) -> bool:
    """Whether to look at its values makes nobody wait."""
    return value.device.type == "cpu"


def holds_everywhere(mask: Tensor) -> bool:
    """Whether a mask on the host holds in all places."""
    return bool(_array(mask).all())


def _array(mask: Tensor) -> np.ndarray:
    """The values of a mask on the host, also of one that torch.func has wrapped for its derivatives."""
    try:
        return mask.numpy()
    except RuntimeError:  # within a derivative, where it has no memory of its own
        return np.asarray(mask.tolist(), dtype=bool)


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """A few numbers (n,) with the type and device of another tensor, which is not waited for."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def in_float64(time: Tensor, ends: tuple[float, ...] = ()) -> Tensor:
    """A time in float64, the very tensor where it is that already; differentiable.

    One end of a clock, as `ends` name them, comes back exact from a narrower type: float32 rounds pi/2 up, to where its
    cosine is negative.
    """
    if time.dtype == torch.float64:
        return time
    exact = time.double()
    for end in ends if time.is_floating_point() else ():
        (rounded,) = torch.tensor([end], dtype=time.dtype).tolist()
        exact = exact + (exact == rounded).double() * (end - rounded)
    return exact


def nonzero(value: Tensor) -> Tensor:
    """A divisor with infinity in place of 0, so that a quotient is 0 there."""
    return torch.where(value == 0, torch.inf, value)


def check_batch(x: Tensor, *times: Tensor) -> None:
    """Raise ShapeError unless x is (B, ...) and every time is (B,)."""
    for time in times:
        if time.shape != x.shape[:1]:
            raise ShapeError(
                f"times of shape {tuple(time.shape)} do not fit samples of shape {tuple(x.shape)}: "
                f"pass one time per sample, shape ({x.shape[0] if x.ndim else 'B'},)"
            )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless the value is one of the choices: what the command line refuses, in Python too."""
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def check_positive(**values: float) -> None:
    """Raise ConfigError, by its name, for a value that is not positive and finite."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} is {value}; it must be positive and finite")


def check_least(least: float, **values: float) -> None:
    """Raise ConfigError, by its name, for a value that is smaller or not finite."""
    for name, value in values.items():
        if not least <= value < math.inf:
            raise ConfigError(f"{name} is {value}; it must be finite and at least {least:g}")


def check_share(name: str, share: float) -> None:
    """Raise ConfigError unless the share lies in [0, 1]."""
    if not 0 <= share <= 1:
        raise ConfigError(f"{name} is {share}; it must lie in [0, 1]")


def per_sample_mean(value: Tensor) -> Tensor:
    """Mean over everything but the batch: (B, ...) -> (B,)."""
    return value.flatten(1).mean(1) if value.ndim > 1 else value


def check_memory(size: float, what: str, advice: str) -> None:
    """Raise ConfigError where `what` takes more bytes than the machine's memory has; where that is known."""
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if size > memory:
            raise ConfigError(f"out of memory ({what} takes {size / 1e9:,.0f} of {memory / 1e9:,.0f} GB): {advice}")
