"""Inner scaling: N(x, t, s) = c_skip(t) x + c_out(t) F(c_in(t) x, c_noise(t), c_noise(s)) (math.md §2).

Separate from the jump coefficients: it sets the size of what the raw network F reads and writes. EDM's scaling makes
N a denoiser, and belongs to preconditionings whose N is one on the diagonal (Euler, analytic).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from fewstep.flow.paths import EDM, Path
from fewstep.utils.errors import ConfigError
from fewstep.utils.tensors import check_positive

_LOG_TAU_LIMIT = 8.0


class ScalingValues(NamedTuple):
    """c_skip, c_out, c_in at times t, each of the shape of t."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor


class Scaling(ABC):
    """Subclasses are final frozen dataclasses."""

    @abstractmethod
    def values(self, t: Tensor) -> ScalingValues:
        """c_skip, c_out, c_in at times t."""

    def c_noise(self, t: Tensor) -> Tensor:
        """The clock that the network sees, finite on the whole range; t itself unless a subclass has another."""
        return t

    def time_scale(self, t: Tensor) -> Tensor:
        """The span of time over which that clock changes by one of its units: for finite-difference steps."""
        return torch.ones_like(t)

    def on(self, path: Path, denoises: bool) -> "Scaling":
        """The network read on another path, N its denoiser or else its velocity; raises ConfigError if it cannot be."""
        raise ConfigError(f"{type(self).__name__} stays on the path that it was made for")


class ScalingConfig(ABC):
    """Settings of an inner scaling; subclasses are final frozen dataclasses.

    unit_input: whether c_in brings noised data to variance 1. denoises: whether c_skip and c_out are EDM's.
    """

    unit_input: ClassVar[bool] = False
    denoises: ClassVar[bool] = False

    @abstractmethod
    def build(self, path: Path, sigma_data: float) -> Scaling:
        """The inner scaling on a path, for data of that standard deviation."""

    def beside(self, teacher: Scaling | None, path: Path, sigma_data: float, denoises: bool) -> Scaling:
        """The inner scaling of a run that has such a teacher: `build`'s, but where it is the teacher's own."""
        return self.build(path, sigma_data)


@final
@dataclass(frozen=True)
class TeacherScalingConfig(ScalingConfig):
    """The teacher's: what its network predicts is read as a denoiser, or as a velocity, whichever the jumps need."""

    unit_input: ClassVar[bool] = True
    denoises: ClassVar[bool] = True

    def build(self, path: Path, sigma_data: float) -> Scaling:
        raise ConfigError("the inner scaling is the teacher's, and there is none: name one with --teacher")

    def beside(self, teacher: Scaling | None, path: Path, sigma_data: float, denoises: bool) -> Scaling:
        return self.build(path, sigma_data) if teacher is None else teacher.on(path, denoises)


@final
@dataclass(frozen=True)
class IdentityScaling(Scaling):
    """c_skip = 0, c_out = c_in = 1, c_noise = t: the network reads x and writes N as they are."""

    def values(self, t: Tensor) -> ScalingValues:
        one = torch.ones_like(t)
        return ScalingValues(torch.zeros_like(t), one, one)


@final
@dataclass(frozen=True)
class IdentityScalingConfig(ScalingConfig):
    """None: the network reads the sample and writes N as they are."""

    def build(self, path: Path, sigma_data: float) -> Scaling:
        return IdentityScaling()


@final
@dataclass(frozen=True)
class UnitScaling(Scaling):
    """c_skip = 0, c_out = sigma_data, c_in = 1/sigma_data, c_noise = t: TrigFlow's (2410.11081)."""

    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        check_positive(sigma_data=self.sigma_data)

    def values(self, t: Tensor) -> ScalingValues:
        one = torch.ones_like(t)
        return ScalingValues(torch.zeros_like(t), self.sigma_data * one, one / self.sigma_data)


@final
@dataclass(frozen=True)
class UnitScalingConfig(ScalingConfig):
    """By the data's deviation (TrigFlow)."""

    def build(self, path: Path, sigma_data: float) -> Scaling:
        return UnitScaling(sigma_data)


@dataclass(frozen=True)
class LogNoiseScaling(Scaling):
    """c_noise = log(tau)/4, EDM's (2206.00364), on any path.

    log tau is held within [-8, 8]: c_noise is finite at tau = 0 and infinity.
    """

    sigma_data: float = 0.5
    path: Path = EDM()

    def __post_init__(self) -> None:
        check_positive(sigma_data=self.sigma_data)

    def c_noise(self, t: Tensor) -> Tensor:
        p = self.path.values(t)
        tiny = torch.finfo(p.sigma.dtype).tiny
        log_tau = torch.log(p.sigma.clamp_min(tiny)) - torch.log(p.alpha.clamp_min(tiny))
        return log_tau.clamp(-_LOG_TAU_LIMIT, _LOG_TAU_LIMIT) / 4

    def time_scale(self, t: Tensor) -> Tensor:
        """tau / tau' = alpha sigma / (sigma' alpha - sigma alpha'), at least 1e-3: one unit of log tau."""
        p = self.path.values(t)
        return (p.alpha * p.sigma / (p.d_sigma * p.alpha - p.sigma * p.d_alpha)).clamp(min=1e-3)


@final
@dataclass(frozen=True)
class EDMScaling(LogNoiseScaling):
    """EDM's scaling (2206.00364, table 1) on any path, with S = alpha^2 sd^2 + sigma^2:

    c_skip = alpha sd^2 / S, c_out = sd sigma / sqrt S, c_in = 1 / sqrt S. On the EDM path these are EDM's own.
    """

    def values(self, t: Tensor) -> ScalingValues:
        p = self.path.values(t)
        variance = self.sigma_data**2
        root = torch.sqrt(variance * p.alpha**2 + p.sigma**2)
        return ScalingValues(p.alpha * variance / root**2, self.sigma_data * p.sigma / root, 1 / root)

    def on(self, path: Path, denoises: bool) -> Scaling:
        if not denoises:
            raise ConfigError("a network in EDM's scaling is a denoiser: take a preconditioning of one, such as euler")
        return EDMScaling(self.sigma_data, path)


@final
@dataclass(frozen=True)
class EDMScalingConfig(ScalingConfig):
    """Input and output as EDM scales them, the network giving a denoiser."""

    unit_input: ClassVar[bool] = True
    denoises: ClassVar[bool] = True

    def build(self, path: Path, sigma_data: float) -> Scaling:
        return EDMScaling(sigma_data, path)


@final
@dataclass(frozen=True)
class EDMInputScaling(LogNoiseScaling):
    """EDM's c_in and c_noise with c_skip = 0, c_out = 1: for CM and BCM, whose (f, g) hold c_skip and c_out."""

    def values(self, t: Tensor) -> ScalingValues:
        c_in = EDMScaling(self.sigma_data, self.path).values(t).c_in
        return ScalingValues(torch.zeros_like(t), torch.ones_like(t), c_in)


@final
@dataclass(frozen=True)
class EDMInputScalingConfig(ScalingConfig):
    """Input alone as EDM scales it: for preconditionings that scale the output."""

    unit_input: ClassVar[bool] = True

    def build(self, path: Path, sigma_data: float) -> Scaling:
        return EDMInputScaling(sigma_data, path)
