"""PushT: starts where the draw says, equal episodes for equal seeds, coverage as the area shared with the goal."""

import math
import os
import sys

import numpy as np
import pytest

from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.policies.tasks.pusht import PUSHT, PushT, drawn_start
from fewstep.policies.tasks.pusht_table import make_table, place
from fewstep.policies.tasks.registry import find_task
from fewstep.utils.errors import MissingExtraError


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    pytest.importorskip("gym_pusht")


@pytest.fixture(scope="module")
def pusht() -> PushT:
    return PushT()


def test_an_episode_starts_at_the_drawn_state(pusht: PushT) -> None:
    for seed in (*range(20), *range(FIRST_TEST_SEED, FIRST_TEST_SEED + 20)):
        drawn = drawn_start(seed)
        drawn[4] %= 2 * math.pi
        assert pusht.reset(seed) == pytest.approx(drawn, abs=1e-3)


def test_a_block_that_nothing_touches_stays_where_it_was_put() -> None:
    table = make_table()
    table.reset(seed=0)
    state = np.array([60.0, 60.0, 300.0, 250.0, 2.0])
    place(table, state)
    assert table._get_coverage() < 0.9
    for _ in range(20):
        table.step(state[:2])
    assert table.get_obs() == pytest.approx(state, abs=1e-3)


def test_starts_stay_what_they_were() -> None:
    """Two states of the published evaluation's draws (numpy's MT19937): other ones would be other tests."""
    assert drawn_start(FIRST_TEST_SEED).tolist() == pytest.approx([235, 124, 335, 128, -0.9049274284249247])
    assert drawn_start(FIRST_TEST_SEED + 1).tolist() == pytest.approx([365, 182, 275, 280, -1.0981131397099535])
    assert len({tuple(drawn_start(seed)) for seed in range(40)}) == 40


def test_starts_and_episodes_follow_from_seed_and_actions_alone(pusht: PushT) -> None:
    start = pusht.reset(7)
    actions = start[2:4] + np.random.default_rng(5).normal(0.0, 60.0, (25, 2)).astype(np.float32)
    first = [start, *(pusht.step(action).observation for action in actions)]
    assert not np.array_equal(first[0][2:], first[-1][2:])
    pusht.reset(8)
    pusht.step(actions[0])
    other = PushT()
    other.reset(9)
    for again in (pusht, other):
        repeated = [again.reset(7), *(again.step(action).observation for action in actions)]
        assert np.array_equal(first, repeated)
    assert first[0].dtype == np.float32
    assert first[0].shape == (PUSHT.observation_size,)


@pytest.mark.parametrize(
    ("block", "coverage"),
    [
        ((256.0, 256.0, math.pi / 4), 1.0),
        ((256.0 + 30.0 * math.cos(math.pi / 4), 256.0 + 30.0 * math.sin(math.pi / 4), math.pi / 4), 90 / 210),
        ((420.0, 420.0, math.pi / 4), 0.0),
    ],
)
def test_the_score_is_the_share_of_the_goal_covered(
    pusht: PushT, block: tuple[float, float, float], coverage: float
) -> None:
    """A T of a 4 by 1 bar on a 1 by 3 stem, moved one width along its bar, keeps 3 of 7 parts: the bar's own."""
    pusht.reset(0)
    place(pusht._table, (20.0, 20.0, *block))
    outcome = pusht.step(np.array([20.0, 20.0], dtype=np.float32))
    assert outcome.score == pytest.approx(coverage, abs=1e-6)
    assert outcome.success == (coverage > 0.95)
    assert not outcome.ended


def test_the_circle_goes_where_it_is_told_within_the_bounds(pusht: PushT) -> None:
    pusht.reset(0)
    place(pusht._table, (60.0, 60.0, 400.0, 400.0, 0.0))
    for _ in range(15):
        outcome = pusht.step(np.array([-300.0, 100.0], dtype=np.float32))
    assert outcome.observation[:2] == pytest.approx([0.0, 100.0], abs=0.1)


def test_pictures_need_no_screen(pusht: PushT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDL_VIDEODRIVER", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    pusht.reset(0)
    before = pusht.render()
    assert (before.shape, before.dtype) == ((680, 680, 3), np.uint8)
    assert os.environ["SDL_VIDEODRIVER"] == "dummy"
    pusht.reset(1)
    assert not np.array_equal(before, pusht.render())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gym_pusht.envs.pusht", None)
    with pytest.raises(
        MissingExtraError, match=r"^task pusht needs gym-pusht: pip install .*gym-pusht.* \(the extra \[policy\]\)"
    ):
        find_task("pusht").make(False)
