"""A point, a ring, and two ways round it: the task that shows whether a policy keeps both.

The physics is Gymnasium-Robotics' PointMaze on a map of this module's own. Whatever the start, the expert goes either
way with equal chance, so a policy that answers with the mean chunk of actions drives into the bay between the two ways.
The longer it acts before it looks again the surer: looking after every action, any wavering can still grow into a way.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.policies.simulation import Expert, Outcome, Picture, Simulation, Task, Vector
from fewstep.policies.tasks.mujoco import packages_of

_MAP = (
    "111111111",
    "100000001",
    "100000001",
    "100111001",
    "100111001",
    "100101001",
    "100000001",
    "100000001",
    "111111111",
)
"""Cells of 1 m, x to the right, y up from the middle; 1 is a wall. The block has a bay toward the starts."""
_WALLS = np.array([[cell == "1" for cell in row] for row in _MAP])
_GOAL = (0.0, 3.0)
_GOAL_RADIUS = 0.45
_START_MIDDLE = (0.0, -3.0)
_START_REACH = (1.0, 0.2)
_HOLD = 10
"""Physics steps of 10 ms per action: what a policy decides lasts 0.1 s."""
_CLEAR_ANGLE = math.pi / 3
"""More than any wandering between starts, which lie within 40 degrees as the centre sees them."""
_CELL_PIXELS = 32


class RingMaze(Simulation):
    """Observations (6,): position, velocity, goal, in m and m/s. Actions (2,): the force along x and y, as a share of
    100 N. Starts at rest, anywhere in a stretch 2 m wide; only from its middle are both ways equally long.
    """

    def __init__(self) -> None:
        with packages_of("pointmaze-ring", "gymnasium-robotics"):
            from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv
        self._maze = PointMazeEnv(maze_map=_WALLS.astype(int).tolist())
        Path(self._maze.tmp_xml_file_path).unlink(missing_ok=True)  # it leaves its model's file behind
        self._position = np.zeros(2)
        self._travelled = 0.0
        self._trail: list[Any] = []

    def reset(self, seed: int) -> Vector:
        offset = np.random.default_rng((seed, 0)).uniform(-1.0, 1.0, 2)
        self._maze.reset(seed=seed)
        self._maze.goal = np.array(_GOAL)
        self._maze.point_env.set_state(np.array(_START_MIDDLE) + offset * _START_REACH, np.zeros(2))
        self._position, self._travelled = self._maze.data.qpos.copy(), 0.0
        self._trail = [self._position]
        return self._observe()

    def step(self, action: Vector) -> Outcome:
        force = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        for _ in range(_HOLD):
            self._maze.step(force)
            self._follow(self._maze.data.qpos)
        self._trail.append(self._position)
        success = math.dist(self._position, _GOAL) <= _GOAL_RADIUS
        return Outcome(self._observe(), success, float(success))

    def route(self) -> str:
        """The sense of the angle travelled about the centre, once it passes 60 degrees."""
        if abs(self._travelled) < _CLEAR_ANGLE:
            return ""
        return "counterclockwise" if self._travelled > 0 else "clockwise"

    def render(self) -> Picture:
        """The map from above with the way travelled, drawn without a graphics library: (288, 288, 3)."""
        rows = np.repeat(np.repeat(_WALLS, _CELL_PIXELS, 0), _CELL_PIXELS, 1)
        picture = np.where(rows[..., None], np.uint8(96), np.full((*rows.shape, 3), 255, dtype=np.uint8))
        _disc(picture, np.array(_GOAL), _GOAL_RADIUS, (144, 224, 144))
        for place in self._trail:
            _disc(picture, place, 0.08, (168, 184, 240))
        _disc(picture, self._position, 0.2, (48, 80, 208))
        return picture

    def close(self) -> None:
        self._maze.close()

    def _observe(self) -> Vector:
        return np.concatenate([self._maze.data.qpos, self._maze.data.qvel, _GOAL]).astype(np.float32)

    def _follow(self, position: Any) -> None:
        """Add the angle of one physics step, which is always short of half a turn: the centre lies inside a wall."""
        turn = math.atan2(position[1], position[0]) - math.atan2(self._position[1], self._position[0])
        self._travelled += (turn + math.pi) % (2 * math.pi) - math.pi
        self._position = position.copy()


class RingExpert(Expert):
    """Goes round by waypoints beside the block's corners: force 0.3 ((2 m/s) toward the next one - velocity) + noise.

    begin(seed) draws the way, clockwise or counterclockwise with equal chance, independent of the start; noise of
    standard deviation 0.1 on each action shows how to recover.
    """

    speed, gain, noise = 2.0, 0.3, 0.1

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, seed: int) -> None:
        self._generator = np.random.default_rng((seed, 1))
        self.side = 1.0 if self._generator.random() < 0.5 else -1.0

    def act(self, observation: Vector) -> Vector:
        position, velocity, goal = np.asarray(observation, dtype=np.float64).reshape(3, 2)
        # The corner below, the corner above, then the goal; each is passed once the point is level with it.
        corner = np.array([2.3 * self.side, -1.2 if position[1] < -1.4 else 1.5])
        way = (corner if position[1] < 1.3 else goal) - position
        wanted = self.speed * way / max(float(np.hypot(*way)), 1e-6)
        action = self.gain * (wanted - velocity) + self._generator.normal(0.0, self.noise, 2)
        return RING.clip(action.astype(np.float32))


def _disc(picture: Picture, centre: Any, radius: float, colour: tuple[int, int, int]) -> None:
    """Paint a disc in place; centre and radius in m."""
    half = picture.shape[0] / 2
    middle = (half - centre[1] * _CELL_PIXELS, half + centre[0] * _CELL_PIXELS)
    rows, columns = (  # no pixel outside these is near enough
        slice(max(0, int(m - radius * _CELL_PIXELS) - 1), max(0, int(m + radius * _CELL_PIXELS) + 2)) for m in middle
    )
    near = picture[rows, columns]
    row, column = np.ogrid[rows.start : rows.start + near.shape[0], columns.start : columns.start + near.shape[1]]
    x, y = (column + 0.5 - half) / _CELL_PIXELS, (half - row - 0.5) / _CELL_PIXELS
    near[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2] = colour


RING = Task(
    name="pointmaze-ring",
    description="drive a point round a block, to the goal behind it: two ways, equally often shown",
    observation_size=6,
    action_low=(-1.0, -1.0),
    action_high=(1.0, 1.0),
    max_steps=100,
    make=lambda _: RingMaze(),
    expert=RingExpert,
)
