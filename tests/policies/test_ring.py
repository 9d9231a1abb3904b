"""The ring: equal starts and episodes for equal seeds, both ways from the same start, and none for their mean."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.policies.simulation import Vector
from fewstep.policies.tasks.registry import find_task
from fewstep.policies.tasks.ring import RING, RingExpert, RingMaze
from fewstep.utils.errors import MissingExtraError


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    pytest.importorskip("gymnasium_robotics")


@pytest.fixture(scope="module")
def maze() -> RingMaze:
    return RingMaze()


def drive(maze: RingMaze, seed: int, act: Callable[[Vector], Vector]) -> tuple[bool, list[Vector]]:
    """Whether the goal was reached, and all observations."""
    seen = [maze.reset(seed)]
    for _ in range(RING.max_steps):
        outcome = maze.step(act(seen[-1]))
        seen.append(outcome.observation)
        if outcome.success:
            return True, seen
    return False, seen


def show(maze: RingMaze, start: int, variation: int) -> tuple[bool, str, list[Vector]]:
    expert = RingExpert()
    expert.begin(variation)
    success, seen = drive(maze, start, expert.act)
    return success, maze.route(), seen


def test_the_expert_reaches_the_goal_by_both_ways(maze: RingMaze) -> None:
    shown = [show(maze, seed, seed) for seed in range(40)]
    assert all(success for success, _, _ in shown)
    assert all(len(seen) <= 60 for _, _, seen in shown)
    counts = [sum(route == name for _, route, _ in shown) for name in ("clockwise", "counterclockwise")]
    assert sum(counts) == 40
    assert min(counts) >= 12


@pytest.mark.parametrize("start", [3, FIRST_TEST_SEED])
def test_both_ways_are_shown_from_the_same_start(maze: RingMaze, start: int) -> None:
    shown = [show(maze, start, variation) for variation in range(8)]
    assert {route for _, route, _ in shown} == {"clockwise", "counterclockwise"}
    assert all(np.array_equal(seen[0], shown[0][2][0]) for _, _, seen in shown)


def test_the_route_is_where_the_point_passed_the_block(maze: RingMaze) -> None:
    for seed in range(6):
        _, route, seen = show(maze, seed, seed)
        level = min(seen, key=lambda observation: abs(observation[1]))
        assert route == ("counterclockwise" if level[0] > 0 else "clockwise")


def test_no_route_is_named_before_the_point_has_left_the_starts(maze: RingMaze) -> None:
    maze.reset(1)
    assert maze.route() == ""
    for push in (1.0, -1.0):
        for _ in range(5):
            maze.step(np.array([push, 0.0], dtype=np.float32))
            assert maze.route() == ""


def test_a_turned_point_takes_its_route_back(maze: RingMaze) -> None:
    expert = RingExpert()
    observation = maze.reset(0)
    expert.side = 1.0
    while not maze.route():
        observation = maze.step(expert.act(observation)).observation
    assert maze.route() == "counterclockwise"
    for _ in range(20):
        back = 0.3 * (np.array([-2.0, -2.0]) - observation[2:4])
        observation = maze.step(back.astype(np.float32)).observation
    assert maze.route() == ""


def test_the_mean_of_both_ways_ends_in_the_bay(maze: RingMaze) -> None:
    right, left = RingExpert(), RingExpert()
    right.side, left.side = 1.0, -1.0
    for seed in range(FIRST_TEST_SEED, FIRST_TEST_SEED + 5):
        success, seen = drive(maze, seed, lambda observation: (right.act(observation) + left.act(observation)) / 2)
        assert not success
        assert seen[-1][1] < -0.4


def test_starts_and_episodes_follow_from_seed_and_actions_alone(maze: RingMaze) -> None:
    actions = np.random.default_rng(5).uniform(-1.0, 1.0, (25, 2)).astype(np.float32)
    first = [maze.reset(7), *(maze.step(action).observation for action in actions)]
    show(maze, 8, 8)
    other = RingMaze()
    other.reset(9)
    for again in (maze, other):
        repeated = [again.reset(7), *(again.step(action).observation for action in actions)]
        assert np.array_equal(first, repeated)
    assert first[0].dtype == np.float32
    assert first[0].shape == (RING.observation_size,)


def test_starts_spread_over_the_stretch(maze: RingMaze) -> None:
    starts = np.array([maze.reset(seed) for seed in range(60)])
    assert len(np.unique(starts[:, 0])) == 60
    assert starts[:, 0].min() < -0.8
    assert starts[:, 0].max() > 0.8
    assert np.abs(starts[:, 1] + 3.0).max() <= 0.2 + 1e-6
    assert np.array_equal(starts[:, 2:], np.tile(np.array([0.0, 0.0, 0.0, 3.0], dtype=np.float32), (60, 1)))


def test_success_is_nearness_to_the_goal(maze: RingMaze) -> None:
    _, _, seen = show(maze, 2, 2)
    distances = [math.dist(observation[:2], observation[4:]) for observation in seen]
    assert distances[-1] <= 0.45 < distances[-2]


def test_the_expert_varies_by_its_seed_alone(maze: RingMaze) -> None:
    observation, expert = maze.reset(0), RingExpert()

    def first(seed: int) -> Vector:
        expert.begin(seed)
        return expert.act(observation)

    assert np.array_equal(first(4), first(4))
    assert not np.array_equal(first(4), first(5))
    assert first(4).dtype == np.float32


def test_the_picture_shows_walls_goal_and_point(maze: RingMaze) -> None:
    maze.reset(0)
    picture = maze.render()
    assert picture.shape == (288, 288, 3)
    assert picture.dtype == np.uint8
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 4
    blue = np.argwhere((picture == (48, 80, 208)).all(-1)).mean(0)
    x, y = (blue[1] + 0.5 - 144) / 32, (144 - blue[0] - 0.5) / 32
    assert math.dist((x, y), maze.reset(0)[:2]) < 0.05


def test_making_a_maze_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    RingMaze().close()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium_robotics.envs.maze.point_maze", None)
    with pytest.raises(MissingExtraError, match=r"^task pointmaze-ring needs gymnasium-robotics: pip install"):
        find_task("pointmaze-ring").make(False)
