"""Episodes: of an expert, recorded; of a policy, many at once with one network call a chunk."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.data.demonstrations.episodes import Demonstrations
from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.policies.policy import Policy, stacked
from fewstep.policies.running import Episode, Running, Simulations
from fewstep.policies.simulation import Expert, Picture, Task
from fewstep.utils.errors import ConfigError, DataError, FewstepError, UnsupportedError

Progress = Callable[[str], None]


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
        return count_routes(self.episodes)


def count_routes(episodes: Sequence[Episode]) -> dict[str, int]:
    """How many episodes took which way, of those that took one."""
    return dict(sorted(Counter(episode.route for episode in episodes if episode.route).items()))


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
    its simulation; the others finish. Raises ConfigError for no episodes, a negative seed, or a task of other sizes
    than the policy's.
    """
    if episodes < 1 or at_once < 1 or first_seed < 0:
        raise ConfigError(
            f"{episodes} episodes, {at_once} at once, from start {first_seed}: needs at least 1, 1 and 0 of them"
        )
    check_fit(policy, task)
    found: list[Episode] = []
    spent: list[float] = []
    with Simulations(task) as simulations:
        for first in range(first_seed, first_seed + episodes, at_once):
            running = simulations.running(range(first, min(first + at_once, first_seed + episodes)))
            spent += run_lockstep(policy, running)
            found += [each.finished() for each in running]
            simulations.mend(running)
            if progress is not None:
                progress(f"{len(found)} of {episodes} episodes, {sum(e.success for e in found)} at the goal")
    alone = statistics.median(latencies(policy, 20))
    return Rollout(tuple(found), statistics.median(spent) if spent else math.nan, alone, len(spent))


def film(policy: Policy, task: Task, seed: int = FIRST_TEST_SEED) -> tuple[Episode, list[Picture]]:
    """One episode with its pictures, the start's first: the one that `roll_out` has at that start, but for the rounding
    of batches of another size.

    Raises UnsupportedError where the task draws none, or where its simulation fails.
    """
    check_fit(policy, task)
    with Simulations(task, pictures=True) as simulations:
        (running,) = simulations.running([seed])
        run_lockstep(policy, [running], pictures=True)
        episode = running.finished()
    if episode.error:
        raise UnsupportedError(f"no film of {task.name}: {episode.error}")
    return episode, running.pictures


def run_lockstep(policy: Policy, running: Sequence[Running], pictures: bool = False) -> list[float]:
    """Carry episodes to their ends; milliseconds of every decision. The noise follows from the start, not the place."""
    spent = []
    for each in running:
        each.begin(pictures)
    limit = max(each.task.max_steps for each in running)
    for decision in range(math.ceil(limit / policy.spec.chunks.n_action_steps)):
        going = [each for each in running if not each.over]
        if not going:
            break
        started = time.perf_counter()
        chunks = decide(policy, going, decision)
        spent.append(1000 * (time.perf_counter() - started))
        for each, actions in zip(going, chunks, strict=True):
            for action in actions:
                if not each.over:
                    each.act(action, pictures)
    return spent


def decide(policy: Policy, going: Sequence[Running], decision: int) -> list[NDArray[np.float32]]:
    """A chunk (Ta, Da) for every episode by one call; one that has none to offer ends by itself, as an error."""
    history = torch.stack([stacked(each.seen, policy.spec.chunks.n_obs_steps) for each in going])
    numbers = torch.tensor([each.seed for each in going])
    try:
        return list(policy.predict_chunk(history, decision, numbers).numpy())
    except FewstepError:
        chunks = [np.empty((0, 0), dtype=np.float32)] * len(going)
        for place, each in enumerate(going):
            with each.guarded():
                chunks[place] = policy.predict_chunk(history[place : place + 1], decision, numbers[[place]])[0].numpy()
        return chunks


def check_fit(policy: Policy, task: Task) -> None:
    """Raise ConfigError when the policy sees or moves other numbers than the task has."""
    own, other = (policy.observation_shape[1], policy.action_shape[1]), (task.observation_size, task.action_size)
    if own != other:
        raise ConfigError(
            f"the policy sees {own[0]} numbers and moves {own[1]}; {task.name} shows {other[0]} and takes {other[1]}: "
            f"it was trained for {policy.spec.task or 'another task'}"
        )


def latencies(policy: Policy, repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` decisions for one episode, after one to warm up."""
    seen = policy.spec.observations.decode(torch.zeros(1, *policy.observation_shape))
    policy.predict_chunk(seen)
    spent = []
    for decision in range(repeats):
        started = time.perf_counter()
        policy.predict_chunk(seen, decision)
        spent.append(1000 * (time.perf_counter() - started))
    return spent


@dataclass(frozen=True)
class Recording:
    """Demonstrations of an expert, how many episodes it tried for them, how many failed, and the errors among those.

    routes: how many of the demonstrations took which way.
    """

    demonstrations: Demonstrations
    tried: int
    failed: int
    errors: tuple[str, ...]
    routes: dict[str, int]


def record(task: Task, count: int, first_seed: int = 0, progress: Progress | None = None) -> Recording:
    """`count` successful episodes of the task's expert, from starts first_seed, first_seed + 1, ...; failures dropped.

    An episode's last step is the one that reached the goal. Raises ConfigError for a task without an expert or starts
    that are kept for rollouts, DataError when most episodes fail.
    """
    if task.expert is None:
        raise ConfigError(f"{task.name} has no expert: train on demonstrations from a file")
    if count < 1 or first_seed < 0:
        raise ConfigError(f"{count} demonstrations from seed {first_seed}: needs at least 1, from a seed of at least 0")
    expert = task.expert()
    kept: list[tuple[Episode, Tensor, Tensor]] = []
    errors: list[str] = []
    tried = 0
    with Simulations(task) as simulations:
        while len(kept) < count:
            if tried >= 10 and len(kept) < tried / 3:
                first = f"; the first error: {errors[0]}" if errors else ""
                raise DataError(f"{task.name}: {len(kept)} of {tried} episodes reached the goal, too few{first}")
            if first_seed + tried >= FIRST_TEST_SEED:
                raise ConfigError(f"starts from {FIRST_TEST_SEED} on are kept for rollouts: begin at an earlier seed")
            episode, seen, taken = demonstrate(simulations, expert, first_seed + tried)
            tried += 1
            kept += [(episode, seen, taken)] if episode.success else []
            errors += [f"start {episode.seed}: {episode.error}"] if episode.error else []
            if progress is not None:
                progress(f"{len(kept)} of {count} demonstrations, {tried - len(kept)} episodes dropped")
    episodes, observed, acted = zip(*kept, strict=True)
    ends = torch.tensor([len(actions) for actions in acted]).cumsum(0)
    demonstrations = Demonstrations(
        torch.cat(observed), torch.cat(acted), ends, task.name, task.action_low, task.action_high
    )
    return Recording(demonstrations, tried, tried - count, tuple(errors), count_routes(episodes))


def demonstrate(simulations: Simulations, expert: Expert, seed: int) -> tuple[Episode, Tensor, Tensor]:
    """One episode of an expert in the first of the simulations, and what it saw and did, (steps, Do) and (steps, Da).

    What the expert raises is an error of the episode.
    """
    (running,), actions = simulations.running([seed]), list[Tensor]()
    with running.guarded():
        expert.begin(seed)
    if not running.over:
        running.begin()
    while not running.over:
        with running.guarded():
            action = running.task.clip(expert.act(running.seen[-1].numpy()))
            running.act(action)
            actions.append(torch.from_numpy(np.asarray(action, dtype=np.float32)))
    episode = running.finished()
    simulations.mend([running])
    count = min(len(actions), len(running.seen))
    seen, taken = (torch.stack(part[:count]) if count else torch.empty(0) for part in (running.seen, actions))
    return episode, seen, taken


def expert_rollout(task: Task, episodes: int, first_seed: int = FIRST_TEST_SEED) -> Rollout:
    """The expert's own episodes from the starts that policies are measured at; raises ConfigError without an expert."""
    if task.expert is None:
        raise ConfigError(f"{task.name} has no expert")
    expert = task.expert()
    with Simulations(task) as simulations:
        found = [demonstrate(simulations, expert, first_seed + k)[0] for k in range(episodes)]
    return Rollout(tuple(found))
