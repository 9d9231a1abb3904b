"""The skip: a jump lets through what the flow map of N(m, C) does, or what a regression on a teacher's trajectories
finds; the network learns the rest (math.md §3.8).
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple, final, get_args

import torch
from torch import Tensor

from fewstep.flow.paths import EDM, Path
from fewstep.flow.preconditioning.base import Preconditioning, PreconditioningConfig, WrappedPreconditioning
from fewstep.flow.preconditioning.covariance import (
    Basis,
    Classes,
    Covariance,
    CovarianceSettings,
    columns,
    denoiser_gain,
    flow_gain,
    velocity_gain,
)
from fewstep.flow.preconditioning.jumps import EulerPreconditioningConfig
from fewstep.flow.preconditioning.network_scaling import ScalingConfig
from fewstep.flow.preconditioning.regression import Family, Measured, Regression, RegressionSettings
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.utils.errors import ConfigError
from fewstep.utils.forward_ad import jvp
from fewstep.utils.serialization import later
from fewstep.utils.tensors import check_choice, check_least, expand, nonzero


@final
@dataclass(frozen=True)
class SkipPreconditioning(WrappedPreconditioning):
    """X = X_G(x, t, s) + g (N - N_G(x, t)), g the base's, X_G the flow map of N(m, C), N_G its N on the diagonal.

    N_G is the Gaussian's denoiser D_G where the base's N denoises, else (v_G - f_s x)/g_s. At s = t the jump is x and
    its derivative in s is f_s x + g_s N for every C: velocity, guidance and teachers mean what they do under the base.
    f of the base cancels. Exact with N = N_G on Gaussian data of any covariance, on any path.

    regression: what a teacher's trajectories say of the factors of X_G and D_G along each direction, and of g; all of
    the above holds for any values of it, and it is nothing on Gaussian data.
    """

    covariance: Covariance
    path: Path = EDM()
    regression: Regression | None = later(lambda: None)

    def __post_init__(self) -> None:
        if self.base.data_end_only:
            raise ConfigError("a skip needs a preconditioning with a velocity, which cm has not: take euler or bcm")

    def check_end(self, path: Path) -> None:
        self.base.check_end(path)

    def known_statistics(self) -> TrajectoryStatistics | None:
        return self.base.known_statistics()

    def known_measures(self) -> Measured:
        return Measured(self.covariance, self.regression)

    def of(self, labels: Tensor | None) -> "SkipPreconditioning":
        base, covariance = self.base.of(labels), self.covariance.of(labels)
        same = base is self.base and covariance is self.covariance
        return self if same else replace(self, base=base, covariance=covariance)

    def with_statistics(self, statistics: TrajectoryStatistics) -> "SkipPreconditioning":
        return replace(self, base=self.base.with_statistics(statistics))

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(f, g) of the base; f is the jump's share of x only along directions where the Gaussian agrees with it."""
        f, g = self.base.coefficients(t, s)
        if self.regression is None:
            return f, g
        t, s = torch.broadcast_tensors(self.path.clock(t), self.path.clock(s))
        return f, self.regression.weighed(g, self.path.values(t), self.path.values(s))

    def jump(self, path: Path, x: Tensor, output: Tensor, t: Tensor, s: Tensor) -> Tensor:
        g = expand(self.coefficients(t, s)[1], x).to(x.dtype)
        return self.linear(x, t, s) + g * output

    def residual(
        self, path: Path, x: Tensor, v: Tensor, output: Tensor, d_output: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        """d/dt of the linear part along the flow, plus g_t N + g dN/dt."""
        d = self.derivatives(t, s)
        moved: Tensor = jvp(lambda x, t: self.linear(x, t, s), (x, t), (v, torch.ones_like(t)))[1]
        return moved + expand(d.g_t, x).to(x.dtype) * output + expand(d.g, x).to(x.dtype) * d_output

    def passed(self, path: Path, change: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return self.covariance.scaled(change, lambda lam: self._gain(lam, t, s))

    def shown(self, path: Path, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """(G - g n - f)(x - alpha_t m)/sd: what a jump lets through beyond f x, which N must undo where it is wrong."""
        centred = x - expand(self.path.values(t).alpha, x).to(x.dtype) * self.covariance.like("mean", x)
        return (self.passed(path, centred, t, s) - self.base.passed(path, centred, t, s)) / self.covariance.deviation

    def linear(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """X_G - g N_G = (G - g n)(x - alpha_t m) + (alpha_s - g n_m) m, (B, ...): the jump without the network."""
        at_t, at_s, mean = self.path.values(t), self.path.values(s), self.covariance.like("mean", x)
        centred = x - expand(at_t.alpha, x).to(x.dtype) * mean
        g = self.coefficients(t, s)[1]
        weight = expand(at_s.alpha - g * self._output_of_mean(t), x).to(x.dtype)
        return self.passed(self.path, centred, t, s) + weight * mean

    def at_times(self, t: Tensor, s: Tensor) -> "SkipAtTimes":
        """The numbers of one jump t -> s, times (1,): all that it needs of them."""
        alpha_t, alpha_s = (self.path.values(time).alpha for time in (t, s))
        f, g = self.coefficients(t, s)
        gains = self._gain(self.covariance.lam[None], t, s)
        weight = alpha_s - g * self._output_of_mean(t)
        return SkipAtTimes(gains, gains - f[:, None], float(alpha_t), float(weight), float(g))

    def _gain(self, lam: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """G - g n along directions of variance lam (1, k): (B, k); n the factor of N_G on the diagonal."""
        at_t, g = columns(self.path, t), self.coefficients(t, s)[1][:, None]
        flow, shift = flow_gain(at_t, columns(self.path, s), lam), torch.zeros_like(g)
        if self.regression is not None:
            flow = flow * self.regression.ratio(self.path.values(t), self.path.values(s))
            shift = self.regression.shift(self.path.values(t))
        if self.denoises:
            return flow - g * (denoiser_gain(at_t, lam) + shift)
        f_s, g_s = (value[:, None] for value in self.base.diagonal(t))
        slope = at_t.d_alpha - at_t.alpha * at_t.d_sigma / nonzero(at_t.sigma)  # of the velocity in the denoiser
        return flow - g * (velocity_gain(at_t, lam) + slope * shift - f_s) / g_s

    def _output_of_mean(self, t: Tensor) -> Tensor:
        """n_m (B,): N_G at x = alpha_t m is n_m m."""
        if self.denoises:
            return torch.ones_like(t)
        at_t, (f_s, g_s) = self.path.values(t), self.base.diagonal(t)
        return (at_t.d_alpha - f_s * at_t.alpha) / nonzero(g_s)


class SkipAtTimes(NamedTuple):
    """X = V diag(gains) V' (x - alpha m) + weight m + g N, and what is shown, V diag(seen) V' (x - alpha m)/sd.

    gains, seen (1, n): one for each variance of the covariance.
    """

    gains: Tensor
    seen: Tensor
    alpha: float
    weight: float
    g: float


TRAJECTORIES, LEVELS = 1000, 48
"""Of a teacher, and noise levels along each, that a regression takes where nothing else is said."""


@final
@dataclass(frozen=True)
class SkipPreconditioningConfig(PreconditioningConfig):
    """A Gaussian's flow map with the data's mean and covariance, or a regression, over another preconditioning."""

    base: PreconditioningConfig = field(default_factory=EulerPreconditioningConfig)
    """What the network's output means, and its weight g in a jump."""
    basis: Basis = "components"
    """components, the data's principal ones (to 4,096 numbers a sample), or cosine, for images of any size."""
    components: int = 0
    """Number of principal components, the others having one variance; 0 takes all."""
    family: Family = later(lambda: "covariance")
    """covariance, the Gaussian's flow map; or least squares on a teacher's trajectories: regressed by one number of
    (t, s), regressed-components by one for each direction, regressed-length the same with the Gaussian's variance."""
    regress_g: bool = later(bool)
    """Regress the network's weight g too, at most Euler's; for regressed families over euler."""
    trajectories: int = later(lambda: TRAJECTORIES)
    """Of the teacher, for the regressed families."""
    levels: int = later(lambda: LEVELS)
    """Noise levels along them, evenly spaced in log noise."""
    classes: Classes = later(lambda: "pooled")
    """For data of classes: pooled, one mean and covariance; origin, a mean for each; covariance, both for each."""

    def __post_init__(self) -> None:
        check_choice("basis", self.basis, get_args(Basis))
        check_choice("family", self.family, get_args(Family))
        check_choice("classes", self.classes, get_args(Classes))
        check_least(0, components=self.components)
        check_least(2, trajectories=self.trajectories)
        check_least(4, levels=self.levels)
        if self.regress_g and (not self.regressed or not isinstance(self.base, EulerPreconditioningConfig)):
            raise ConfigError("g is regressed for a regressed family over euler alone: leave --regress-g out")
        if self.family == "regressed" and (self.basis, self.components) != ("components", 0):
            raise ConfigError("one number regressed knows no directions: leave --basis and --components out")
        if self.basis == "cosine" and self.components:
            raise ConfigError(f"all cosines have a variance of their own: leave --components {self.components} out")
        if not self.regressed and (self.trajectories, self.levels) != (TRAJECTORIES, LEVELS):
            raise ConfigError("the covariance needs no trajectories: leave --trajectories and --levels out")
        if self.base.data_end_only or self.base.covariance:
            raise ConfigError("a skip stands over a preconditioning with a velocity: take euler, linear or analytic")

    @property
    def needs_statistics(self) -> bool:
        return self.base.needs_statistics

    @property
    def regressed(self) -> bool:
        """Whether it is made of a teacher's trajectories."""
        return self.family != "covariance"

    @property
    def covariance(self) -> CovarianceSettings:
        if self.family == "regressed":
            return CovarianceSettings("isotropic", classes=self.classes)
        return CovarianceSettings(self.basis, self.components, self.classes)

    @property
    def regression(self) -> RegressionSettings | None:
        if not self.regressed:
            return None
        return RegressionSettings(self.family, self.regress_g, self.trajectories, self.levels)

    def build(self, path: Path, sigma_data: float, statistics: TrajectoryStatistics | None = None) -> Preconditioning:
        return self.base.build(path, sigma_data, statistics)

    def let_through(self, built: Preconditioning, path: Path, measured: Measured | None) -> Preconditioning:
        if measured is None or (self.regressed and measured.regression is None):
            raise ConfigError("a skip needs the data's covariance or a regression: none was measured")
        return SkipPreconditioning(built, measured.covariance, path, measured.regression)

    def check_scaling(self, scaling: ScalingConfig) -> None:
        self.base.check_scaling(scaling)
