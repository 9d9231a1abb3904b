"""Rollouts: lockstep equals one by one, failing simulations, the interval, experts and what they record."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pointtask import point_task

from fewstep.control import FIRST_TEST_SEED
from fewstep.errors import ConfigError, DataError
from fewstep.policies.figures import read_rollouts, read_strip, rollout_row, rollout_table, save_film, write_rollouts
from fewstep.policies.policy import load_policy
from fewstep.policies.rollout import Episode, Rollout, expert_rollout, film, record, roll_out, wilson


def test_the_policy_reaches_the_goal(point_run: Path) -> None:
    made = point_task()
    found = roll_out(load_policy(point_run), made.task, 30)
    assert found.successes >= 27
    assert found.errors == ()
    assert sum(found.routes.values()) == 30
    assert [episode.seed for episode in found.episodes] == list(range(FIRST_TEST_SEED, FIRST_TEST_SEED + 30))
    assert all(simulation.closed for simulation in made.simulations)
    assert found.latency_ms > 0
    assert found.single_ms > 0


def test_episodes_do_not_depend_on_their_company(point_run: Path) -> None:
    policy = load_policy(point_run)
    together = roll_out(policy, point_task().task, 7, at_once=7).episodes
    assert roll_out(policy, point_task().task, 7, at_once=3).episodes == together


def test_a_simulation_that_fails_is_an_error_by_name_and_the_others_finish(point_run: Path) -> None:
    policy, first = load_policy(point_run), FIRST_TEST_SEED
    usual = roll_out(policy, point_task().task, 4)
    made = point_task(raises_at={first + 1: 1}, blind_at={first + 2: 1})
    found = roll_out(policy, made.task, 4)
    errors = {episode.seed: episode.error for episode in found.errors}
    assert errors[first + 1] == "RuntimeError: the arm fell off"
    assert "not finite (its number 1)" in errors[first + 2]
    assert set(errors) == {first + 1, first + 2}
    assert not any(episode.success for episode in found.errors)
    assert (found.episodes[0], found.episodes[3]) == (usual.episodes[0], usual.episodes[3])
    row = rollout_row(found, made.task, "iSD", first, policy)
    assert f"start {first + 1}: RuntimeError: the arm fell off" in rollout_table([row])


def test_another_task_is_refused(point_run: Path) -> None:
    from dataclasses import replace

    task = replace(point_task().task, observation_size=5)
    with pytest.raises(ConfigError, match="sees 4 numbers and moves 2; point shows 5 and takes 2"):
        roll_out(load_policy(point_run), task, 1)
    with pytest.raises(ConfigError, match="0 episodes"):
        roll_out(load_policy(point_run), point_task().task, 0)


@given(count=st.integers(1, 200), data=st.data())
def test_wilson_solves_its_equation(count: int, data: st.DataObject) -> None:
    successes, z = data.draw(st.integers(0, count)), 1.96
    share = successes / count
    for end, other in zip(wilson(successes, count), (0.0, 1.0), strict=True):
        assert 0 <= end <= 1
        exact = abs(abs(share - end) - z * math.sqrt(end * (1 - end) / count)) < 1e-9
        assert exact or end == pytest.approx(other, abs=1e-12)


def test_wilson_refuses_what_is_no_share() -> None:
    with pytest.raises(ConfigError, match="3 successes of 2"):
        wilson(3, 2)


def test_recorded_steps_are_those_of_the_episodes() -> None:
    found = record(point_task().task, 5, first_seed=3)
    demos = found.demonstrations
    assert (found.tried, found.failed, len(demos)) == (5, 0, 5)
    for start, end in zip(demos.starts.tolist(), demos.ends.tolist(), strict=True):
        x, goal = demos.observations[start:end, :2], demos.observations[start:end, 2:]
        moved = (x[:-1] + 0.1 * demos.actions[start : end - 1]).clamp(-1, 1)
        torch.testing.assert_close(moved, x[1:])
        assert (goal == goal[0]).all()
        assert (x[-1] + 0.1 * demos.actions[end - 1] - goal[0]).norm() < 0.1
    assert demos.actions.abs().max() <= 1


def test_failed_demonstrations_are_dropped_and_counted() -> None:
    found = record(point_task(lazy=True, raises_at={1: 2}).task, 6)
    assert len(found.demonstrations) == 6
    assert (found.tried, found.failed, found.errors) == (11, 5, 1)


def test_an_expert_that_mostly_fails_is_refused() -> None:
    blind = point_task(raises_at=dict.fromkeys(range(200), 1))
    with pytest.raises(DataError, match="0 of 10 episodes"):
        record(blind.task, 3)
    with pytest.raises(ConfigError, match="kept for rollouts"):
        record(point_task().task, 3, first_seed=FIRST_TEST_SEED - 1)


def test_the_expert_has_a_row_of_its_own() -> None:
    task = point_task(lazy=True).task
    row = rollout_row(expert_rollout(task, 9), task, "expert", FIRST_TEST_SEED)
    lazy = sum((FIRST_TEST_SEED + k) % 3 == 0 for k in range(9))
    assert (row["successes"], row["steps"], row["latency_ms"]) == (9 - lazy, 0, None)


def test_rows_are_kept_and_replaced(tmp_path: Path) -> None:
    task = point_task().task
    rows = [
        rollout_row(Rollout((Episode(1, success, float(success), 3),)), task, name, 1)
        for name, success in (("a", False), ("b", True), ("a", True))
    ]
    write_rollouts(rows[:2], tmp_path)
    write_rollouts(rows[2:], tmp_path)
    assert [(row["method"], row["success"]) for row in read_rollouts(tmp_path)] == [("b", 1.0), ("a", 1.0)]


def test_a_film_shows_the_episode_from_start_to_end(point_run: Path, tmp_path: Path) -> None:
    policy, task = load_policy(point_run), point_task().task
    episode, pictures = film(policy, task)
    assert episode == roll_out(policy, task, 1).episodes[0]
    assert len(pictures) == episode.steps + 1
    save_film(pictures, tmp_path)
    shown = read_strip(tmp_path)
    assert shown is not None
    assert shown.shape == (8, 3, 16, 16)
    assert (shown[0].permute(1, 2, 0).numpy() == pictures[0]).all()
    assert (shown[-1].permute(1, 2, 0).numpy() == pictures[-1]).all()
    assert (tmp_path / "film.gif").stat().st_size > 0
