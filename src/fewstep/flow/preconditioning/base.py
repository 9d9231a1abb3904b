"""Preconditioning as a value: the jump X(x, t, s) = f(t, s) x + g(t, s) N(x, t, s) (math.md §2).

f(t, t) = 1 and g(t, t) = 0 hold for every preconditioning, so any network satisfies the boundary condition. What
the network means on the diagonal follows from (f, g): v(x, t) = f_s x + g_s N(x, t, t), with f_s, g_s the derivatives
in s at s = t.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.flow.paths import Path
from fewstep.flow.preconditioning.covariance import CovarianceSettings
from fewstep.flow.preconditioning.network_scaling import ScalingConfig
from fewstep.flow.preconditioning.regression import Measured, RegressionSettings
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.utils.errors import ConfigError
from fewstep.utils.forward_ad import jvp
from fewstep.utils.tensors import expand


class JumpDerivatives(NamedTuple):
    """f, g and their derivatives in the starting time t, broadcast over (t, s)."""

    f: Tensor
    g: Tensor
    f_t: Tensor
    g_t: Tensor


class Preconditioning(ABC):
    """Jump coefficients; subclasses are final frozen dataclasses.

    target_in_network: whether the Eulerian residual may be added to the network's output (g_t < 0 on the whole
    range), or a step is taken in the map (math.md §5.1). denoises: whether N(x, t, t) is the denoiser. data_end_only:
    whether jumps go to s = t_min alone, so that the network gives no velocity.
    """

    data_end_only: ClassVar[bool] = False

    @property
    def target_in_network(self) -> bool:
        return False

    @property
    def denoises(self) -> bool:
        return False

    @abstractmethod
    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(f, g) for jumps t -> s, broadcasting, differentiable, in float64 for times of any type."""

    @abstractmethod
    def diagonal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(f_s, g_s) at s = t, so that v = f_s x + g_s N(x, t, t)."""

    @property
    def origin(self) -> Tensor | None:
        """m in X = f x + g N + (alpha_s - alpha_t f - g) m (math.md §3.6), of a sample's shape; None for zero."""
        return None

    @property
    def frozen_at(self) -> Literal["t", "s"]:
        """The end of the jump at which N would equal the denoiser if the jump's approximation were exact."""
        return "t"

    def check_end(self, path: Path) -> None:  # noqa: B027  (most jump to any end of any path)
        """Raise ConfigError where it cannot jump to s = t_min of a path."""

    def known_statistics(self) -> TrajectoryStatistics | None:
        """The statistics that it was computed from; None where it was not."""
        return None

    def known_measures(self) -> Measured | None:
        """The covariance of data, and the regression, that it was computed from; None where it was not."""
        return None

    def of(self, labels: Tensor | None) -> "Preconditioning":
        """That of a batch of these labels (B,), -1 for no class; itself where classes make no difference."""
        return self

    def with_statistics(self, statistics: TrajectoryStatistics) -> "Preconditioning":
        """The same from other statistics; raises ConfigError where they give none, or where it is of no statistics."""
        raise ConfigError(f"{type(self).__name__} is not computed from statistics")

    def derivatives(self, t: Tensor, s: Tensor) -> JumpDerivatives:
        """(f, g, f_t, g_t) at (t, s)."""
        t, s = (time.contiguous() for time in torch.broadcast_tensors(t, s))
        (f, g), (f_t, g_t) = jvp(lambda time: self.coefficients(time, s), (t,), (torch.ones_like(t),))
        return JumpDerivatives(f, g, f_t, g_t)

    def jump(self, path: Path, x: Tensor, output: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """X = f x + g N, about the origin if there is one; x, N = output (B, ...), t, s (B,) float64."""
        f, g = self.coefficients(t, s)
        jumped = expand(f, x).to(x.dtype) * x + expand(g, x).to(x.dtype) * output
        if self.origin is None:
            return jumped
        return jumped + expand(origin_weight(path, f, g, t, s), x).to(x.dtype) * self.origin.to(x)

    def residual(
        self, path: Path, x: Tensor, v: Tensor, output: Tensor, d_output: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        """R = f_t x + f v + g_t N + g dN/dt, the derivative in t of X(x_t, t, s) along the flow (math.md section 5.1).

        x, v, N = output, dN/dt = d_output: (B, ...); t, s: (B,). Zero at an exact flow map. An origin m adds
        (-alpha_t' f - alpha_t f_t - g_t) m (math.md section 3.6).
        """
        d = self.derivatives(t, s)
        f, g, f_t, g_t = (expand(c, x).to(x.dtype) for c in d)
        residual = f_t * x + f * v + g_t * output + g * d_output
        if self.origin is None:
            return residual
        p = path.values(t)
        return residual + expand(-p.d_alpha * d.f - p.alpha * d.f_t - d.g_t, x).to(x.dtype) * self.origin.to(x)

    def shown(self, path: Path, x: Tensor, t: Tensor, s: Tensor) -> Tensor | None:
        """What a network may be shown of the jump besides x and the times, (B, ...); None for nothing."""
        return None

    def passed(self, path: Path, change: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """What a jump makes of a small change of x, (B, ...), the network apart: f times it."""
        return expand(self.coefficients(t, s)[0], change).to(change.dtype) * change


class PreconditioningConfig(ABC):
    """Settings of a preconditioning; subclasses are final frozen dataclasses.

    needs_statistics: whether it is computed from the statistics of a teacher, or of the model itself. data_end_only: as
    of the preconditioning that it builds.
    """

    data_end_only: ClassVar[bool] = False

    @property
    def needs_statistics(self) -> bool:
        return False

    @property
    def covariance(self) -> CovarianceSettings | None:
        """How the data's covariance is measured for it; None where it needs none."""
        return None

    @property
    def regression(self) -> RegressionSettings | None:
        """What is regressed on a teacher's trajectories for it; None where nothing is."""
        return None

    @abstractmethod
    def build(self, path: Path, sigma_data: float, statistics: TrajectoryStatistics | None = None) -> Preconditioning:
        """The preconditioning on a path, for data of that standard deviation.

        Raises ConfigError where it has no meaning on that path, or lacks the statistics that it needs.
        """

    def let_through(self, built: Preconditioning, path: Path, measured: Measured | None) -> Preconditioning:
        """The preconditioning that `build` gave, with what it lets through besides; itself by default."""
        return built

    def check_scaling(self, scaling: ScalingConfig) -> None:  # noqa: B027  (no check by default)
        """Raise ConfigError for an inner scaling that it does not go with; all go with most."""


@dataclass(frozen=True)
class WrappedPreconditioning(Preconditioning):
    """One that jumps another way than `base` does, and whose network means on the diagonal what it means there."""

    base: Preconditioning

    @property
    def target_in_network(self) -> bool:
        return self.base.target_in_network

    @property
    def denoises(self) -> bool:
        return self.base.denoises

    @property
    def frozen_at(self) -> Literal["t", "s"]:
        return self.base.frozen_at

    @property
    def origin(self) -> Tensor | None:
        return self.base.origin

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return self.base.coefficients(t, s)

    def diagonal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.base.diagonal(t)


def origin_weight(path: Path, f: Tensor, g: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """alpha_s - alpha_t f - g, the weight of the origin in a jump of coefficients (f, g); 0 at t = s (math.md §3.6)."""
    return path.values(s).alpha - path.values(t).alpha * f - g
