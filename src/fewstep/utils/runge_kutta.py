"""One step of the classical Runge-Kutta method: what every reference solution stands on."""

from collections.abc import Callable

from torch import Tensor

from fewstep.utils.tensors import expand


def runge_kutta_step(slope: Callable[[Tensor, Tensor], Tensor], x: Tensor, u: Tensor, h: Tensor) -> Tensor:
    """One step h (B,) of the classical method of order 4 for dx/du = slope(u, x), from x (B, ...) at u (B,)."""
    half, whole = (expand(step, x).to(x.dtype) for step in (h / 2, h))
    k1 = slope(u, x)
    k2 = slope(u + h / 2, x + half * k1)
    k3 = slope(u + h / 2, x + half * k2)
    k4 = slope(u + h, x + whole * k3)
    return x + whole / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
