"""What a policy acts in: simulations, the experts that show how, and the tasks that make both."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewstep.utils.errors import ConfigError, UnsupportedError

Vector = NDArray[np.float32]
Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Outcome:
    """What one action led to, which `Simulation.step` returns.

    observation: (Do,). success: whether the goal is reached now. score: the task's own measure in [0, 1] at this step
    (PushT's coverage), 0 or 1 for success where it has none. ended: the simulation cannot go on.
    """

    observation: Vector
    success: bool
    score: float
    ended: bool = False


class Simulation(ABC):
    """One environment, for you to subclass: `reset` and `step`; the others where there is something to say.

    Equal seeds give equal starts, and equal actions from there equal episodes, in any order.
    """

    @abstractmethod
    def reset(self, seed: int) -> Vector:
        """Begin an episode at the start that `seed` names; its first observation (Do,)."""

    @abstractmethod
    def step(self, action: Vector) -> Outcome:
        """Take one action (Da,), within the task's bounds."""

    def route(self) -> str:
        """Which of several ways this episode took so far; empty where a task has but one, or none is taken yet."""
        return ""

    def render(self) -> Picture:
        """The scene, (H, W, 3) uint8; raises UnsupportedError where it cannot be drawn."""
        raise UnsupportedError(f"{type(self).__name__} draws no pictures")

    def close(self) -> None:  # noqa: B027  # nothing to release is the usual case
        """Release what the simulation holds."""


class Expert(ABC):
    """Solves a task from its observations, for `fewstep demos` to record.

    What varies between its demonstrations follows from the seed alone.
    """

    @abstractmethod
    def begin(self, seed: int) -> None:
        """Forget the last episode; `seed` decides this one's variation."""

    @abstractmethod
    def act(self, observation: Vector) -> Vector:
        """The action (Da,) for an observation (Do,), within the task's bounds."""


@dataclass(frozen=True)
class Task:
    """A task: its sizes and bounds are known without its packages, which are imported when it is made.

    observation_size, action_low, action_high: of vectors (Do,) and (Da,). max_steps: after which an episode has failed.
    make(pictures): a new simulation; pictures says whether `render` will be called. expert(): a new expert; None where
    demonstrations come from files. Both raise MissingExtraError where a package is absent. Raises ConfigError for no
    name, sizes below 1, or bounds that do not fit one another.
    """

    name: str
    description: str
    observation_size: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    max_steps: int
    make: Callable[[bool], Simulation]
    expert: Callable[[], Expert] | None = None

    def __post_init__(self) -> None:
        try:
            low, high = tuple(map(float, self.action_low)), tuple(map(float, self.action_high))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"task {self.name}: action bounds are no numbers, give one for each action") from error
        if not self.name or self.observation_size < 1 or self.max_steps < 1:
            raise ConfigError(
                f"task {self.name!r} of {self.observation_size} numbers seen and {self.max_steps} steps: give a name, "
                "and at least one of each"
            )
        if not low or len(low) != len(high) or not all(a < b < math.inf for a, b in zip(low, high, strict=True)):
            raise ConfigError(
                f"task {self.name}: action bounds {low} and {high}: give one finite number for each action, low < high"
            )
        object.__setattr__(self, "action_low", low)
        object.__setattr__(self, "action_high", high)

    @property
    def action_size(self) -> int:
        """Da."""
        return len(self.action_low)

    def clip(self, action: Vector) -> Vector:
        """An action (..., Da) brought within the bounds."""
        low, high = (np.asarray(bound, dtype=np.float32) for bound in (self.action_low, self.action_high))
        return np.clip(action, low, high)
