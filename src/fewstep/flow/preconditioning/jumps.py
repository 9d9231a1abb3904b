"""The preconditionings of the literature in closed form (math.md §2).

Those defined on the EDM path travel to any path by y = x/alpha at noise level tau = sigma/alpha:
f_path = (alpha_s/alpha_t) f(tau_t, tau_s), g_path = alpha_s g(tau_t, tau_s) (math.md §3.5), written out so that
they stay finite where alpha is 0.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fewstep.flow.paths import EDM, Path
from fewstep.flow.preconditioning.base import Preconditioning, PreconditioningConfig
from fewstep.flow.preconditioning.network_scaling import ScalingConfig
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.utils.errors import ConfigError, UnsupportedError
from fewstep.utils.tensors import check_positive, holds_everywhere, in_float64, nonzero, on_host


class VelocityPreconditioning(Preconditioning):
    """N is the velocity on the diagonal: f_s = 0, g_s = 1."""

    target_in_network: ClassVar[bool] = True

    def diagonal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = in_float64(t)
        return torch.zeros_like(t), torch.ones_like(t)


@final
@dataclass(frozen=True)
class LinearPreconditioning(VelocityPreconditioning):
    """f = 1, g = s - t (MeanFlow, 2505.13447); N is the velocity on the diagonal, the mean velocity off it."""

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        g = in_float64(s) - in_float64(t)
        return torch.ones_like(g), g


@final
@dataclass(frozen=True)
class LinearPreconditioningConfig(PreconditioningConfig):
    """The network gives the mean velocity of a jump (MeanFlow)."""

    def build(self, path: Path, sigma_data: float, statistics: TrajectoryStatistics | None = None) -> Preconditioning:
        return LinearPreconditioning()


@final
@dataclass(frozen=True)
class TrigPreconditioning(VelocityPreconditioning):
    """f = cos(t - s), g = -sin(t - s) (sCM, 2410.11081); N is the velocity per radian on the diagonal.

    For clocks no longer than pi/2: beyond, g is no longer monotone in s.
    """

    def check_end(self, path: Path) -> None:
        if path.t_max - path.t_min > math.pi / 2 + 1e-9:
            raise ConfigError("trig preconditioning needs a clock of at most pi/2: take the path trig, linear or vp")

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        gap = in_float64(t) - in_float64(s)
        return torch.cos(gap), -torch.sin(gap)


@final
@dataclass(frozen=True)
class TrigPreconditioningConfig(PreconditioningConfig):
    """A rotation, for clocks of at most pi/2 (sCM)."""

    def build(self, path: Path, sigma_data: float, statistics: TrajectoryStatistics | None = None) -> Preconditioning:
        own = TrigPreconditioning()
        own.check_end(path)
        return own


@final
@dataclass(frozen=True)
class EulerPreconditioning(Preconditioning):
    """f = sigma_s/sigma_t, g = alpha_s - alpha_t sigma_s/sigma_t: the DDIM step; N is the denoiser on the diagonal.

    On the EDM path f = s/t, g = 1 - s/t (CTM, 2310.02279). At sigma = 0, where the velocity would be 0/0, it is its
    limit alpha' D: x is its own denoiser there.
    """

    denoises: ClassVar[bool] = True
    path: Path = EDM()

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        at_t, at_s = self.path.values(t), self.path.values(s)
        clean = at_t.sigma == 0
        f = torch.where(clean, 1.0, at_s.sigma / torch.where(clean, 1.0, at_t.sigma))
        return f, at_s.alpha - at_t.alpha * f

    def diagonal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        p = self.path.values(t)
        f_s = p.d_sigma / nonzero(p.sigma)
        return f_s, p.d_alpha - p.alpha * f_s


@final
@dataclass(frozen=True)
class EulerPreconditioningConfig(PreconditioningConfig):
    """DDIM's step, the network giving a denoiser (CTM)."""

    def build(self, path: Path, sigma_data: float, statistics: TrajectoryStatistics | None = None) -> Preconditioning:
        return EulerPreconditioning(path)


@final
@dataclass(frozen=True)
class CMPreconditioning(Preconditioning):
    """c_skip and c_out of consistency models (2303.01469) for the raw network; maps to s = t_min alone, EDM path.

    f = sd^2 / ((t - t_min)^2 + sd^2), g = sd (t - t_min) / sqrt(t^2 + sd^2).
    """

    data_end_only: ClassVar[bool] = True
    sigma_data: float = 0.5
    t_min: float = 0.002

    def __post_init__(self) -> None:
        check_positive(sigma_data=self.sigma_data)

    def check_end(self, path: Path) -> None:
        if not (path.noise_clock and math.isclose(path.t_min, self.t_min, abs_tol=1e-6)):
            raise ConfigError(
                f"CM preconditioning jumps to {self.t_min} of the EDM path, not to {path.t_min} of {path}"
            )

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(f, g); raises UnsupportedError when some s is not t_min, elsewhere than on the CPU g is NaN there.

        Nothing is checked under torch.compile.
        """
        t, s = in_float64(t), in_float64(s)
        here = on_host(s) and not torch.compiler.is_compiling()
        if here and not holds_everywhere(torch.abs(s.detach() - self.t_min) <= 1e-6):
            raise UnsupportedError(
                f"CM preconditioning jumps to s = t_min = {self.t_min} alone; "
                "sample by --sampler gamma --gamma 1, or train with Euler or BCM preconditioning"
            )
        variance = self.sigma_data**2
        gap = t - s
        g = self.sigma_data * gap / torch.sqrt(t * t + variance)
        g = g if on_host(s) else torch.where(torch.abs(s - self.t_min) <= 1e-6, g, torch.nan)
        return variance / (gap * gap + variance), g

    def diagonal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """CM has no diagonal: always raises UnsupportedError."""
        raise UnsupportedError(
            "CM preconditioning has no diagonal: it jumps to t_min alone, so the network gives no velocity"
        )


@final
@dataclass(frozen=True)
class CMPreconditioningConfig(PreconditioningConfig):
    """Consistency models' own, for jumps to the data end alone: on the edm path with edm-input scaling."""

    data_end_only: ClassVar[bool] = True

    def build(self, path: Path, sigma_data: float, statistics: TrajectoryStatistics | None = None) -> Preconditioning:
        if not path.noise_clock:
            raise ConfigError("cm preconditioning is of noise levels: take the path edm")
        return CMPreconditioning(sigma_data, path.t_min)

    def check_scaling(self, scaling: ScalingConfig) -> None:
        _check_output("cm", scaling)
        if not scaling.unit_input:
            raise ConfigError("cm preconditioning is made for a scaled input: take the inner scaling edm-input with it")


@final
@dataclass(frozen=True)
class BCMPreconditioning(Preconditioning):
    """Bidirectional consistency models (2403.18035) for the raw network: on the EDM path

    f = (sd^2 + t s)/(sd^2 + t^2), g = sd (t - s)/sqrt(sd^2 + t^2); equal to Euler with EDM's inner scaling.
    """

    sigma_data: float = 0.5
    path: Path = EDM()

    def __post_init__(self) -> None:
        check_positive(sigma_data=self.sigma_data)

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        at_t, at_s = self.path.values(t), self.path.values(s)
        variance = self.sigma_data**2
        total = variance * at_t.alpha**2 + at_t.sigma**2
        f = (variance * at_s.alpha * at_t.alpha + at_t.sigma * at_s.sigma) / total
        g = self.sigma_data * (at_s.alpha * at_t.sigma - at_t.alpha * at_s.sigma) / torch.sqrt(total)
        return f, g

    def diagonal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        p = self.path.values(t)
        variance = self.sigma_data**2
        total = variance * p.alpha**2 + p.sigma**2
        f_s = (variance * p.d_alpha * p.alpha + p.sigma * p.d_sigma) / total
        g_s = self.sigma_data * (p.d_alpha * p.sigma - p.alpha * p.d_sigma) / torch.sqrt(total)
        return f_s, g_s


@final
@dataclass(frozen=True)
class BCMPreconditioningConfig(PreconditioningConfig):
    """Consistency models' for jumps to any end, for edm-input scaling (bidirectional CM)."""

    def build(self, path: Path, sigma_data: float, statistics: TrajectoryStatistics | None = None) -> Preconditioning:
        return BCMPreconditioning(sigma_data, path)

    def check_scaling(self, scaling: ScalingConfig) -> None:
        _check_output("bcm", scaling)


def _check_output(name: str, scaling: ScalingConfig) -> None:
    if scaling.denoises:
        raise ConfigError(
            f"{name} preconditioning holds EDM's c_skip and c_out itself: take the inner scaling edm-input with it"
        )
