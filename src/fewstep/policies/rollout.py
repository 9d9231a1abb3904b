"""Episodes: of an expert, recorded; of a policy, many at once with one network call a chunk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fewstep.control import FIRST_TEST_SEED
from fewstep.data.demonstrations import Demonstrations
from fewstep.errors import ConfigError, DataError, FewstepError
from fewstep.policies.policy import Policy, stacked
from fewstep.policies.simulation import Expert, Outcome, Picture, Simulation, Task, Vector

Progress = Callable[[str], None]


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


@dataclass(frozen=True)
class Rollout:
    """Episodes of a policy, and how long its decisions took.

    latency_ms: median time of a decision for the whole batch. decisions: how many there were. single_ms: median time of
    a decision for one episode alone.
    """

    episodes: tuple[Episode, ...]
    latency_ms: float = math.nan
    single_ms: float = math.nan
    decisions: int = 0

    @property
    def successes(self) -> int:
        """Episodes that reached the goal; those with an error did not."""
        return sum(episode.success for episode in self.episodes)

    @property
    def errors(self) -> tuple[Episode, ...]:
        """Episodes whose simulation raised."""
        return tuple(episode for episode in self.episodes if episode.error)

    @property
    def routes(self) -> dict[str, int]:
        """How many episodes took which way, of those that took one."""
        names = sorted({episode.route for episode in self.episodes if episode.route})
        return {name: sum(episode.route == name for episode in self.episodes) for name in names}


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval (1927) of a share: the p with |successes/count - p| <= z sqrt(p (1 - p)/count).

    Raises ConfigError unless 0 <= successes <= count and count >= 1.
    """
    if not 0 <= successes <= count or count < 1:
        raise ConfigError(
            f"{successes} successes of {count}: needs at least one trial and no more successes than trials"
        )
    share, square = successes / count, z * z / count
    centre = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass
class _Running:
    """An episode under way."""

    index: int
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
        """Whatever the simulation raises ends this episode, as an error; the others go on."""
        try:
            yield
        except FewstepError as error:
            self.error, self.over = str(error), True
        except Exception as error:  # foreign code
            self.error, self.over = f"{type(error).__name__}: {error}", True

    def begin(self, picture: bool) -> None:
        with self.guarded():
            self.look(self.simulation.reset(self.seed))
            if picture:
                self.pictures.append(self.simulation.render())

    def look(self, observation: Vector) -> None:
        """Take in an observation; raises DataError for numbers that are not finite."""
        if not np.isfinite(observation).all():
            number = int(np.flatnonzero(~np.isfinite(observation))[0])
            raise DataError(f"the simulation's observation is not finite (its number {number})")
        self.seen.append(torch.from_numpy(np.asarray(observation, dtype=np.float32)))

    def act(self, action: Vector, limit: int, picture: bool) -> None:
        with self.guarded():
            outcome: Outcome = self.simulation.step(action)
            self.steps += 1
            self.score, self.success = max(self.score, outcome.score), self.success or outcome.success
            self.look(outcome.observation)
            if picture:
                self.pictures.append(self.simulation.render())
            self.over = self.success or outcome.ended or self.steps >= limit

    def finished(self) -> Episode:
        route = "" if self.error else self.simulation.route()
        return Episode(self.seed, self.success and not self.error, self.score, self.steps, route, self.error)


def roll_out(
    policy: Policy,
    task: Task,
    episodes: int,
    first_seed: int = FIRST_TEST_SEED,
    at_once: int = 25,
    progress: Progress | None = None,
) -> Rollout:
    """Episodes from the starts first_seed, first_seed + 1, ..., in lockstep: one batched network call a chunk.

    at_once: simulations held at the same time. An episode ends at its goal, at the task's limit, or with an error of
    its simulation; the others finish. Raises ConfigError for no episodes, or a task of other sizes than the policy's.
    """
    if episodes < 1 or at_once < 1:
        raise ConfigError(f"{episodes} episodes, {at_once} at once: both must be at least 1")
    check_fit(policy, task)
    found: list[Episode] = []
    spent: list[float] = []
    simulations: list[Simulation] = []
    try:
        for first in range(0, episodes, at_once):
            count = min(at_once, episodes - first)
            simulations += [task.make(False) for _ in range(count - len(simulations))]
            running = [_Running(first + k, first_seed + first + k, simulations[k]) for k in range(count)]
            spent += run_lockstep(policy, task, running)
            found += [each.finished() for each in running]
            if progress is not None:
                progress(f"{len(found)} of {episodes} episodes, {sum(e.success for e in found)} at the goal")
    finally:
        for simulation in simulations:
            simulation.close()
    return Rollout(tuple(found), median(spent), single_latency(policy), len(spent))


def film(policy: Policy, task: Task, seed: int = FIRST_TEST_SEED) -> tuple[Episode, list[Picture]]:
    """One episode with its pictures, the start's first; raises UnsupportedError where the task draws none."""
    check_fit(policy, task)
    simulation = task.make(True)
    try:
        simulation.reset(seed)
        simulation.render()  # says why where it cannot
        running = _Running(seed - FIRST_TEST_SEED, seed, simulation)
        run_lockstep(policy, task, [running], pictures=True)
        return running.finished(), running.pictures
    finally:
        simulation.close()


def run_lockstep(policy: Policy, task: Task, running: list[_Running], pictures: bool = False) -> list[float]:
    """Carry episodes to their ends; milliseconds of every decision."""
    spent = []
    for each in running:
        each.begin(pictures)
    for decision in range(math.ceil(task.max_steps / policy.control.chunks.n_action_steps)):
        going = [each for each in running if not each.over]
        if not going:
            break
        history = torch.stack([stacked(each.seen, policy.control.chunks.n_obs_steps) for each in going])
        started = time.perf_counter()
        chunk = policy.predict_chunk(history, decision, torch.tensor([each.index for each in going]))
        spent.append(1000 * (time.perf_counter() - started))
        for each, actions in zip(going, chunk.numpy(), strict=True):
            for action in actions:
                if not each.over:
                    each.act(task.clip(action), task.max_steps, pictures)
    return spent


def check_fit(policy: Policy, task: Task) -> None:
    """Raise ConfigError when the policy sees or moves other numbers than the task has."""
    own, other = (policy.observation_shape[1], policy.action_shape[1]), (task.observation_size, task.action_size)
    if own != other:
        raise ConfigError(
            f"the policy sees {own[0]} numbers and moves {own[1]}; {task.name} shows {other[0]} and takes {other[1]}: "
            f"it was trained for {policy.control.task or 'another task'}"
        )


def single_latency(policy: Policy, repeats: int = 20) -> float:
    """Median milliseconds of a decision for one episode, on the threads that torch has."""
    seen = policy.control.observations.decode(torch.zeros(1, *policy.observation_shape))
    policy.predict_chunk(seen)
    spent = []
    for decision in range(repeats):
        started = time.perf_counter()
        policy.predict_chunk(seen, decision)
        spent.append(1000 * (time.perf_counter() - started))
    return median(spent)


def median(values: list[float]) -> float:
    """The median; NaN of nothing."""
    return float(np.median(values)) if values else math.nan


@dataclass(frozen=True)
class Recording:
    """Demonstrations of an expert, how many episodes it tried for them, and how many of those failed or raised."""

    demonstrations: Demonstrations
    tried: int
    failed: int
    errors: int


def record(
    task: Task, count: int, first_seed: int = 0, steps_after: int = 0, progress: Progress | None = None
) -> Recording:
    """`count` successful episodes of the task's expert, from starts first_seed, first_seed + 1, ...; failures dropped.

    An episode's last step is the one that reached the goal, or `steps_after` later. Raises ConfigError for a task
    without an expert or starts that are kept for rollouts, DataError when most episodes fail.
    """
    if task.expert is None:
        raise ConfigError(f"{task.name} has no expert: train on demonstrations from a file")
    if count < 1 or first_seed < 0:
        raise ConfigError(f"{count} demonstrations from seed {first_seed}: needs at least 1, from a seed of at least 0")
    simulation, expert = task.make(False), task.expert()
    kept: list[tuple[list[Vector], list[Vector]]] = []
    tried = errors = 0
    try:
        while len(kept) < count:
            if tried >= 10 and len(kept) < tried / 3:
                raise DataError(f"{task.name}: the expert reached the goal in {len(kept)} of {tried} episodes: too few")
            if first_seed + tried >= FIRST_TEST_SEED:
                raise ConfigError(f"starts from {FIRST_TEST_SEED} on are kept for rollouts: begin at an earlier seed")
            episode, observations, actions = demonstrate(task, simulation, expert, first_seed + tried, steps_after)
            tried += 1
            errors += bool(episode.error)
            if episode.success:
                kept.append((observations, actions))
            if progress is not None:
                progress(f"{len(kept)} of {count} demonstrations, {tried - len(kept)} episodes dropped")
    finally:
        simulation.close()
    seen, taken = (
        torch.from_numpy(np.concatenate([episode[part] for episode in kept]).astype(np.float32)) for part in (0, 1)
    )
    ends = torch.tensor([len(episode[1]) for episode in kept]).cumsum(0)
    found = Demonstrations(seen, taken, ends, task.name, task.action_low, task.action_high)
    return Recording(found, tried, tried - count, errors)


def demonstrate(
    task: Task, simulation: Simulation, expert: Expert, seed: int, steps_after: int = 0
) -> tuple[Episode, list[Vector], list[Vector]]:
    """One episode of an expert: how it went, its observations and the actions taken at them, as many of each."""
    running, actions, left = _Running(0, seed, simulation), list[Vector](), steps_after
    expert.begin(seed)
    running.begin(False)
    while not running.error and running.steps < task.max_steps and (not running.success or left > 0):
        left -= running.success
        action = task.clip(expert.act(running.seen[-1].numpy()))
        actions.append(action)
        running.act(action, task.max_steps, False)
    observations = [seen.numpy() for seen in running.seen[: len(actions)]]
    return running.finished(), observations, actions


def expert_rollout(task: Task, episodes: int, first_seed: int = FIRST_TEST_SEED) -> Rollout:
    """The expert's own episodes from the starts that policies are measured at; raises ConfigError without an expert."""
    if task.expert is None:
        raise ConfigError(f"{task.name} has no expert")
    simulation, expert = task.make(False), task.expert()
    try:
        found = [demonstrate(task, simulation, expert, first_seed + k)[0] for k in range(episodes)]
    finally:
        simulation.close()
    return Rollout(tuple(found))


__all__ = [
    "Episode",
    "Recording",
    "Rollout",
    "demonstrate",
    "expert_rollout",
    "film",
    "record",
    "roll_out",
    "single_latency",
    "wilson",
]
