"""An expert for PushT: pushes measured once on the task's own physics, then searched two deep before each push.

Nothing keeps moving on this table and contacts have no friction, so what a slow straight push does to the block depends
on where it touches and how far it goes, not on where the block lies. A table of such pushes in the block's own frame
therefore predicts any sequence of them by composing motions of the plane.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.policies.simulation import Expert, Vector
from fewstep.policies.tasks.pusht_table import GOAL_POSE, SIZE, make_table, place

Array = NDArray[np.float64]

RADIUS = 15.0
"""Of the circle that pushes; all lengths are in pixels of the task's square."""
_BARS = (((0.0, 15.0), (60.0, 15.0)), ((0.0, 75.0), (15.0, 45.0)))
"""The T in its own frame: centre and half sides of its bar and of its stem."""
_EDGES = (
    ((-60.0, 0.0), (60.0, 0.0), (0.0, -1.0)),
    ((60.0, 0.0), (60.0, 30.0), (1.0, 0.0)),
    ((-60.0, 0.0), (-60.0, 30.0), (-1.0, 0.0)),
    ((15.0, 30.0), (60.0, 30.0), (0.0, 1.0)),
    ((-60.0, 30.0), (-15.0, 30.0), (0.0, 1.0)),
    ((15.0, 30.0), (15.0, 120.0), (1.0, 0.0)),
    ((-15.0, 30.0), (-15.0, 120.0), (-1.0, 0.0)),
    ((-15.0, 120.0), (15.0, 120.0), (0.0, 1.0)),
)
"""Its outline: both ends of every edge, and the normal that points away from it."""
_CORNERS = np.array([(-60, 0), (60, 0), (60, 30), (-60, 30), (15, 120), (-15, 120)], dtype=np.float64)
_CENTROID, _GYRATION = 285.0 / 7.0, 43.95
"""Of the T's area: how far along the stem its centroid lies, and its radius of gyration about that."""
_STANDOFF, _CLEARANCE, _RING = 8.0, 18.0, 45.0
"""Where a push is begun, before contact; how near to the T the circle's centre passes on its way; how far at ease."""
_LONGEST = 150
_FIRST = np.array([*range(1, 21), *range(22, 60, 3), *range(60, _LONGEST + 1, 6)])
_THEN = np.array([1, 2, 3, 4, 6, 8, 11, 15, 20, 27, 36, 48, 64, 90, 120])
"""Lengths tried for the next push, and for the one after it."""
_COARSE = np.arange(1, len(_FIRST), 4)
"""Which of the first lengths a second push is tried after."""
_WALK, _PUSH, _PAUSE = 24.0, 14.0, 6.0
"""Speeds in pixels per action, and the actions that a push costs besides."""
_STEP_PRICE = 0.12
"""What one more action is worth, in pixels of error."""
_PATIENCE = 12
"""Actions after which a target that is not reached is given up."""


def distance(points: Array) -> Array:
    """Of points (..., 2) in the T's frame from it, negative inside."""
    found = np.full(points.shape[:-1], np.inf)
    for centre, half in _BARS:
        beyond = np.abs(points - np.array(centre)) - np.array(half)
        outside = np.sqrt((np.maximum(beyond, 0.0) ** 2).sum(-1))
        found = np.minimum(found, outside + np.minimum(beyond.max(-1), 0.0))
    return found


def compose(poses: Array, moves: Array) -> Array:
    """Poses (..., 3), x, y and angle, after moves (..., 3) in the poses' own frames."""
    return np.concatenate([to_world(poses, moves[..., :2]), poses[..., 2:] + moves[..., 2:]], axis=-1)


def to_world(poses: Array, points: Array) -> Array:
    """Points (..., 2) of the T's frame as points of the square."""
    cos, sin = np.cos(poses[..., 2]), np.sin(poses[..., 2])
    x, y = points[..., 0], points[..., 1]
    return np.stack([poses[..., 0] + cos * x - sin * y, poses[..., 1] + sin * x + cos * y], axis=-1)


def to_block(pose: Array, points: Array) -> Array:
    """Points (..., 2) of the square in the T's frame; the inverse of `to_world`."""
    cos, sin = math.cos(pose[2]), math.sin(pose[2])
    off = points - pose[:2]
    return np.stack([cos * off[..., 0] + sin * off[..., 1], cos * off[..., 1] - sin * off[..., 0]], axis=-1)


def pose_error(poses: Array) -> Array:
    """Root mean square distance of the T's points from where they belong, for poses (..., 3): (...).

    sqrt(|c - c_goal|^2 + 2 r^2 (1 - cos(angle - goal angle))), c the centroid and r the radius of gyration.
    """
    centroid = np.array([0.0, _CENTROID])
    off = to_world(poses, centroid) - to_world(GOAL_POSE, centroid)
    squared: Array = (off**2).sum(-1) + 2 * _GYRATION**2 * (1 - np.cos(poses[..., 2] - GOAL_POSE[2]))
    return np.sqrt(squared)


def _inside(points: Array, margin: float) -> Any:
    """Which points (..., 2) lie in the square, a margin from its sides."""
    return ((points >= margin) & (points <= SIZE - margin)).all(-1)


def _free_of_walls(poses: Array) -> Any:
    """Which poses (..., 3) keep all corners of the T off the walls, whose inner sides are 7 pixels in."""
    return _inside(to_world(poses[..., None, :], _CORNERS), 9.0).all(-1)


@dataclass(frozen=True, eq=False)
class PushTable:
    """What straight pushes do, in the T's frame.

    contacts: (K, 2), the circle's centre as it touches. normals: (K, 2), away from the T; a push goes against them.
    moves: (K, 151, 3), the T's x, y and angle after pushes of 0, 1, ..., 150 pixels.
    """

    contacts: Array
    normals: Array
    moves: Array


def measure_pushes(spacing: float = 6.0) -> PushTable:
    """Try a slow push at every place of the outline that the circle can touch, on the task's own physics."""
    places = [place for edge in _EDGES for place in _along(*edge, spacing)]
    contacts, normals = (np.array(part) for part in zip(*places, strict=True))
    table = make_table()
    moves = [_measure(table, contact, normal) for contact, normal in zip(contacts, normals, strict=True)]
    return PushTable(contacts, normals, np.array(moves))


def _along(
    start: tuple[float, float], end: tuple[float, float], normal: tuple[float, float], spacing: float
) -> list[tuple[Array, Array]]:
    """Contacts (2,) and normals (2,) along an edge, not nearer than 2 to its ends nor where the notch has no room."""
    first, last, away = np.array(start), np.array(end), np.array(normal)
    length = math.dist(start, end)
    shares = np.linspace(2 / length, 1 - 2 / length, max(2, int((length - 4) / spacing) + 1))
    centres = first + shares[:, None] * (last - first) + RADIUS * away
    return [(centre, away) for centre in centres if distance(centre + _STANDOFF * away) >= _CLEARANCE]


def _measure(table: Any, contact: Array, normal: Array) -> Array:
    """The T's moves (151, 3) as the circle goes on from contact, a quarter pixel at a time, far from the walls."""
    middle, moves = SIZE / 2, []
    table.reset(seed=0)
    place(table, [*(middle + contact + 2 * normal), middle, middle, 0.0])
    table.agent.velocity = tuple(-25.0 * normal)
    for quarter in range(4 * (_LONGEST + 2)):
        table.space.step(0.01)
        if quarter % 4 == 3:
            moves.append((*(table.block.position - (middle, middle)), table.block.angle))
    return np.array(moves[1:])


class Roads:
    """Ways for the circle round the T, in its frame: straight lines between nodes that stay clear of it.

    nodes: (N, 2), first the K places where a push begins, then a ring at ease. links: (N, N), lengths, inf where the T
    is between. between: (K, K), shortest ways from one beginning to another.
    """

    def __init__(self, table: PushTable) -> None:
        begins = table.contacts + _STANDOFF * table.normals
        self.nodes = np.concatenate([begins, _ring()])
        self.links = _sight(self.nodes[:, None], self.nodes[None], _CLEARANCE)
        shortest = self.links
        for middle in range(len(shortest)):
            shortest = np.minimum(shortest, shortest[:, middle, None] + shortest[middle])
        self.between = shortest[: len(begins), : len(begins)]

    def ways(self, start: Array, allowed: Any) -> tuple[Array, NDArray[np.int64]]:
        """Shortest ways from a point (2,) to the nodes over `allowed` ones (N,): lengths (N,), and the node before
        each, -1 for none; Dijkstra's algorithm. A start nearer to the T than ways may pass must not come nearer yet.
        """
        clearance = min(_CLEARANCE, float(distance(start)) - 0.3)
        lengths = np.where(allowed, _sight(start[None], self.nodes, clearance), np.inf)
        before, open_nodes = np.full(len(lengths), -1), np.ones(len(lengths), dtype=bool)
        while np.isfinite(np.where(open_nodes, lengths, np.inf)).any():
            nearest = int(np.where(open_nodes, lengths, np.inf).argmin())
            open_nodes[nearest] = False
            through = np.where(allowed, lengths[nearest] + self.links[nearest], np.inf)
            shorter = through < lengths - 1e-9
            lengths[shorter], before[shorter] = through[shorter], nearest
        return lengths, before


def _ring(count: int = 24) -> Array:
    """Points (count, 2) at ease all round the T, found from its centroid outward."""
    angles = np.arange(count) * 2 * math.pi / count
    reaches = np.arange(0.0, 300.0, 0.5)
    rays = reaches[:, None, None] * np.stack([np.cos(angles), np.sin(angles)], axis=-1) + np.array([0.0, _CENTROID])
    last_near = len(reaches) - 1 - (distance(rays) < _RING)[::-1].argmax(0)
    ring: Array = rays[last_near + 1, np.arange(count)]
    return ring


def _sight(starts: Array, ends: Array, clearance: float) -> Array:
    """Lengths of the straight ways between points (..., 2), inf where one comes nearer to the T than `clearance`."""
    shares = np.linspace(0.0, 1.0, 24)[:, None]
    points = starts[..., None, :] * (1 - shares) + ends[..., None, :] * shares
    lengths = np.sqrt(((ends - starts) ** 2).sum(-1))
    return np.where((distance(points) >= clearance).all(-1), lengths, np.inf)


@dataclass(frozen=True, eq=False)
class Target:
    """Where to send the circle; with a tolerance it is sent there until it is that near."""

    point: Array
    tolerance: float = math.inf


class PushTExpert(Expert):
    """Walks round the block and pushes it straight, one push at a time, until it lies where it belongs.

    The next push is the one that leaves, alone or with the best push after it, the least error + 0.12 px per action.
    begin(seed) draws the noise on the points of its ways, of standard deviation 2 px; where a way ends is exact.
    """

    noise = 2.0

    def __init__(self) -> None:
        self._table = measure_pushes()
        self._roads = Roads(self._table)
        self.begin(0)

    def begin(self, seed: int) -> None:
        self._generator = np.random.default_rng((seed, 1))
        self._targets: list[Target] = []
        self._waited = 0

    def act(self, observation: Vector) -> Vector:
        state = np.asarray(observation, dtype=np.float64)
        circle, pose = state[:2], state[2:]
        if self._targets and self._arrived(circle, self._targets[0]):
            self._targets.pop(0)
            self._waited = 0
        if not self._targets:
            self._targets = self._plan(circle, pose)
        self._waited += 1
        return np.clip(self._targets[0].point, 0.0, SIZE).astype(np.float32)

    def _arrived(self, circle: Array, target: Target) -> bool:
        return math.dist(circle, target.point) <= target.tolerance or self._waited > _PATIENCE

    def _plan(self, circle: Array, pose: Array) -> list[Target]:
        """The targets of the next push: the way to where it begins, and its line; the middle where none can be made."""
        allowed = _inside(to_world(pose, self._roads.nodes), 3.0)
        lengths, before = self._roads.ways(to_block(pose, circle), allowed)
        choice = self._choose(pose, lengths[: len(self._table.contacts)])
        if choice is None:
            return [Target(np.full(2, SIZE / 2))]
        contact, length = choice
        way, node = [], contact
        while node >= 0:
            way.append(to_world(pose, self._roads.nodes[node]))
            node = int(before[node])
        end = to_world(pose, self._table.contacts[contact] - length * self._table.normals[contact])
        precision = 0.5 if length < 20 else 2.0
        return [*self._line([circle, *way[::-1]], _WALK, 3.0), *self._line([way[0], end], _PUSH, precision)]

    def _line(self, points: list[Array], speed: float, tolerance: float) -> list[Target]:
        """Targets along a broken line, at most `speed` apart; all but the last are noisy."""
        targets = []
        for start, end in pairwise(points):
            count = max(1, math.ceil(math.dist(start, end) / speed))
            targets += [start + (end - start) * share for share in np.arange(1, count + 1) / count]
        noise = self._generator.normal(0.0, self.noise, (len(targets), 2))
        passed = [Target(point + off) for point, off in zip(targets[:-1], noise[:-1], strict=True)]
        return [*passed, Target(targets[-1], tolerance)]

    def _choose(self, pose: Array, ways: Array) -> tuple[int, int] | None:
        """The contact and length of the next push from a pose (3,), given the lengths of the ways to it (K,)."""
        table, between = self._table, self._roads.between
        ends = to_world(pose, table.contacts[:, None] - _FIRST[:, None] * table.normals[:, None])
        poses = compose(pose, table.moves[:, _FIRST])
        possible = _inside(ends, 2.0) & (_free_of_walls(poses) | ~_free_of_walls(pose))
        cost = np.where(possible, _STEP_PRICE * (ways[:, None] / _WALK + _FIRST / _PUSH + _PAUSE), np.inf)
        alone = pose_error(poses) + cost
        then = pose_error(compose(poses[:, _COARSE, None, None], table.moves[:, _THEN]))
        then += _STEP_PRICE * (between[:, None, :, None] / _WALK + _THEN / _PUSH + _PAUSE)
        alone[:, _COARSE] = np.minimum(alone[:, _COARSE], cost[:, _COARSE] + then.min((2, 3)))
        if not np.isfinite(alone).any():
            return None
        contact, length = np.unravel_index(int(alone.argmin()), alone.shape)
        return int(contact), int(_FIRST[length])
