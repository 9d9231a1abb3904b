"""What a policy acts in: simulations, the experts that show how, and the tasks that make both."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewstep.utils.errors import UnsupportedError

Vector = NDArray[np.float32]
Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Outcome:
    """What one action led to.

    observation: (Do,). success: whether the goal is reached now. score: the task's own measure in [0, 1] at this step
    (PushT's coverage), 0 or 1 for success where it has none. ended: the simulation cannot go on.
    """

    observation: Vector
    success: bool
    score: float
    ended: bool = False


class Simulation(ABC):
    """One environment. Equal seeds give equal starts, and equal actions from there equal episodes, in any order."""

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
    """Solves a task from its observations; what varies between its demonstrations follows from the seed alone."""

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
    make: a simulation, whose pictures are drawn only if asked for; expert: None where demonstrations come from files.
    Both raise MissingExtraError where a package is absent.
    """

    name: str
    description: str
    observation_size: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    max_steps: int
    make: Callable[[bool], Simulation]
    expert: Callable[[], Expert] | None = None

    @property
    def action_size(self) -> int:
        """Da."""
        return len(self.action_low)

    def clip(self, action: Vector) -> Vector:
        """An action (..., Da) brought within the bounds."""
        low, high = (np.asarray(bound, dtype=np.float32) for bound in (self.action_low, self.action_high))
        return np.clip(action, low, high)
