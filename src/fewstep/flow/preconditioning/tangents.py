"""The two derivatives of a denoiser that statistics are made of, by forward mode or by differences (math.md §3.2)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fewstep.flow.derivatives import DerivativeKind, finite_difference_nodes, forward_mode_fault, parabola_slope
from fewstep.utils.forward_ad import jvp
from fewstep.utils.tensors import expand

PlainDenoiser = Callable[[Tensor, Tensor], Tensor]
"""D(x, t) under no condition: x (B, ...), t (B,) -> (B, ...)."""

STEP = 0.01
"""Of differences: in lambda, and in y in units of the noise level tau."""


@final
@dataclass(frozen=True)
class DenoiserTangents:
    """Of D(y, tau), y (B, ...) on the EDM coordinate, tau (B,). ends: least and largest noise level that D is asked."""

    denoise: PlainDenoiser
    ends: tuple[float, float]
    kind: DerivativeKind = "exact"
    step: float = STEP

    def along(self, y: Tensor, tau: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
        """(D, J_D probe), (B, ...) each."""
        if self.kind == "exact":
            found: tuple[Tensor, Tensor] = jvp(lambda y: self.denoise(y, tau), (y,), (probe,))
            return found
        h = expand(self.step * tau, y).to(y.dtype)
        above, below = (self.denoise(y + sign * h * probe, tau) for sign in (1, -1))
        return self.denoise(y, tau), (above - below) / (2 * h)

    def change(self, y: Tensor, tau: Tensor, u: Tensor) -> Tensor:
        """w = dD/dlambda along dy/dlambda = u, dtau/dlambda = -tau; (B, ...)."""
        if self.kind == "exact":
            return jvp(self.denoise, (y, tau), (u, -tau))[1]  # type: ignore[no-any-return]
        lam, (low, high) = -tau.log(), (-math.log(end) for end in reversed(self.ends))
        nodes = finite_difference_nodes(lam, torch.full_like(lam, low), high, self.step)
        moved = [self.denoise(y + expand(node, y).to(y.dtype) * u, torch.exp(-lam - node)) for node in nodes]
        return parabola_slope(self.denoise(y, tau), moved, nodes)

    def fault(self, y: Tensor, tau: Tensor) -> str:
        """Why forward mode cannot be used at these samples, or is not to be trusted; '' where it can be."""
        with torch.no_grad():
            u = self.denoise(y, tau) - y

            def difference(share: float) -> Tensor:
                own = DenoiserTangents(self.denoise, self.ends, "finite-difference", share * self.step)
                return torch.cat([own.change(y, tau, u), own.along(y, tau, u)[1]])

            def exact() -> Tensor:
                own = DenoiserTangents(self.denoise, self.ends)
                return torch.cat([own.change(y, tau, u), own.along(y, tau, u)[1]])

            return forward_mode_fault(exact, difference)
