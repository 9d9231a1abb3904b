"""Distributions of training times, of (t, s) pairs, and the grids that samplers walk.

A distribution is the inverse of its cumulative function, so that a uniform draw per sample (fewstep.utils.random) gives
the time. Draws are in float64 in the path's own clock.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fewstep.flow.paths import Path
from fewstep.utils.errors import ConfigError, ShapeError


class TimeDistribution(ABC):
    """Subclasses are final frozen dataclasses."""

    @abstractmethod
    def quantile(self, path: Path, u: Tensor) -> Tensor:
        """The time below which a share u in (0, 1) of the draws lies; u (B,) float64."""


@final
@dataclass(frozen=True)
class UniformTimes(TimeDistribution):
    """Uniform on the path's unit clock (on EDM: uniform in log t)."""

    def quantile(self, path: Path, u: Tensor) -> Tensor:
        return path.time_from_unit(u)


@final
@dataclass(frozen=True)
class BetaTimes(TimeDistribution):
    """Beta(a, b) on the path's unit clock, where one of a, b is 1 (so that the quantile is closed form).

    Beta(a, 1): u^(1/a); Beta(1, b): 1 - (1 - u)^(1/b). iSD (2601.22679) draws t and s from one.
    """

    a: float = 0.8
    """Above 0; 0.8 in iSD. Below 1, with b = 1, more times lie near the data."""
    b: float = 1.0
    """Above 0; 1 in iSD. Below 1, with a = 1, more times lie near the noise."""

    def __post_init__(self) -> None:
        if not (self.a > 0 and self.b > 0 and 1.0 in (self.a, self.b)):
            raise ConfigError(f"BetaTimes({self.a}, {self.b}): both must be positive and one of them 1")

    def quantile(self, path: Path, u: Tensor) -> Tensor:
        return path.time_from_unit(u ** (1 / self.a) if self.b == 1.0 else 1 - (1 - u) ** (1 / self.b))


@final
@dataclass(frozen=True)
class LogitNormalTimes(TimeDistribution):
    """logit of the unit clock is N(mean, std^2) (2403.03206)."""

    mean: float = -0.4
    """Mean of the logit: the lower, the more times lie near the data; -0.4 in MeanFlow."""
    std: float = 1.0
    """Standard deviation of the logit, above 0; 1 in MeanFlow."""

    def __post_init__(self) -> None:
        _check_normal(self.mean, self.std)

    def quantile(self, path: Path, u: Tensor) -> Tensor:
        return path.time_from_unit(torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)))


@final
@dataclass(frozen=True)
class LogNormalTimes(TimeDistribution):
    """log tau is N(mean, std^2), held within the path's range (EDM, 2206.00364)."""

    mean: float = -1.2
    """Mean of log tau, tau = sigma/alpha the noise level; -1.2 in EDM."""
    std: float = 1.2
    """Standard deviation of log tau, above 0; 1.2 in EDM."""

    def __post_init__(self) -> None:
        _check_normal(self.mean, self.std)

    def quantile(self, path: Path, u: Tensor) -> Tensor:
        tau = torch.exp(self.mean + self.std * torch.special.ndtri(u))
        return path.time_from_tau(tau).clamp(path.t_min, path.t_max)


def _check_normal(mean: float, std: float) -> None:
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ConfigError(f"times of mean {mean} and std {std}: both must be finite, std positive")


def uniform_grid(path: Path, steps: int) -> Tensor:
    """steps + 1 times from t_max down to t_min, evenly spaced on the unit clock; float64."""
    return _from_end_to_end(path, path.time_from_unit(_even(1, 0, steps)))


def edm_grid(path: Path, steps: int, rho: float = 7.0) -> Tensor:
    """steps + 1 noise levels with tau^(1/rho) evenly spaced (EDM, 2206.00364), as times of the path; float64.

    From the path's own ends, its tau held within EDM's [0.002, 80]; the first and last are exactly t_max and t_min.
    """
    ends = torch.tensor([path.t_max, path.t_min], dtype=torch.float64)
    high, low = (path.tau(ends).clamp(0.002, 80.0) ** (1 / rho)).tolist()
    tau = (high + _even(0, 1, steps) * (low - high)) ** rho
    return _from_end_to_end(path, path.time_from_tau(tau).clamp(path.t_min, path.t_max))


def default_grid(path: Path, steps: int) -> Tensor:
    """EDM's grid on a clock that is a noise level, else the uniform one."""
    return edm_grid(path, steps) if path.noise_clock else uniform_grid(path, steps)


GRIDS: dict[str, Callable[[Path, int], Tensor]] = {"auto": default_grid, "uniform": uniform_grid, "edm": edm_grid}
"""By the name of their spacing."""


def check_grid(path: Path, times: Tensor) -> Tensor:
    """A user's own times in float64: strictly falling, within the path's range; raises ShapeError otherwise."""
    times = path.clock(times)
    slack = 1e-9 * math.fabs(path.t_max)
    falling = times.ndim == 1 and len(times) >= 2 and bool((times[1:] < times[:-1]).all())
    if not falling or float(times[0]) > path.t_max + slack or float(times[-1]) < path.t_min - slack:
        raise ShapeError(f"times {times.tolist()} must fall strictly within [{path.t_min}, {path.t_max}]")
    return times


def _even(first: float, last: float, steps: int) -> Tensor:
    if steps < 1:
        raise ShapeError(f"{steps} steps asked for: a sampler needs at least 1")
    return torch.linspace(first, last, steps + 1, dtype=torch.float64)


def _from_end_to_end(path: Path, grid: Tensor) -> Tensor:
    grid[0], grid[-1] = path.t_max, path.t_min
    return grid
