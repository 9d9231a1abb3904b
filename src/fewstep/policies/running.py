"""Episodes under way, and the simulations that they run in: what fails in one is its own error, the others go on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fewstep.policies.simulation import Outcome, Picture, Simulation, Task, Vector
from fewstep.utils.errors import DataError, FewstepError, UnsupportedError


@dataclass(frozen=True)
class Episode:
    """How one episode went.

    seed: of its start. success: whether the goal was ever reached; the episode ends there. score: the best of the
    task's own measure. steps: taken. route: which way, where a task has several. error: what the simulation raised, by
    name; empty when it ran.
    """

    seed: int
    success: bool
    score: float
    steps: int
    route: str = ""
    error: str = ""


@dataclass
class Running:
    """An episode under way in a simulation of its task. Whatever that raises ends it, as an error by name."""

    task: Task
    seed: int
    simulation: Simulation
    seen: list[Tensor] = field(default_factory=list)
    steps: int = 0
    score: float = 0.0
    success: bool = False
    error: str = ""
    pictures: list[Picture] = field(default_factory=list)
    over: bool = False

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Inside, an exception of foreign code becomes this episode's error; the others go on."""
        try:
            yield
        except FewstepError as error:
            self.error, self.over = str(error), True
        except Exception as error:
            self.error, self.over = f"{type(error).__name__}: {error}", True

    def begin(self, picture: bool = False) -> None:
        """The first observation, and the first picture."""
        with self.guarded():
            self.look(self.simulation.reset(self.seed))
            if picture:
                self.pictures.append(self.simulation.render())

    def look(self, observation: Vector) -> None:
        """Take in an observation; raises DataError for another size or numbers that are not finite."""
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
            found = np.array(observation, dtype=np.float32)
        if found.shape != (self.task.observation_size,):
            raise DataError(
                f"an observation of shape {found.shape}: {self.task.name} has ({self.task.observation_size},)"
            )
        if not np.isfinite(found).all():
            raise DataError(f"an observation is not finite (its number {int(np.flatnonzero(~np.isfinite(found))[0])})")
        self.seen.append(torch.from_numpy(found))

    def act(self, action: Vector, picture: bool = False) -> None:
        """One action, brought within the bounds."""
        with self.guarded():
            if not np.isfinite(action).all():
                raise DataError("an action is not finite")
            outcome = self.simulation.step(self.task.clip(action))
            if not isinstance(outcome, Outcome):
                given = type(outcome).__name__
                raise DataError(f"step gave a {given}: return fewstep.Outcome(observation, success, score, ended)")
            self.steps += 1
            # Comparisons of arrays are NumPy's bools, which add up to no Python number.
            self.score = max(self.score, float(outcome.score))
            self.success = self.success or bool(outcome.success)
            self.over = self.success or bool(outcome.ended) or self.steps >= self.task.max_steps
            self.look(outcome.observation)
            if picture:
                self.pictures.append(self.simulation.render())

    def finished(self) -> Episode:
        """How it went."""
        route = ""
        if not self.error:  # a simulation that failed has nothing more to say
            with self.guarded():
                route = self.simulation.route()
        return Episode(self.seed, self.success and not self.error, self.score, self.steps, route, self.error)


class Simulations:
    """Simulations of a task, made as needed and closed at the end; one that failed is replaced when it is needed again.

    Once one has been made, one that cannot be is an error of the episode that it was for. The first to be made raises
    what it raises, as UnsupportedError where that is foreign.
    """

    def __init__(self, task: Task, pictures: bool = False) -> None:
        self.task, self.pictures = task, pictures
        self._kept: dict[int, Simulation] = {}
        self._works = False

    def __enter__(self) -> "Simulations":
        return self

    def __exit__(self, *failure: object) -> None:
        for simulation in self._kept.values():
            with suppress(Exception):  # one that cannot even close costs nothing that was measured
                simulation.close()

    def running(self, seeds: Sequence[int]) -> list[Running]:
        """Episodes at these starts, each in a simulation of its own."""
        return [Running(self.task, seed, self._at(place)) for place, seed in enumerate(seeds)]

    def mend(self, episodes: Sequence[Running]) -> None:
        """Part with the simulations of episodes that ended in an error: they may be broken."""
        for place, episode in enumerate(episodes):
            if episode.error:
                with suppress(Exception):
                    self._kept.pop(place).close()

    def _at(self, place: int) -> Simulation:
        if place not in self._kept:
            try:
                made = self.task.make(self.pictures)
                if not isinstance(made, Simulation):
                    raise UnsupportedError(
                        f"{self.task.name}: make gave a {type(made).__name__}, give a fewstep.Simulation around it"
                    )
                self._kept[place], self._works = made, True
            except Exception as error:
                if not self._works and isinstance(error, FewstepError):
                    raise
                if not self._works:
                    reason = f"{type(error).__name__}: {error}"
                    raise UnsupportedError(f"{self.task.name} cannot be simulated: {reason}") from error
                self._kept[place] = NoSimulation(error)
        return self._kept[place]


class NoSimulation(Simulation):
    """Stands in for a simulation that could not be made: an episode in it ends with what the making raised."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def reset(self, seed: int) -> Vector:
        raise self.error

    def step(self, action: Vector) -> Outcome:
        raise self.error
