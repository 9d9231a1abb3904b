"""The consistency gap: how far a first-order jump along the true trajectory is from the denoiser (math.md §3.4)."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from fewstep.flow.ode import reference_solution
from fewstep.flow.paths import EDM, Path
from fewstep.flow.preconditioning.base import Preconditioning
from fewstep.flow.preconditioning.estimation import STREAM_NOISE
from fewstep.flow.preconditioning.tangents import PlainDenoiser
from fewstep.networks.condition import Condition
from fewstep.utils.errors import ConfigError, ShapeError
from fewstep.utils.random import Draws, permutation
from fewstep.utils.tensors import expand


class ConsistencyGap(NamedTuple):
    """The gap at K jumps t -> s: rms and its standard error, each (K,) float64."""

    t: Tensor
    s: Tensor
    rms: Tensor
    stderr: Tensor


@final
@dataclass(frozen=True)
class GapSettings:
    """How a gap is measured. Raises ConfigError for too few samples or steps.

    samples: of x0 and eps, the same for every jump. seed: of the draw and the noise. solver_steps: of the Runge-Kutta
    method, of equal length in log tau. end: of the jump at which N* is compared with D; None for
    Preconditioning.frozen_at.
    """

    samples: int = 256
    seed: int = 0
    solver_steps: int = 128
    end: Literal["t", "s"] | None = None

    def __post_init__(self) -> None:
        if self.samples < 2 or self.solver_steps < 1:
            raise ConfigError(
                f"the gap needs at least 2 samples and 1 step of the solver, got {self.samples} and {self.solver_steps}"
            )


def consistency_gap(
    preconditioning: Preconditioning,
    denoiser: PlainDenoiser,
    data: Tensor,
    t: Tensor | float,
    s: Tensor | float,
    *,
    path: Path = EDM(),
    settings: GapSettings = GapSettings(),
) -> ConsistencyGap:
    """sqrt(E|N* - D|^2 / dim), the root mean square over samples and their elements, at each of K jumps t -> s, where

      N*(x_t, t, s) = (X(x_t, t, s) - f x_t - (alpha_s - alpha_t f - g) m)/g
    is what a perfect student's network gives, X by the Runge-Kutta method of order 4, and D the denoiser at (x_t, t),
    or at (X, s) where the preconditioning freezes its residual there.

    denoiser: (x, t) -> (B, ...) in the path's coordinates. data (n, ...): as many rows are drawn over all of it, and
    kept in their order; all of it, cycled, where it has no more. t, s (K,) in the path's clock with s < t and
    sigma/alpha positive and finite at both, or ShapeError.
    """
    if not len(data):
        raise ShapeError("the gap needs data (n, ...), n at least 1")
    t, s = (time if isinstance(time, Tensor) else torch.tensor(time, dtype=torch.float64) for time in (t, s))
    t, s = (path.clock(time.to(data.device)).reshape(-1) for time in (t, s))
    if t.shape != s.shape or not bool((s < t).all()):
        raise ShapeError(f"jumps must be times t and s (K,) with s < t, got shapes {tuple(t.shape)}, {tuple(s.shape)}")
    if not bool((path.values(t).alpha > 1e-9).all() and (path.values(s).sigma > 0).all()):
        raise ShapeError("the consistency gap needs a finite, positive noise level sigma/alpha at t and at s")
    numbers = torch.arange(settings.samples, device=data.device)
    drawn = permutation(settings.seed, 0, len(data))[: settings.samples].sort().values
    x0 = data[drawn.to(data.device)[numbers % len(drawn)]]
    eps = Draws(settings.seed, 0, numbers).normal(STREAM_NOISE, tuple(x0.shape[1:]), x0.dtype)

    def denoise(x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        return denoiser(x.to(x0.dtype), time).double()

    def error(t: Tensor, s: Tensor) -> Tensor:
        """N* - D of every sample (B, ...), float64."""
        x = path.interpolate(x0.double(), eps.double(), t)
        landed = reference_solution(denoise, path, x, t, s, settings.solver_steps)
        g = preconditioning.coefficients(t, s)[1]
        student = landed - preconditioning.jump(path, x, torch.zeros_like(x), t, s)
        at_start = (settings.end or preconditioning.frozen_at) == "t"
        return student / expand(g, x) - (denoise(x, t) if at_start else denoise(landed, s))

    with torch.no_grad():
        errors = [error(*(time.expand(len(x0)) for time in pair)) for pair in zip(t, s, strict=True)]
    square = torch.stack([each.square().flatten(1).mean(1) for each in errors])
    rms = square.mean(1).sqrt()
    stderr = square.std(1) / math.sqrt(len(x0)) / (2 * rms.clamp_min(torch.finfo(torch.float64).tiny))
    return ConsistencyGap(t, s, rms, stderr)
