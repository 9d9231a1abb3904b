"""The path of teachers that were trained on a list of noise levels: DDPM's and Stable Diffusion's (math.md §1)."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from fewstep.flow.paths import Path, PathConfig, PathValues
from fewstep.utils.errors import ConfigError
from fewstep.utils.tensors import in_float64

BetaSchedule = Literal["linear", "scaled-linear", "cosine", "given"]
_LEAST_SIGNAL = 2.0**-24  # alpha^2 in place of the 0 of schedules that end in pure noise
_NEWTON_STEPS = 40
_MOST_STEPS = 10**6


@dataclass(frozen=True)
class DiscreteVP(Path):
    """Variance preserving, alpha^2 + sigma^2 = 1, known at whole steps: abar_i = prod_(j <= i) (1 - beta_j).

    The clock is the step, t in [0, steps - 1]. Between whole steps log tau = log(sigma/alpha) is interpolated by a
    monotone cubic (Fritsch and Carlson 1980); beyond the ends it goes on straight.

    schedule: betas linear in the step, `scaled-linear` in their roots (2112.10752), `cosine` (2102.09672), or `given`.
    zero_snr: the last step is pure noise (2305.08891); its signal is held at alpha^2 = 2^-24.
    Raises ConfigError for fewer than two steps or more than a million, and for betas outside (0, 1).
    """

    schedule: BetaSchedule = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = 1000
    betas: tuple[float, ...] = ()
    zero_snr: bool = False

    def __post_init__(self) -> None:
        count = len(self.betas) if self.schedule == "given" else self.steps
        if not 2 <= count <= _MOST_STEPS:
            raise ConfigError(f"a variance-preserving path of {count} steps: it needs from 2 to {_MOST_STEPS}")
        betas = self._betas()
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ConfigError(f"betas from {float(betas.min()):g} to {float(betas.max()):g}: they lie between 0 and 1")

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return float(len(self._curve.values) - 1)

    def _betas(self) -> Tensor:
        """(steps,), float64."""
        if self.schedule == "given":
            return torch.tensor(self.betas, dtype=torch.float64)
        if self.schedule == "linear":
            return torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)
        if self.schedule == "scaled-linear":
            return torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=torch.float64) ** 2
        level = torch.cos(
            (torch.arange(self.steps + 1, dtype=torch.float64) / self.steps + 0.008) / 1.008 * math.pi / 2
        )
        return (1 - level[1:] ** 2 / level[:-1] ** 2).clamp(max=0.999)

    @cached_property
    def _curve(self) -> "_Monotone":
        """log tau over the steps."""
        abar = (1 - self._betas()).cumprod(0)
        if self.zero_snr:
            root = abar.sqrt()
            abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        abar = abar.clamp(min=_LEAST_SIGNAL)
        return _Monotone.through(0.5 * (torch.log1p(-abar) - torch.log(abar)))

    def values(self, t: Tensor) -> PathValues:
        t = self.clock(t)
        log_tau, slope = self._curve.to(t.device).at(t)
        alpha, sigma = torch.sigmoid(-2 * log_tau).sqrt(), torch.sigmoid(2 * log_tau).sqrt()
        return PathValues(alpha, sigma, -alpha * sigma**2 * slope, sigma * alpha**2 * slope)

    def time_scale(self, t: Tensor) -> Tensor:
        """tau/tau', the steps over which log tau grows by 1, at most those of the whole clock."""
        t = self.clock(t)
        return (1 / self._curve.to(t.device).at(t)[1]).clamp(max=self.t_max)

    def time_from_tau(self, tau: Tensor) -> Tensor:
        target = torch.log(in_float64(tau))
        return self._curve.to(target.device).inverse(target)


@final
@dataclass(frozen=True)
class DiscreteVPConfig(PathConfig):
    """Variance preserving, in the steps of DDPM or Stable Diffusion."""

    schedule: Literal["linear", "scaled-linear", "cosine"] = "linear"
    """How beta rises with the step: itself, by its root, or so that the signal falls as a cosine."""
    beta_start: float = 1e-4
    """Of the first step; cosine has its own."""
    beta_end: float = 0.02
    """Of the last step; cosine has its own."""
    steps: int = 1000
    """Noise levels."""
    zero_snr: bool = False
    """Whether the last step is pure noise."""

    def build(self, sigma_data: float) -> Path:
        return DiscreteVP(self.schedule, self.beta_start, self.beta_end, self.steps, (), self.zero_snr)


class _Monotone(NamedTuple):
    """A rising cubic Hermite curve through values (n,) at 0, 1, ..., n - 1, straight beyond; slopes (n,)."""

    values: Tensor
    slopes: Tensor

    @staticmethod
    def through(values: Tensor) -> "_Monotone":
        """Slopes are harmonic means of the neighbouring rises, which keeps every cell rising."""
        rise = values.diff()
        inner = 2 / (1 / rise[1:] + 1 / rise[:-1])
        return _Monotone(values, torch.cat([rise[:1], inner, rise[-1:]]))

    def to(self, device: torch.device) -> "_Monotone":
        return _Monotone(self.values.to(device), self.slopes.to(device))

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(value, slope) at times of any shape, float64; differentiable."""
        last = len(self.values) - 1
        cell = t.detach().floor().clamp(0, last - 1).long()
        u, beyond = (t - cell).clamp(0, 1), t - t.clamp(0, last)
        low, high, left, right = (curve[cell + i] for curve in (self.values, self.slopes) for i in (0, 1))
        third, second = left + right - 2 * (high - low), 3 * (high - low) - 2 * left - right
        value = low + u * (left + u * (second + u * third))
        slope = left + u * (2 * second + 3 * u * third)
        return value + beyond * slope, slope

    def inverse(self, target: Tensor) -> Tensor:
        """The time at which the curve has a value; differentiable, infinite at infinite values."""
        finite = target.detach().clamp(-1e9, 1e9)
        low = torch.searchsorted(self.values, finite.contiguous()).sub(1).clamp(0, len(self.values) - 2).double()
        low, high = low, low + 1
        inside = (finite >= self.values[0]) & (finite <= self.values[-1])
        for _ in range(_NEWTON_STEPS):
            middle = (low + high) / 2
            below = self.at(middle)[0] < finite
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        start = torch.where(inside, (low + high) / 2, torch.where(finite < 0, 0.0, float(len(self.values) - 1)))
        value, slope = self.at(start)
        return start + (target - value) / slope
