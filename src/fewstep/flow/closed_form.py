"""Data whose denoiser, velocity and flow map are known in closed form (math.md §7).

Tests stand on them, and whoever develops an objective can: at the oracle every residual is zero.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import Path
from fewstep.flow.preconditioning.base import Preconditioning
from fewstep.networks.condition import Condition
from fewstep.utils.forward_ad import jvp
from fewstep.utils.random import Draws
from fewstep.utils.runge_kutta import runge_kutta_step
from fewstep.utils.tensors import expand

MIXTURE_SHAPE = (1, 4, 4)
"""Of a sample of the toy mixture."""
_COMPONENTS = 8
_PARAMETERS_SEED = 16
_CENTRE, _SPREAD, _WIDTH, _WEIGHT = 0, 1, 2, 3


@dataclass(frozen=True)
class GaussianData:
    """x0 ~ N(mean, sd^2 I); mean broadcasts over a sample's shape."""

    mean: Tensor
    sd: float

    def denoise(self, path: Path, x: Tensor, t: Tensor) -> Tensor:
        """D = m + alpha sd^2 (x - alpha m) / (alpha^2 sd^2 + sigma^2)."""
        p = path.values(t).over(x)
        gain = p.alpha * self.sd**2 / (p.alpha**2 * self.sd**2 + p.sigma**2)
        return self.mean + gain * (x - p.alpha * self.mean)

    def velocity(self, path: Path, x: Tensor, t: Tensor) -> Tensor:
        """v = alpha' m + (alpha alpha' sd^2 + sigma sigma') / (alpha^2 sd^2 + sigma^2) (x - alpha m)."""
        p = path.values(t).over(x)
        rate = (p.alpha * p.d_alpha * self.sd**2 + p.sigma * p.d_sigma) / (p.alpha**2 * self.sd**2 + p.sigma**2)
        return p.d_alpha * self.mean + rate * (x - p.alpha * self.mean)

    def jump(self, path: Path, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """X = alpha_s m + (x - alpha_t m) sqrt(alpha_s^2 sd^2 + sigma_s^2) / sqrt(alpha_t^2 sd^2 + sigma_t^2)."""
        at_t, at_s = path.values(t).over(x), path.values(s).over(x)
        ratio = torch.sqrt(at_s.alpha**2 * self.sd**2 + at_s.sigma**2)
        ratio = ratio / torch.sqrt(at_t.alpha**2 * self.sd**2 + at_t.sigma**2)
        return at_s.alpha * self.mean + ratio * (x - at_t.alpha * self.mean)

    def flow_map(self, path: Path, preconditioning: Preconditioning) -> FlowMap:
        """A FlowMap whose jump and velocity are exact."""
        return FlowMap(path, preconditioning, GaussianOutput(self, path, preconditioning))


class GaussianOutput(nn.Module):
    """The exact network of a preconditioning: N = (X - X of N = 0)/g off the diagonal, (v - f_s x)/g_s or D on it."""

    def __init__(self, data: GaussianData, path: Path, preconditioning: Preconditioning) -> None:
        super().__init__()
        self.data, self.path, self.preconditioning = data, path, preconditioning

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        """x (B, ...), t, s (B,) in the path's clock."""
        g, same = self.preconditioning.coefficients(t, s)[1], t == s
        target = self.data.jump(self.path, x, t, s) - self.preconditioning.jump(self.path, x, torch.zeros_like(x), t, s)
        g, same = expand(torch.where(same, 1.0, g), x).to(x.dtype), expand(same, x)
        jumped = target / g
        if not bool(same.any()):
            return jumped
        return torch.where(same, self._on_diagonal(x, t), jumped)

    def _on_diagonal(self, x: Tensor, t: Tensor) -> Tensor:
        if self.preconditioning.denoises:
            return self.data.denoise(self.path, x, t)
        f_s, g_s = (expand(c, x).to(x.dtype) for c in self.preconditioning.diagonal(t))
        return (self.data.velocity(self.path, x, t) - f_s * x) / g_s


@dataclass(frozen=True)
class MixtureData:
    """x0 ~ sum_k weights_k N(means_k, sds_k^2 I): weights (K,), means (K, d), sds (K,)."""

    weights: Tensor
    means: Tensor
    sds: Tensor

    def sample(self, u: Tensor, eps: Tensor) -> Tensor:
        """x0 (B, d) from u (B,) uniform on (0, 1) and eps (B, d) standard normal."""
        chosen = torch.searchsorted(self.weights.cumsum(0), u).clamp(max=len(self.weights) - 1)
        return self.means[chosen] + self.sds[chosen, None] * eps

    def denoise(self, path: Path, x: Tensor, t: Tensor) -> Tensor:
        """Posterior-weighted mean of the components' denoisers; x (B, ...) of d numbers a sample, t (B,)."""
        p, shape, x = path.values(t), x.shape, x.flatten(1)
        alpha, sigma = p.alpha[:, None], p.sigma[:, None]
        variance = alpha**2 * self.sds**2 + sigma**2
        offset = x[:, None, :] - alpha[:, :, None] * self.means
        log_density = -0.5 * offset.square().sum(-1) / variance - 0.5 * x.shape[1] * torch.log(2 * math.pi * variance)
        posterior = torch.softmax(torch.log(self.weights) + log_density, dim=1)
        each = self.means + (alpha * self.sds**2 / variance)[:, :, None] * offset
        return (posterior[:, :, None] * each).sum(1).reshape(shape).to(x.dtype)

    def velocity(self, path: Path, x: Tensor, t: Tensor) -> Tensor:
        """PF-ODE velocity."""
        return path.velocity_from_denoised(x, self.denoise(path, x, t), t)

    def jump(self, path: Path, x: Tensor, t: Tensor, s: Tensor, steps: int = 200) -> Tensor:
        """X(x, t, s) by the classical Runge-Kutta method of order 4 on the path's unit clock.

        Times per sample; needs sigma(s) > 0. The error falls as steps^-4.
        """
        unit_t, unit_s = _unit_time(path, path.clock(t)), _unit_time(path, path.clock(s))
        h = (unit_s - unit_t) / steps
        for i in range(steps):
            x = runge_kutta_step(lambda u, y: self._unit_velocity(path, y, u), x, unit_t + i * h, h)
        return x

    def _unit_velocity(self, path: Path, x: Tensor, u: Tensor) -> Tensor:
        t, dt_du = jvp(path.time_from_unit, (u,), (torch.ones_like(u),))
        return expand(dt_du, x).to(x.dtype) * self.velocity(path, x, t)


def toy_mixture(dtype: torch.dtype = torch.float64) -> MixtureData:
    """The mixture of the data source 'mixture', (1, 4, 4) a sample, so d = 16: 8 components, always the same.

    The means lie about a centre of norm 2, so that centring matters, and spread by 1.2 along the first dimension down
    to 0.3 along the last; sds lie in [0.1, 0.3] and weights between 1/16 and 3/16 before they are normalised.
    """
    components = Draws(_PARAMETERS_SEED, 0, torch.arange(_COMPONENTS))
    dimension = math.prod(MIXTURE_SHAPE)
    centre = Draws(_PARAMETERS_SEED, 1, torch.zeros(1, dtype=torch.int64)).normal(_CENTRE, (dimension,), torch.float64)
    scales = torch.logspace(math.log10(1.2), math.log10(0.3), dimension, dtype=torch.float64)
    spread = components.normal(_SPREAD, (dimension,), torch.float64)
    weights = 0.5 + components.uniform(_WEIGHT)
    weights = weights / weights.sum()
    means = 2.0 * centre / centre.norm() + scales * spread
    sds = 0.1 + 0.2 * components.uniform(_WIDTH)
    return MixtureData(weights.to(dtype), means.to(dtype), sds.to(dtype))


def _unit_time(path: Path, t: Tensor) -> Tensor:
    """The inverse of path.time_from_unit, by bisection: exact for any monotone clock."""
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(80):
        middle = (low + high) / 2
        below = path.time_from_unit(middle) < t
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
