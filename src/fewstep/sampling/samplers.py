"""Samplers: one function each, one signature (math.md §6).

A sampler takes noise x (B, ...) at times[0], strictly falling times, conditions and the random numbers of these
samples, and returns samples at times[-1].
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from fewstep.flow.flow_map import at
from fewstep.flow.paths import Path
from fewstep.networks.condition import Condition
from fewstep.sampling.step_times import SamplerName
from fewstep.utils.errors import ShapeError
from fewstep.utils.random import Draws

STREAM_RENOISE = 1000


class Model(Protocol):
    """What a sampler needs: a flow map, or one wrapped in guidance."""

    path: Path

    def jump(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """X(x, t, s), (B, ...); x (B, ...), t, s (B,) in the clock of `path`."""

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """v(x, t), (B, ...)."""


Sampler = Callable[[Model, Tensor, Tensor, Condition, Draws], Tensor]


def map_sampler(model: Model, x: Tensor, times: Tensor, cond: Condition, draws: Draws) -> Tensor:
    """x <- X(x, t_i, t_{i+1}): one evaluation a step."""
    for t, s in _steps(model, times):
        x = model.jump(x, at(t, x), at(s, x), cond)
    return x


def gamma_sampler(gamma: float) -> Sampler:
    """CTM's gamma-sampling (2310.02279): jump past s, then add noise back up to s.

    gamma = 0 is `map_sampler`; gamma = 1 jumps to data and re-noises, the multistep sampler of consistency models
    (2303.01469). On the path: with x = alpha(y) at noise level tau, jump to tau' = sqrt(1 - gamma^2) tau_s, rescale
    by alpha_s/alpha', add alpha_s gamma tau_s of noise. Raises ShapeError unless gamma lies in [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ShapeError(f"gamma is {gamma}; it must lie in [0, 1]")

    def sampler(model: Model, x: Tensor, times: Tensor, cond: Condition, draws: Draws) -> Tensor:
        path = model.path
        for i, (t, s) in enumerate(_steps(model, times)):
            if i == len(times) - 2 or gamma == 0:
                x = model.jump(x, at(t, x), at(s, x), cond)
                continue
            tau_s = path.tau(torch.tensor(s, dtype=torch.float64))
            lower = path.time_from_tau(tau_s * (1 - gamma * gamma) ** 0.5).clamp(min=path.t_min)
            x = model.jump(x, at(t, x), at(float(lower), x), cond)
            low, high = path.values(lower), path.values(torch.tensor(s, dtype=torch.float64))
            added = (high.sigma**2 - (high.alpha / low.alpha * low.sigma) ** 2).clamp(min=0).sqrt()
            noise = draws.normal(STREAM_RENOISE + i, tuple(x.shape[1:]), x.dtype)
            x = float(high.alpha / low.alpha) * x + float(added) * noise
        return x

    return sampler


def euler_sampler(model: Model, x: Tensor, times: Tensor, cond: Condition, draws: Draws) -> Tensor:
    """Euler's method on the PF-ODE in the path's clock: one evaluation a step, order 1."""
    for t, s in _steps(model, times):
        x = x + (s - t) * model.velocity(x, at(t, x), cond)
    return x


def heun_sampler(model: Model, x: Tensor, times: Tensor, cond: Condition, draws: Draws) -> Tensor:
    """Heun's method (EDM, 2206.00364): two evaluations a step, order 2; the last is Euler's, as sigma may be 0."""
    for i, (t, s) in enumerate(_steps(model, times)):
        slope = model.velocity(x, at(t, x), cond)
        guess = x + (s - t) * slope
        if i == len(times) - 2:
            return guess
        x = x + (s - t) * 0.5 * (slope + model.velocity(guess, at(s, x), cond))
    return x


def sampler_of(name: SamplerName, gamma: float) -> Sampler:
    """The sampler of that name; gamma: of gamma-sampling. Raises ShapeError for another name or gamma."""
    if name not in _SAMPLERS:
        raise ShapeError(f"there is no sampler {name!r}: take {', '.join(_SAMPLERS)}")
    return _SAMPLERS[name](gamma)


_SAMPLERS: dict[str, Callable[[float], Sampler]] = {
    "map": lambda gamma: map_sampler,
    "gamma": gamma_sampler,
    "euler": lambda gamma: euler_sampler,
    "heun": lambda gamma: heun_sampler,
}


def _steps(model: Model, times: Tensor) -> Iterator[tuple[float, float]]:
    return itertools.pairwise(model.path.clock(times).tolist())
