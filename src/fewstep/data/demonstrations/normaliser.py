"""How a policy sees and acts: what ties the numbers of a flow map to a robot, stored with its weights."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fewstep.utils.errors import ConfigError, ShapeError

FIRST_TEST_SEED = 100_000
"""Starts of episodes from here on are for rollouts; demonstrations take those below."""

ActingName = Literal["map", "gamma", "euler", "mean"]
"""How a policy samples: by jumps, by jumps to the data end, by Euler's method, or by one jump from zero."""


@dataclass(frozen=True)
class ChunkConfig:
    """How demonstrations are cut: observations in, actions out."""

    n_obs_steps: int = 2
    """Observations that the policy sees, the last ones: at least 1."""
    horizon: int = 16
    """Actions that it answers with, the next ones."""
    n_action_steps: int = 8
    """How many of those are taken before the policy looks again: from 1 to the horizon."""

    def __post_init__(self) -> None:
        """Raise ConfigError unless 1 <= n_action_steps <= horizon and n_obs_steps >= 1."""
        if not 1 <= self.n_action_steps <= self.horizon or self.n_obs_steps < 1:
            raise ConfigError(
                f"{self.n_obs_steps} observations in, {self.horizon} actions out of which {self.n_action_steps} are "
                "taken: take at least one of each, and no more actions than the horizon has"
            )


@dataclass(frozen=True)
class Normaliser:
    """u = 2 (x - low)/(high - low) - 1 per number: what lies within [low, high] comes to [-1, 1].

    A number that hardly varied, high - low at most 1e-4, or 1e-6 of its size, does not take part: u = 0 whatever x is,
    and x = (low + high)/2 whatever u is. Rounding, or a joint that nothing moves, would enter as large as the rest.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    @staticmethod
    def fit(values: Tensor) -> "Normaliser":
        """The least and the greatest of each number, values (N, D)."""
        low, high = values.double().amin(0), values.double().amax(0)
        return Normaliser(tuple(low.tolist()), tuple(high.tolist()))

    @cached_property
    def varied(self) -> Tensor:
        """Which numbers vary, (D,) bool."""
        low, high = self._bounds()
        return high - low > torch.maximum(torch.tensor(1e-4, dtype=torch.float64), 1e-6 * high.abs())

    def encode(self, values: Tensor) -> Tensor:
        """(..., D) in the robot's units -> (..., D) normalised, same type; raises ShapeError for another D."""
        centre, scale = self._affine(values)
        return torch.where(self.varied.to(values.device), (values - centre) / scale, 0.0)

    def decode(self, values: Tensor) -> Tensor:
        """The inverse of `encode`."""
        centre, scale = self._affine(values)
        return torch.where(self.varied.to(values.device), centre + scale * values, centre)

    def _bounds(self) -> tuple[Tensor, Tensor]:
        low, high = (torch.tensor(bound, dtype=torch.float64) for bound in (self.low, self.high))
        return low, high

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if like.ndim == 0 or like.shape[-1] != len(self.low):
            raise ShapeError(f"values of shape {tuple(like.shape)} for a normaliser of {len(self.low)} numbers")
        low, high = self._bounds()
        scale = torch.where(self.varied, (high - low) / 2, 1.0)
        return ((low + high) / 2).to(like), scale.to(like)


@dataclass(frozen=True)
class PolicySpec:
    """What turns a flow map over chunks of actions into a policy.

    task: its name, empty when unknown. chunks: the windows in and out. observations, actions: fitted on the
    demonstrations. action_low, action_high: bounds (Da,) that actions are clipped to; empty for none. sampler: what
    turns noise into actions: jumps, those with fresh noise between (gamma = 1), Euler's method, or one jump from zero.
    """

    task: str
    chunks: ChunkConfig
    observations: Normaliser
    actions: Normaliser
    action_low: tuple[float, ...] = ()
    action_high: tuple[float, ...] = ()
    sampler: ActingName = "map"

    @property
    def from_zero(self) -> bool:
        """Whether an action is one jump from zero, as of a regression, in place of noise."""
        return self.sampler == "mean"

    def bounded(self, actions: Tensor) -> Tensor:
        """Actions (..., Da) within the bounds."""
        if not self.action_low:
            return actions
        low, high = (torch.tensor(bound).to(actions) for bound in (self.action_low, self.action_high))
        return actions.clamp(low, high)
