"""Fetch: success is the block at the goal, and the experts bring it there even when disturbed on the way."""

from collections.abc import Callable

import numpy as np
import pytest

from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.policies.simulation import Simulation, Task, Vector
from fewstep.policies.tasks.fetch import FETCH_TASKS, pick_and_place, push
from fewstep.policies.tasks.registry import find_task


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    pytest.importorskip("gymnasium_robotics")


def solve(simulation: Simulation, observation: Vector, rule: Callable[[Vector], Vector], steps: int) -> int:
    """Steps until the goal is reached, or more than `steps`."""
    for step in range(steps):
        outcome = simulation.step(np.clip(rule(observation), -1, 1))
        observation = outcome.observation
        distance = np.linalg.norm(observation[3:6] - observation[25:28])
        assert outcome.success == (distance < 0.05)
        assert outcome.score == outcome.success
        if outcome.success:
            return step + 1
    return steps + 1


@pytest.mark.parametrize("task", FETCH_TASKS, ids=lambda task: task.name)
def test_the_expert_needs_at_most_half_the_steps_at_nearly_every_start(task: Task) -> None:
    assert task.expert is not None
    simulation, expert = task.make(False), task.expert()
    solved = 0
    for start in range(FIRST_TEST_SEED, FIRST_TEST_SEED + 20):
        expert.begin(start)
        solved += solve(simulation, simulation.reset(start), expert.act, task.max_steps // 2) <= task.max_steps // 2
    assert solved >= 19


@pytest.mark.parametrize(("name", "rule"), [("fetch-push", push), ("fetch-pick-and-place", pick_and_place)])
def test_the_expert_recovers_from_a_blow(name: str, rule: Callable[[Vector], Vector]) -> None:
    task = find_task(name)
    simulation = task.make(False)
    solved = disturbed = 0
    for start in range(8):
        observation, random = simulation.reset(start), np.random.default_rng(start)
        if solve(simulation, observation, rule, 10) <= 10:
            continue
        blow = np.append(random.uniform(-1, 1, 3), 1.0).astype(np.float32)  # lets go of the block
        outcome = [simulation.step(blow) for _ in range(5)][-1]
        disturbed += 1
        solved += solve(simulation, outcome.observation, rule, task.max_steps) <= task.max_steps
    assert disturbed >= 5
    assert solved >= disturbed - 1


def test_a_block_that_is_dropped_is_picked_up_again() -> None:
    simulation = find_task("fetch-pick-and-place").make(False)
    start = next(seed for seed in range(50) if simulation.reset(seed)[27] > 0.7)
    observation = simulation.reset(start)
    for _ in range(60):
        observation = simulation.step(np.clip(pick_and_place(observation), -1, 1)).observation
        if observation[5] > 0.5:
            break
    assert observation[5] > 0.5
    for _ in range(10):
        observation = simulation.step(np.array([0, 0, 0, 1], dtype=np.float32)).observation
    assert observation[5] < 0.45
    assert solve(simulation, observation, pick_and_place, 60) <= 60
