"""Fetch behind a block: a manipulation task with two answers, for policies that must choose one.

Gymnasium-Robotics' Fetch push with another goal: the block is to come back towards where the hand is. The hand has to
get behind it first, and from opposite that is equally far on either side. The expert stays low and goes round, either
way by a coin; the mean of both ways stays where it is, in front of the block. (Over the block is a third way, which the
expert never shows.)
"""

import math
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.policies.simulation import Expert, Outcome, Vector
from fewstep.policies.tasks.fetch import GAIN, FetchSimulation, fetch_task
from fewstep.policies.tasks.mujoco import NoisyExpert

_WAY = (0.12, 0.18)
"""How far the block is to come, in metres."""
_SLANT = 0.3
"""The most that its way is off the direction to the hand, in radians."""
_RADIUS = 0.115
"""Of the circle about the block on which the hand goes round, in metres: fingers and block just miss each other."""
_LOW = 0.42
"""Height of the hand beside the block, in metres."""
_STRIDE = 0.6
"""How far ahead on the circle the hand aims, in radians."""
_ROUND = math.pi / 2
"""An angle travelled about the block that tells one way from the other, in radians."""
_BESIDE = 0.03
"""Above the block's centre, in metres: a hand that is lower cannot pass over it."""
_OPPOSITE = 2.2
"""Beyond this angle from behind the block, in radians, the expert's coin decides; below, the shorter way."""


def _angle(vector: NDArray[Any]) -> float:
    return math.atan2(float(vector[1]), float(vector[0]))


def _wrapped(angle: float) -> float:
    """The same direction in [-pi, pi)."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


class RetrieveSimulation(FetchSimulation):
    """Fetch push whose goal lies from the block towards the hand: 12 to 18 cm, up to 0.3 rad aside, by the seed."""

    def __init__(self, environment: Any, render: bool) -> None:
        super().__init__(environment, render)
        self._seen, self._travelled, self._route = 0.0, 0.0, ""

    def _place(self, seed: int) -> dict[str, Any]:
        parts = super()._place(seed)
        random = np.random.default_rng((seed, 2))
        hand, block = parts["observation"][:2], parts["observation"][3:6]
        self._seen, self._travelled, self._route = _angle(hand - block[:2]), 0.0, ""
        direction = self._seen + random.uniform(-_SLANT, _SLANT)
        goal = block.copy()
        goal[:2] += random.uniform(*_WAY) * np.array([math.cos(direction), math.sin(direction)])
        self._environment.goal = goal
        return {**parts, "desired_goal": goal}

    def step(self, action: Vector) -> Outcome:
        """Shift the hand by one action (4,), and note how it goes round."""
        outcome = super().step(action)
        off = outcome.observation[:3] - outcome.observation[3:6]
        seen = _angle(off)
        if off[2] < _BESIDE:
            self._travelled += _wrapped(seen - self._seen)
        self._seen = seen
        if not self._route and abs(self._travelled) > _ROUND:
            self._route = "counterclockwise" if self._travelled > 0 else "clockwise"
        return outcome

    def route(self) -> str:
        """The sense in which the hand first went a quarter round the block, seen from above; what it goes above the
        block does not count.
        """
        return self._route


def retrieve(observation: Vector, sense: float) -> Vector:
    """The action (4,): round the block on a circle, low, then along the line to the goal as `fetch.push`.

    sense: 1 counterclockwise, -1 clockwise, seen from above. Where the hand is less than 2.2 rad from behind the block
    it takes the shorter way, whatever is asked for.
    """
    hand, block, goal = (observation[rows].astype(np.float64) for rows in (slice(3), slice(3, 6), slice(25, 28)))
    line, off = (goal - block)[:2], (hand - block)[:2]
    way = float(np.linalg.norm(line))
    ahead = line / max(way, 1e-6)
    along = float(off @ ahead)
    across = off - along * ahead
    if -0.14 < along < -0.02 and float(np.linalg.norm(across)) < 0.02 and hand[2] < 0.45:
        shift = ahead * min(1.0, 0.15 + 6 * way) - 15 * across
    else:
        behind = _wrapped(_angle(off) - _angle(-ahead))
        towards = sense if abs(behind) > _OPPOSITE else -math.copysign(1.0, behind)
        turn = _angle(off) + towards * min(_STRIDE, abs(behind))
        shift = GAIN * (_RADIUS * np.array([math.cos(turn), math.sin(turn)]) - off)
    return np.append(shift, [GAIN * (_LOW - hand[2]), 0.0]).astype(np.float32)


class RetrieveExpert(Expert):
    """`retrieve`, with the noise of `NoisyExpert`; begin(seed) draws the sense, either with equal chance."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, seed: int) -> None:
        random = np.random.default_rng((seed, 3))
        self.sense = 1.0 if random.random() < 0.5 else -1.0
        self._hand = NoisyExpert(partial(retrieve, sense=self.sense))
        self._hand.begin(seed)

    def act(self, observation: Vector) -> Vector:
        return self._hand.act(observation)


RETRIEVE = fetch_task(
    "fetch-retrieve",
    "a robot arm reaches round a block, either way, and pushes it back",
    "push.MujocoFetchPushEnv",
    RetrieveExpert,
    RetrieveSimulation,
)
