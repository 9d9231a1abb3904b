"""PushT: push a T-shaped block onto its drawn place; a circle pushes, and follows the positions it is told.

Draws, limits and measure are those of Diffusion Policy's evaluation (Chi et al., RSS 2023): 300 actions at 10 Hz, test
seeds from 100000, the share of the goal area covered. The physics is gym-pusht's. One thing differs: here a block lies
where its draw says, while that evaluation, as gym-pusht, sets the position before the angle, which moves it off again.
"""

import math
import os
from typing import Any

import numpy as np

from fewstep.policies.simulation import Outcome, Picture, Simulation, Task, Vector
from fewstep.policies.tasks.pusht_expert import PushTExpert
from fewstep.policies.tasks.pusht_table import SIZE, make_table, place


class PushT(Simulation):
    """Observations (5,): the circle's x, y; the block's x, y and angle in [0, 2 pi). Actions (2,): where to go.

    Success is a coverage above 0.95, as the environment has it; the score is the coverage itself.
    """

    def __init__(self) -> None:
        self._table = make_table()

    def reset(self, seed: int) -> Vector:
        self._table.reset(seed=seed)
        place(self._table, drawn_start(seed))
        return self._observe()

    def step(self, action: Vector) -> Outcome:
        _, _, _, _, info = self._table.step(np.clip(np.asarray(action, dtype=np.float64), 0.0, SIZE))
        return Outcome(self._observe(), bool(info["is_success"]), float(info["coverage"]))

    def render(self) -> Picture:
        """The square from above as the environment paints it, (680, 680, 3), on no screen."""
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        return np.asarray(self._table.render(), dtype=np.uint8)

    def close(self) -> None:
        self._table.close()

    def _observe(self) -> Vector:
        return np.asarray(self._table.get_obs(), dtype=np.float32)


def drawn_start(seed: int) -> Any:
    """The state (5,) at which a seed starts: positions in whole pixels, clear of the walls, and any angle.

    The draws are those of Diffusion Policy's evaluation, whose angle is normal: 2 pi z - pi.
    """
    draws = np.random.RandomState(seed)
    circle, block = draws.randint(50, 450, 2), draws.randint(100, 400, 2)
    return np.array([*circle, *block, draws.randn() * 2 * math.pi - math.pi])


PUSHT = Task(
    name="pusht",
    description="push a T-shaped block onto its place with a circle",
    observation_size=5,
    action_low=(0.0, 0.0),
    action_high=(SIZE, SIZE),
    max_steps=300,
    make=lambda _: PushT(),
    expert=PushTExpert,
)
