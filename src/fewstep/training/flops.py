"""FLOPs of a training step, counted once as it is taken, and the share of the device's peak that they come to.

A multiply-add is 2 FLOPs. Matrix products, convolutions and attention count, in the passes that the objective asks for,
a teacher's too; not what is computed anew to save memory, nor the optimizer's work.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fewstep.networks.attention_kernel  # noqa: F401 (defines the operation)
from fewstep.recipes.peaks import Peak, peak_of
from fewstep.training.memory import device_name
from fewstep.utils.recompute import recomputing

_HALF = (torch.bfloat16, torch.float16)


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """The scores and the sum by them, (B, heads, N, D) each."""
    return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """Five products in place of two: the scores are taken again."""
    return 5 * _attention(q, k, v) // 2


def _attention_tangent(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """Six products in place of two, as in tiles."""
    return 3 * _attention(q, k, v)


_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.fewstep.attention_tangent: _attention_tangent,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""What PyTorch's own table, which has its kernels of GPUs, leaves out."""


@dataclass
class StepFlops:
    """Of one process: FLOPs on numbers of 16 bits, and on wider ones."""

    half: float = 0.0
    wide: float = 0.0

    @property
    def total(self) -> float:
        return self.half + self.wide


class _Counter(TorchDispatchMode):
    def __init__(self, found: StepFlops) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        own = _FORMULAS.get(func.overloadpacket)
        known = flop_registry.get(func.overloadpacket)
        if recomputing() or (own is None and known is None):
            return out
        flops = own(*args, **kwargs) if own else cast(Any, known)(*args, **kwargs, out_val=out)
        if next(value for value in args if isinstance(value, Tensor)).dtype in _HALF:
            self.found.half += flops
        else:
            self.found.wide += flops
        return out


class StepCost:
    """Counts the first step that is tried or taken, as it is written; knows what share of the peak later ones reach.

    peak: given in FLOP/s for all types; 0 takes that of the device's name, where it is known. tf32: whether float32
    is rounded so. wanted: whether to count.
    """

    def __init__(self, device: torch.device, peak: float = 0.0, tf32: bool = False, wanted: bool = True) -> None:
        self.device = device
        known = peak_of(device_name(device)) if device.type == "cuda" else None
        self.peak = Peak(peak, peak) if peak else known
        self.tf32 = tf32
        self.step = StepFlops()
        self._counting = wanted

    @contextmanager
    def counting(self) -> Iterator[None]:
        """What happens inside belongs to a step; counted until `counted`."""
        if not self._counting:
            yield
            return
        with _Counter(self.step):
            yield

    def counted(self) -> None:
        """The step has ended."""
        self._counting = False

    def at(self, steps_per_second: float) -> dict[str, float]:
        """For the log: FLOP/s of this process's device, and their share of its peak where that is known."""
        total = self.step.total * steps_per_second
        if self._counting or not math.isfinite(total) or total <= 0:
            return {}
        found = {"flops_per_second": float(f"{total:.4g}")}
        if self.peak is not None:
            share = self.peak.seconds(self.step.half, self.step.wide, self.tf32) * steps_per_second
            found["utilisation"] = round(share, 4)
        return found


def flops_words(found: dict[str, float]) -> str:
    """The share of the peak, or else FLOP/s, in words; empty where nothing is counted."""
    if "utilisation" in found:
        return f"{found['utilisation']:.0%} of peak FLOP/s"
    if not found:
        return ""
    rate, unit = found["flops_per_second"], ""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if rate >= size:
            rate, unit = rate / size, prefix
            break
    return f"{rate:.3g} {unit}FLOP/s"
