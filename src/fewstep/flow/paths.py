"""Probability paths x_t = alpha(t) x0 + sigma(t) eps, with t = t_min at data and t = t_max at noise (math.md §1).

Times are tensors in the path's own clock; values and time derivatives come together, in float64. Every
conversion between denoiser D = E[x0|x_t], noise E = (x - alpha D)/sigma and PF-ODE velocity v = alpha' D + sigma' E
is written once, in a form that stays finite where the noise-to-signal ratio tau = sigma/alpha is infinite.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from fewstep.utils.errors import ConfigError
from fewstep.utils.tensors import check_positive, expand, in_float64, nonzero


class PathValues(NamedTuple):
    """alpha, sigma and their derivatives in t, each of the shape of t, float64."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    def over(self, x: Tensor) -> "PathValues":
        """The same values broadcast over samples x (B, ...), in the dtype of x."""
        return PathValues(*(expand(value, x).to(x.dtype) for value in self))


@dataclass(frozen=True)
class Path(ABC):
    """A path: its clock's range and its values. Subclasses are final, and take times of any type by `clock`.

    noise_clock: whether the clock tells noise levels themselves, over which steps are spaced as EDM's.
    """

    noise_clock: ClassVar[bool] = False

    @property
    @abstractmethod
    def t_min(self) -> float:
        """The data end of the clock."""

    @property
    @abstractmethod
    def t_max(self) -> float:
        """The noise end of the clock."""

    @abstractmethod
    def values(self, t: Tensor) -> PathValues:
        """alpha, sigma, alpha', sigma' at times t."""

    @abstractmethod
    def time_from_tau(self, tau: Tensor) -> Tensor:
        """The time at which sigma/alpha = tau, in float64; for 0 and infinity too, if need be beyond the clock."""

    def clock(self, t: Tensor) -> Tensor:
        """A time in float64, the ends of the clock exact; the same tensor where it is float64 already."""
        return in_float64(t, (self.t_min, self.t_max))

    def tau(self, t: Tensor) -> Tensor:
        """Noise level of the equivalent EDM path, sigma/alpha."""
        values = self.values(t)
        return values.sigma / values.alpha

    def time_from_unit(self, u: Tensor) -> Tensor:
        """Clock time at fraction u in [0, 1] of the range: 0 is data, 1 is noise."""
        u = in_float64(u)
        return self.t_min * (1 - u) + self.t_max * u

    def time_scale(self, t: Tensor) -> Tensor:
        """The span of time over which the path changes at t: the unit of finite-difference steps. 1 on short clocks."""
        return torch.ones_like(self.clock(t))

    def interpolate(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps; x0 and eps (B, ...), t (B,)."""
        p = self.values(t).over(x0)
        return p.alpha * x0 + p.sigma * eps

    def conditional_velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """alpha' x0 + sigma' eps, whose mean given x_t is the PF-ODE velocity."""
        p = self.values(t).over(x0)
        return p.d_alpha * x0 + p.d_sigma * eps

    def sample(self, x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, the conditional velocity), (B, ...) each."""
        return self.interpolate(x0, eps, t), self.conditional_velocity(x0, eps, t)

    def denoised_from_velocity(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """D = (sigma' x - sigma v) / (sigma' alpha - sigma alpha')."""
        p = self.values(t).over(x)
        return (p.d_sigma * x - p.sigma * v) / (p.d_sigma * p.alpha - p.sigma * p.d_alpha)

    def noise_from_velocity(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """E = (alpha v - alpha' x) / (sigma' alpha - sigma alpha')."""
        p = self.values(t).over(x)
        return (p.alpha * v - p.d_alpha * x) / (p.d_sigma * p.alpha - p.sigma * p.d_alpha)

    def velocity_from_denoised(self, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        """v = alpha' D + sigma' (x - alpha D)/sigma, and alpha' D where sigma = 0: the noise's mean is 0 there."""
        p = self.values(t).over(x)
        return p.d_alpha * denoised + p.d_sigma * (x - p.alpha * denoised) / nonzero(p.sigma)

    def prior(self, eps: Tensor) -> Tensor:
        """Noise to start from, sigma(t_max) eps; eps (B, ...) standard normal."""
        t = torch.full(eps.shape[:1], self.t_max, dtype=torch.float64, device=eps.device)
        return self.values(t).over(eps).sigma * eps


@dataclass(frozen=True)
class PathConfig(ABC):
    """Settings of a path."""

    @abstractmethod
    def build(self, sigma_data: float) -> Path:
        """The path for data of that standard deviation; raises ConfigError for settings without meaning."""

    def beside(self, teacher: Path | None, sigma_data: float) -> Path:
        """The path of a run that has a teacher on that path: `build`'s, but where it is the teacher's own."""
        return self.build(sigma_data)

    @property
    def noise_clock(self) -> bool:
        """Whether the path's clock tells noise levels."""
        return self.build(1.0).noise_clock


@final
@dataclass(frozen=True)
class TeacherPathConfig(PathConfig):
    """The path of the teacher that is distilled."""

    def build(self, sigma_data: float) -> Path:
        raise ConfigError("the path is the teacher's, and there is none: name one with --teacher")

    def beside(self, teacher: Path | None, sigma_data: float) -> Path:
        return self.build(sigma_data) if teacher is None else teacher

    @property
    def noise_clock(self) -> bool:
        return False


def _check_range(name: str, low: float, high: float) -> None:
    if not (0 <= low < high and math.isfinite(high)):
        raise ConfigError(f"{name}: the clock's range [{low}, {high}] is empty or negative; give 0 <= t_min < t_max")


@dataclass(frozen=True)
class EDM(Path):
    """Variance-exploding path of EDM (2206.00364): alpha = 1, sigma = t."""

    noise_clock: ClassVar[bool] = True
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _check_range("EDM", self.sigma_min, self.sigma_max)
        if self.sigma_min == 0:
            raise ConfigError("EDM: sigma_min is 0; its clock is uniform in log t and needs sigma_min > 0")

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def values(self, t: Tensor) -> PathValues:
        t = self.clock(t)
        one = torch.ones_like(t)
        return PathValues(one, t, torch.zeros_like(t), one)

    def time_from_tau(self, tau: Tensor) -> Tensor:
        return in_float64(tau)

    def time_scale(self, t: Tensor) -> Tensor:
        """t itself: everything on this path is a function of log t."""
        return self.clock(t)

    def time_from_unit(self, u: Tensor) -> Tensor:
        """Uniform in log t; exact at both ends, and differentiable there."""
        u = in_float64(u)
        return self.sigma_min ** (1 - u) * self.sigma_max**u


@final
@dataclass(frozen=True)
class EDMPathConfig(PathConfig):
    """Variance exploding, over noise levels from 0.002 to 80 (EDM)."""

    def build(self, sigma_data: float) -> Path:
        return EDM()


@dataclass(frozen=True)
class Linear(Path):
    """Straight path of flow matching (2210.02747): alpha = 1 - t, sigma = t on [0, 1]."""

    t_min: ClassVar[float] = 0.0
    t_max: ClassVar[float] = 1.0

    def values(self, t: Tensor) -> PathValues:
        t = self.clock(t)
        one = torch.ones_like(t)
        return PathValues((1 - t).clamp(min=0), t, -one, one)

    def time_from_tau(self, tau: Tensor) -> Tensor:
        return 1 / (1 + 1 / in_float64(tau))


@final
@dataclass(frozen=True)
class LinearPathConfig(PathConfig):
    """Straight from data to noise (flow matching)."""

    def build(self, sigma_data: float) -> Path:
        return Linear()


@dataclass(frozen=True)
class Trig(Path):
    """TrigFlow (2410.11081): alpha = cos t, sigma = sigma_data sin t on [0, pi/2]; t is in radians."""

    t_min: ClassVar[float] = 0.0
    t_max: ClassVar[float] = math.pi / 2
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        check_positive(sigma_data=self.sigma_data)

    def values(self, t: Tensor) -> PathValues:
        t = self.clock(t)
        cos, sin = torch.cos(t), torch.sin(t)
        return PathValues(cos.clamp(min=0), self.sigma_data * sin, -sin, self.sigma_data * cos)

    def time_from_tau(self, tau: Tensor) -> Tensor:
        return torch.atan(in_float64(tau) / self.sigma_data)


@final
@dataclass(frozen=True)
class TrigPathConfig(PathConfig):
    """A quarter of a circle whose noise has the data's deviation (TrigFlow)."""

    def build(self, sigma_data: float) -> Path:
        return Trig(sigma_data)


@dataclass(frozen=True)
class VP(Path):
    """Variance-preserving path with linear beta (2011.13456): log abar = -(beta_min t + (beta_max - beta_min) t^2/2).

    alpha = sqrt(abar), sigma = sqrt(1 - abar) on [epsilon, 1]; epsilon > 0 since sigma' is infinite at 0.
    """

    t_max: ClassVar[float] = 1.0
    beta_min: float = 0.1
    beta_max: float = 20.0
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        _check_range("VP", self.epsilon, 1.0)
        if self.epsilon == 0 or not 0 < self.beta_min <= self.beta_max:
            raise ConfigError(f"VP: needs epsilon > 0 and 0 < beta_min <= beta_max, got {self}")

    @property
    def t_min(self) -> float:
        return self.epsilon

    def values(self, t: Tensor) -> PathValues:
        t, slope = self.clock(t), self.beta_max - self.beta_min
        log_abar = -(self.beta_min * t + 0.5 * slope * t * t)
        alpha = torch.exp(0.5 * log_abar)
        sigma = torch.sqrt(-torch.expm1(log_abar))
        d_alpha = -0.5 * (self.beta_min + slope * t) * alpha
        return PathValues(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)

    def time_scale(self, t: Tensor) -> Tensor:
        """tau/tau' = 2 sigma^2/beta(t), one unit of log tau: 2 t near data, where sigma grows as sqrt(t)."""
        beta = self.beta_min + (self.beta_max - self.beta_min) * self.clock(t)
        return 2 * self.values(t).sigma ** 2 / beta

    def time_from_tau(self, tau: Tensor) -> Tensor:
        tau, slope = in_float64(tau), self.beta_max - self.beta_min
        exponent = torch.log1p(tau * tau)
        t = 2 * exponent / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * exponent))
        return torch.where(torch.isinf(exponent), torch.inf, t)


@final
@dataclass(frozen=True)
class VPPathConfig(PathConfig):
    """Variance preserving, with linear beta from 0.1 to 20 (score SDEs)."""

    def build(self, sigma_data: float) -> Path:
        return VP()
