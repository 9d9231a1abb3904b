"""The linear part of a teacher's flow map: least squares along its trajectories, beside the Gaussian's (math.md §3.8).

On the EDM path, with a = -log t, b = -log s, along a direction of variance lam, about the mean:
  X(x, t, s) ~ R x,   R = G (1 + (b - a) q(a, b)),   G = sqrt((lam + s^2)/(lam + t^2))
  D(x, t)    ~ d x,   d = lam/(lam + t^2) + q(a, a)
R is 1 at s = t, and dR/ds = (1 - d)/t there, for any q: so says dx/dt = (x - D)/t. q = 0 is the Gaussian's own.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

import torch
from torch import Tensor

from fewstep.flow.paths import PathValues
from fewstep.flow.preconditioning.covariance import Covariance, same_values
from fewstep.flow.preconditioning.interpolation import Surface
from fewstep.utils.errors import ConfigError
from fewstep.utils.tensors import Copies

Family = Literal["covariance", "regressed", "regressed-components", "regressed-length"]

_BEYOND = 1e-9
_LEAST_WEIGHT = 0.02


@final
@dataclass(frozen=True, eq=False)
class Regression:
    """lam (K,): levels -log tau, evenly spaced, increasing. table (groups, K, K): q at pairs of levels (t, s).

    groups (n,): which of them each direction belongs to, in the order of `Covariance.scaled`'s variances; float64.
    weight (K, K): w in g = g_E (1 + (b - a) w), the network's weight beside Euler's; of no elements for Euler's own.
    trajectories, seed, seconds: how many it was taken from, which, and for how long; seconds is not compared by ==.
    """

    lam: Tensor
    table: Tensor
    groups: Tensor
    weight: Tensor
    trajectories: int
    seed: int
    seconds: float = 0.0

    def __post_init__(self) -> None:
        knots, steps = len(self.lam), self.lam.diff()
        if knots < 3 or not bool((steps > 0).all()) or float(steps.max() - steps.min()) > 1e-6 * float(steps.mean()):
            raise ConfigError("a regression needs at least 3 levels that increase in even steps")
        fits = self.table.shape[1:] == (knots, knots) and self.weight.shape in ((knots, knots), (0, 0))
        count = len(self.table)
        if not fits or not bool(((self.groups >= 0) & (self.groups < count)).all()):
            raise ConfigError(
                f"a regression at {knots} levels: a table of shape {tuple(self.table.shape)}, weights of "
                f"{tuple(self.weight.shape)} or groups beyond {count} do not fit"
            )
        start, step = float(self.lam[0]), float(self.lam[-1] - self.lam[0]) / (knots - 1)
        weight = self.weight if self.weight.numel() else torch.zeros_like(self.table[0])
        surfaces = {name: Surface.through(v, start, step) for name, v in (("table", self.table), ("weight", weight))}
        object.__setattr__(self, "_surfaces", surfaces)

    def __eq__(self, other: object) -> bool:
        return same_values(self, other, apart=("seconds",))

    def __hash__(self) -> int:
        return hash((type(self), self.table.shape, float(self.table.sum())))

    def ratio(self, at_t: PathValues, at_s: PathValues) -> Tensor:
        """R/G (B, n) at times (B,)."""
        a, b = self._place(at_t)[0], self._place(at_s)[0]
        return 1 + (b - a)[:, None] * self._by_direction(a, b)

    def shift(self, at_t: PathValues) -> Tensor:
        """d - d_G (B, n) on the path, D about the mean of the data and x about alpha times it."""
        a, within = self._place(at_t)
        inside = torch.where(within, 1 / torch.where(within, at_t.alpha, 1.0), 0.0)
        return inside[:, None] * self._by_direction(a, a)

    def weighed(self, g: Tensor, at_t: PathValues, at_s: PathValues) -> Tensor:
        """The network's weight g (B,), at most what is given and at least a fiftieth of it."""
        if not self.weight.numel():
            return g
        a, b = self._place(at_t)[0], self._place(at_s)[0]
        return g * (1 + (b - a) * self._surface("weight", a).at(a, b)).clamp(_LEAST_WEIGHT, 1.0)

    def _by_direction(self, a: Tensor, b: Tensor) -> Tensor:
        """q (B, n)."""
        groups = self._copies.of("groups", self.groups, a.device, torch.int64)
        return self._surface("table", a).at(a, b).T[:, groups]

    def _surface(self, name: str, a: Tensor) -> Surface:
        """Through the table or the weight, on the device of a."""
        surface: Surface = self._surfaces[name]  # type: ignore[attr-defined]
        return surface._replace(values=self._copies.of(name, surface.values, a.device, surface.values.dtype))

    @cached_property
    def _copies(self) -> Copies:
        return Copies()

    @cached_property
    def _ends(self) -> tuple[float, float]:
        return float(self.lam[0]) - _BEYOND, float(self.lam[-1]) + _BEYOND

    def _place(self, at: PathValues) -> tuple[Tensor, Tensor]:
        """(-log tau held within the levels, whether it lies there), (B,) each; finite where tau is 0 or infinite."""
        low, high = self._ends
        above, below = at.sigma > math.exp(-low) * at.alpha, at.sigma < math.exp(-high) * at.alpha
        beyond = above | below
        ratio = torch.where(beyond, 1.0, at.sigma) / torch.where(beyond, 1.0, at.alpha)
        return torch.where(above, low, torch.where(below, high, -torch.log(ratio))), ~beyond


@final
@dataclass(frozen=True)
class RegressionSettings:
    """What is regressed on how many trajectories, at how many levels: `SkipPreconditioningConfig`."""

    family: Family
    regress_g: bool
    trajectories: int
    levels: int
    seed: int = 0


@final
@dataclass(frozen=True)
class Measured:
    """What a skip is made of: the data's covariance, and the regression on a teacher's trajectories if there is one."""

    covariance: Covariance
    regression: Regression | None = None
