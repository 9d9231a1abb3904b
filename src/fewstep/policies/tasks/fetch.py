"""Two tasks of the simulated Fetch arm from Gymnasium-Robotics, with short experts of our own.

Observation (28,), in metres: hand (3,), block (3,), block - hand (3,), fingers (2,), turns and speeds (14,), goal (3,).
Action (4,) in [-1, 1]: the hand's shift along x, y, z (1 asks for 5 cm) and the fingers, which close below 0.
Source: Plappert et al., "Multi-Goal Reinforcement Learning: Challenging Robotics Environments and Request for
Research", arXiv 1802.09464; the package gymnasium-robotics, its v4 environments.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from fewstep.policies.simulation import Expert, Outcome, Simulation, Task, Vector
from fewstep.policies.tasks.mujoco import ArmSimulation, NoisyExpert, View, packages_of

_VIEW = View(lookat=(1.25, 0.75, 0.6), distance=1.5, azimuth=132.0, elevation=-20.0)

GAIN = 10.0
"""Action per metre that the hand is off: half of what asks for the whole way in one step."""


class FetchSimulation(ArmSimulation):
    """One of the package's environments, without its time limit, seen from in front of the arm; observation and goal in
    one vector.
    """

    def __init__(self, environment: Any, render: bool) -> None:
        super().__init__(environment, _VIEW, render)

    def reset(self, seed: int) -> Vector:
        """Place block, goal and the red marker at the goal; (28,).

        The environment marks it whenever it draws, and thereby refreshes the positions that the next action starts
        from: episodes that are watched would differ from others. Here it is done once, whether drawn or not.
        """
        from mujoco import mj_kinematics

        parts = self._place(seed)
        model, data = self._environment.model, self._environment.data
        marker = model.site("target0")
        marker.pos = parts["desired_goal"] - data.xpos[marker.bodyid[0]]
        mj_kinematics(model, data)
        return joined(parts)

    def step(self, action: Vector) -> Outcome:
        """Shift the hand by one action (4,)."""
        parts, _, _, _, information = self._environment.step(action)
        success = bool(information["is_success"])
        return Outcome(joined(parts), success, float(success))

    def _place(self, seed: int) -> dict[str, Any]:
        """The package's observation of a new episode."""
        return dict(self._environment.reset(seed=seed)[0])


def joined(parts: dict[str, Any]) -> Vector:
    """The package's observation and goal as one vector (28,)."""
    return np.concatenate([parts["observation"], parts["desired_goal"]]).astype(np.float32)


def push(observation: Vector) -> Vector:
    """The action (4,) that moves the block along the straight line to the goal.

    From behind the block the closed hand follows the line, slower towards its end, and corrects its distance from it.
    Wherever else it is, or once it has slipped off, it goes up, over, and down behind the block.
    """
    hand, block, goal = observation[:3], observation[3:6], observation[25:28]
    line = (goal - block)[:2]
    way = float(np.linalg.norm(line))
    ahead = line / max(way, 1e-6)
    off = (hand - block)[:2]
    along = float(off @ ahead)
    across = off - along * ahead
    behind = -0.12 < along < -0.02 and float(np.linalg.norm(across)) < 0.02
    if behind and hand[2] < 0.45:
        shift = np.append(ahead * min(1.0, 0.15 + 6 * way) - 15 * across, GAIN * (0.42 - hand[2]))
    else:
        shift = _approach(hand, off, block[:2] - 0.08 * ahead)
    return np.append(shift, 0.0).astype(np.float32)


def _approach(hand: Vector, off: Vector, place: Vector) -> Vector:
    """The shift (3,) that brings the hand down at a place (2,) beside the block; off (2,): hand - block."""
    way = place - hand[:2]
    near = 0.03 if hand[2] < 0.48 else 0.015  # wider on the way down, so that it does not turn back for a trifle
    if float(np.linalg.norm(way)) < near:
        return np.append(GAIN * way, GAIN * (0.415 - hand[2]))
    if hand[2] < 0.48 and float(np.linalg.norm(off)) < 0.1:
        way = np.zeros_like(way)  # straight up first, or it sweeps the block along
    return np.append(GAIN * way, GAIN * (0.51 - hand[2]))


def pick_and_place(observation: Vector) -> Vector:
    """The action (4,) that carries the block to the goal: go above it, descend, close the fingers, move.

    Which of the four follows from where the hand and the fingers are, so a block that slips is picked up again.
    """
    hand, block, goal = observation[:3], observation[3:6], observation[25:28]
    to_block = block - hand
    opening = float(observation[9] + observation[10])
    if float(np.linalg.norm(to_block[:2])) > 0.02:
        above = to_block + np.array([0.0, 0.0, 0.1], dtype=np.float32)
        if to_block[2] > -0.05:
            above[:2] = 0.0  # up before sideways, or the fingers strike the block
        return np.append(GAIN * above, 1.0).astype(np.float32)
    if abs(float(to_block[2])) > 0.015:
        return np.append(GAIN * to_block, 1.0).astype(np.float32)
    return np.append(GAIN * (to_block if opening > 0.06 else goal - block), -1.0).astype(np.float32)


def fetch_task(
    name: str,
    description: str,
    environment: str,
    expert: Callable[[], Expert],
    simulation: type[FetchSimulation] = FetchSimulation,
) -> Task:
    """A task of 100 actions in one of the package's environments, MODULE.CLASS, imported when the task is made."""
    module, _, kind = environment.partition(".")

    def make(render: bool) -> Simulation:
        with packages_of(name, "gymnasium-robotics"):
            found = getattr(import_module(f"gymnasium_robotics.envs.fetch.{module}"), kind)
        return simulation(found(), render)

    return Task(
        name=name,
        description=description,
        observation_size=28,
        action_low=(-1.0,) * 4,
        action_high=(1.0,) * 4,
        max_steps=100,
        make=make,
        expert=expert,
    )


FETCH_TASKS: tuple[Task, ...] = (
    fetch_task(
        "fetch-push",
        "a robot arm pushes a block to a goal on the table",
        "push.MujocoFetchPushEnv",
        partial(NoisyExpert, push),
    ),
    fetch_task(
        "fetch-pick-and-place",
        "a robot arm carries a block to a goal on the table or in the air",
        "pick_and_place.MujocoFetchPickAndPlaceEnv",
        partial(NoisyExpert, pick_and_place),
    ),
)
