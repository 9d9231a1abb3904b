"""Six manipulation tasks of Meta-World, with the experts that come with it.

A simulated Sawyer arm, moved by shifts of its hand. Observation (39,): hand, gripper and objects now and one step ago,
then the goal. Action (4,) in [-1, 1]: the hand's shift along x, y, z (1 is a centimetre) and the gripper's force.
Source: Yu et al., "Meta-World: A Benchmark and Evaluation for Multi-Task and Meta Reinforcement Learning" (CoRL 2019),
arXiv 1910.10897; the package metaworld, its v3 environments.
"""

import sys
import warnings
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.policies.simulation import Expert, Outcome, Simulation, Task, Vector
from fewstep.policies.tasks.mujoco import ArmSimulation, NoisyExpert, View, packages_of

_VIEW = View(lookat=(0.0, 0.65, 0.12), distance=1.35, azimuth=140.0, elevation=-25.0)


class MetaworldSimulation(ArmSimulation):
    """One of the package's environments, seen from behind the arm's right, its goal in the observation.

    The environment's own seeds do not fix where an episode starts. Here the seed draws the vector that places object
    and goal, as the environment would: uniform in its bounds, drawn again while the two are less than `apart` (m) from
    each other in the plane; the environment then takes that vector as given. Its limit of 500 steps is lifted.
    """

    def __init__(self, environment: Any, apart: float, render: bool) -> None:
        environment.max_path_length = sys.maxsize
        super().__init__(environment, _VIEW, render)
        self._apart = apart

    def reset(self, seed: int) -> Vector:
        """Place hand, objects and goal; (39,)."""
        self._environment._last_rand_vec = self._placement(seed)
        observation, _ = self._environment.reset()
        return np.asarray(observation, dtype=np.float32)

    def step(self, action: Vector) -> Outcome:
        """Shift the hand by one action (4,)."""
        observation, _, _, _, information = self._environment.step(action)
        success = bool(information["success"])
        return Outcome(np.asarray(observation, dtype=np.float32), success, float(success))

    def _placement(self, seed: int) -> NDArray[np.float64]:
        """Object (3,) and, where the goal varies too, goal (3,). The environment never ends its reset if too close."""
        random, space = np.random.default_rng(seed), self._environment._random_reset_space
        drawn: NDArray[np.float64] = random.uniform(space.low, space.high)
        while self._apart > 0 and np.linalg.norm(drawn[:2] - drawn[3:5]) < self._apart:
            drawn = random.uniform(space.low, space.high)
        return drawn


def _make(task: str, name: str, apart: float, render: bool) -> Simulation:
    with packages_of(task, "metaworld"):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
    # Without a seed its constructor would draw from numpy's global generator; with one it puts that back.
    return MetaworldSimulation(ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{name}-goal-observable"](seed=0), apart, render)


def _expert(task: str, name: str) -> Expert:
    with packages_of(task, "metaworld"):
        from metaworld.policies import ENV_POLICY_MAP
    policy = ENV_POLICY_MAP[name]()

    def rule(observation: Vector) -> Vector:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns whenever the hand is far from where it should go
            return np.asarray(policy.get_action(observation), dtype=np.float32)

    return NoisyExpert(rule)


def _task(name: str, description: str, apart: float, max_steps: int) -> Task:
    task = f"metaworld-{name}"
    return Task(
        name=task,
        description=description,
        observation_size=39,
        action_low=(-1.0,) * 4,
        action_high=(1.0,) * 4,
        max_steps=max_steps,
        make=partial(_make, task, f"{name}-v3", apart),
        expert=partial(_expert, task, f"{name}-v3"),
    )


METAWORLD_TASKS: tuple[Task, ...] = (
    _task("pick-place", "a robot arm lifts a puck to a goal in the air", apart=0.15, max_steps=200),
    _task("push", "a robot arm slides a puck to a goal on the table", apart=0.15, max_steps=200),
    _task("assembly", "a robot arm puts a nut over a peg", apart=0.1, max_steps=250),
    _task("hammer", "a robot arm drives in a nail with a hammer", apart=0.0, max_steps=200),
    _task("stick-pull", "a robot arm pulls a box with a stick through its handle", apart=0.1, max_steps=400),
    _task("peg-insert-side", "a robot arm slides a peg sideways into a hole", apart=0.1, max_steps=300),
)
