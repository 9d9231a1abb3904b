"""Preconditioning as a value: the jump X(x, t, s) = f(t, s) x + g(t, s) N(x, t, s) (math.md §2).

f(t, t) = 1 and g(t, t) = 0 hold for every preconditioning, so any network satisfies the boundary condition. What
the network means on the diagonal follows from (f, g): v(x, t) = f_s x + g_s N(x, t, t), with f_s, g_s the derivatives
in s at s = t.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.flow.paths import Path
from fewstep.flow.preconditioning.network_scaling import ScalingConfig
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.utils.errors import ConfigError
from fewstep.utils.forward_ad import jvp


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

    target_in_network: ClassVar[bool] = False
    denoises: ClassVar[bool] = False
    data_end_only: ClassVar[bool] = False

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

    def with_statistics(self, statistics: TrajectoryStatistics) -> "Preconditioning":
        """The same from other statistics; raises ConfigError where they give none, or where it is of no statistics."""
        raise ConfigError(f"{type(self).__name__} is not computed from statistics")

    def derivatives(self, t: Tensor, s: Tensor) -> JumpDerivatives:
        """(f, g, f_t, g_t) at (t, s)."""
        t, s = (time.contiguous() for time in torch.broadcast_tensors(t, s))
        (f, g), (f_t, g_t) = jvp(lambda time: self.coefficients(time, s), (t,), (torch.ones_like(t),))
        return JumpDerivatives(f, g, f_t, g_t)


class PreconditioningConfig(ABC):
    """Settings of a preconditioning; subclasses are final frozen dataclasses.

    needs_statistics: whether it is computed from the statistics of a teacher, or of the model itself. data_end_only: as
    of the preconditioning that it builds.
    """

    needs_statistics: ClassVar[bool] = False
    data_end_only: ClassVar[bool] = False

    @abstractmethod
    def build(self, path: Path, sigma_data: float, statistics: TrajectoryStatistics | None = None) -> Preconditioning:
        """The preconditioning on a path, for data of that standard deviation.

        Raises ConfigError where it has no meaning on that path, or lacks the statistics that it needs.
        """

    def check_scaling(self, scaling: ScalingConfig) -> None:  # noqa: B027  (no check by default)
        """Raise ConfigError for an inner scaling that it does not go with; all go with most."""


def origin_weight(path: Path, f: Tensor, g: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """alpha_s - alpha_t f - g, the weight of the origin in a jump of coefficients (f, g); 0 at t = s (math.md §3.6)."""
    return path.values(s).alpha - path.values(t).alpha * f - g
