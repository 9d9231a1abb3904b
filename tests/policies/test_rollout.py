"""Rollouts: lockstep equals one by one, failing simulations, the interval, experts and what they record."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.policies.figures import read_rollouts, read_strip, rollout_row, rollout_table, save_film, write_rollouts
from fewstep.policies.policy import load_policy
from fewstep.policies.rollout import Rollout, expert_rollout, film, record, roll_out, wilson
from fewstep.policies.running import Episode
from fewstep.policies.simulation import Outcome, Picture, Simulation, Vector
from fewstep.utils.errors import CheckpointError, ConfigError, DataError, UnsupportedError
from tests.support.pointtask import PointExpert, PointSimulation, point_task


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
    left = sum(bool(goal < 0) for goal in demos.observations[demos.starts, 2])
    assert found.routes == {name: n for name, n in (("left", left), ("right", 5 - left)) if n}
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
    assert (found.tried, found.failed) == (11, 5)
    assert found.errors == ("start 1: RuntimeError: the arm fell off",)


def test_an_expert_that_mostly_fails_is_refused() -> None:
    blind = point_task(raises_at=dict.fromkeys(range(200), 1))
    with pytest.raises(DataError, match=r"0 of 10 episodes.*the arm fell off"):
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


class Broken(PointSimulation):
    """Fails where it is told to, and from then on for good."""

    def __init__(self, where: str, seed: int) -> None:
        super().__init__()
        self.where, self.at, self.dead = where, seed, False

    def fail(self, where: str) -> None:
        if self.dead or (where == self.where and self.seed == self.at):
            self.dead = True
            raise RuntimeError(f"lost in {where}")

    def reset(self, seed: int) -> Vector:
        seen = super().reset(seed)
        self.fail("reset")
        return seen

    def step(self, action: Vector) -> Outcome:
        self.fail("step")
        outcome = super().step(action)
        if self.where == "size" and self.seed == self.at:
            return replace(outcome, observation=outcome.observation[:3])
        if self.where == "huge" and self.seed == self.at:
            return replace(outcome, observation=np.full(4, 3e38, np.float32))
        if self.where == "infinite" and self.seed == self.at:
            return replace(outcome, observation=np.full(4, 1e39))
        return outcome

    def route(self) -> str:
        self.fail("route")
        return super().route()

    def render(self) -> Picture:
        self.fail("render")
        return super().render()

    def close(self) -> None:
        raise RuntimeError("no way out")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("reset", "lost in reset"),
        ("step", "lost in step"),
        ("route", "lost in route"),
        ("size", r"shape \(3,\): point has \(4,\)"),
        ("huge", "actions after observation 0 are not finite"),
        ("infinite", "an observation is not finite"),
    ],
)
def test_one_episode_fails_alone_and_its_simulation_is_replaced(point_run: Path, where: str, said: str) -> None:
    bad = FIRST_TEST_SEED + 1
    task = replace(point_task().task, make=lambda _: Broken(where, bad))
    found = roll_out(load_policy(point_run), task, 6, at_once=2)
    usual = roll_out(load_policy(point_run), point_task().task, 6, at_once=2)
    assert [episode.seed for episode in found.errors] == [bad]
    assert re.search(said, found.errors[0].error)
    assert found.episodes[2:] == usual.episodes[2:]
    if where != "route":
        with pytest.raises(UnsupportedError, match="no film of point"):
            film(load_policy(point_run), task, bad)


@pytest.mark.parametrize("at_once", [2, 6])
def test_a_simulation_that_cannot_be_made_again_costs_its_episodes_alone(point_run: Path, at_once: int) -> None:
    bad, made = FIRST_TEST_SEED + 1, list[bool]()

    def make(_: bool) -> Simulation:
        made.append(len(made) < at_once)
        if not made[-1]:
            raise RuntimeError("out of licences")
        return Broken("step", bad)

    found = roll_out(load_policy(point_run), replace(point_task().task, make=make), 6, at_once=at_once)
    lost = {bad: "RuntimeError: lost in step"}
    if at_once == 2:  # the second place of the two batches that follow
        lost |= dict.fromkeys((bad + 2, bad + 4), "RuntimeError: out of licences")
    assert {episode.seed: episode.error for episode in found.errors} == lost
    assert made.count(False) == len(lost) - 1  # none is made that no episode needs


@pytest.mark.parametrize("error", [RuntimeError("no display"), UnsupportedError("no display")])
def test_a_task_that_cannot_be_simulated_at_all_is_one_line(point_run: Path, error: Exception) -> None:
    def make(_: bool) -> Simulation:
        raise error

    with pytest.raises(UnsupportedError, match="no display"):
        roll_out(load_policy(point_run), replace(point_task().task, make=make), 2)


def test_a_picture_that_cannot_be_drawn_is_one_line(point_run: Path) -> None:
    task = replace(point_task().task, make=lambda _: Broken("render", FIRST_TEST_SEED))
    with pytest.raises(UnsupportedError, match="no film of point: RuntimeError: lost in render"):
        film(load_policy(point_run), task)


def test_the_film_is_of_the_measured_episode(point_run: Path) -> None:
    policy, task = load_policy(point_run), point_task().task
    measured = roll_out(policy, task, 3, first_seed=40).episodes
    assert film(policy, task, 42)[0] == measured[2]
    with pytest.raises(ConfigError, match="from start -5"):
        roll_out(policy, task, 1, first_seed=-5)


class Stumbling(PointExpert):
    """Raises at the start 2, and has no number to offer at the start 4."""

    def begin(self, seed: int) -> None:
        super().begin(seed)
        self.seed = seed
        if seed == 2:
            raise ValueError("no plan")

    def act(self, observation: Vector) -> Vector:
        return np.full(2, np.nan, np.float32) if self.seed == 4 else super().act(observation)


def test_an_expert_that_stumbles_costs_its_episode_alone() -> None:
    found = record(replace(point_task().task, expert=Stumbling), 5)
    assert found.errors == ("start 2: ValueError: no plan", "start 4: an action is not finite")
    assert (found.tried, len(found.demonstrations)) == (7, 5)


class Ending(PointSimulation):
    """Cannot go on after three steps."""

    def step(self, action: Vector) -> Outcome:
        assert self.steps < 3
        return replace(super().step(0 * action), ended=self.steps == 3)


class Comparing(PointSimulation):
    """Says what comparisons of NumPy's arrays give: its own bools and float32."""

    def step(self, action: Vector) -> Outcome:
        found = super().step(action)
        return Outcome(found.observation, np.bool_(found.success), np.float32(found.score), np.bool_(found.ended))  # type: ignore[arg-type]


def test_numbers_of_numpy_are_taken_and_stored(tmp_path: Path) -> None:
    task = point_task().task
    plain, comparing = (expert_rollout(each, 3) for each in (task, replace(task, make=lambda _: Comparing())))
    assert comparing.episodes == plain.episodes
    assert {type(episode.success) for episode in comparing.episodes} == {bool}
    write_rollouts([rollout_row(comparing, task, "expert", FIRST_TEST_SEED)], tmp_path)
    assert read_rollouts(tmp_path)[0]["successes"] == 3


def test_an_ended_simulation_is_not_stepped(point_run: Path) -> None:
    task = replace(point_task().task, make=lambda _: Ending())
    assert expert_rollout(task, 2).episodes == tuple(
        Episode(FIRST_TEST_SEED + k, False, 0.0, 3, ending_route(FIRST_TEST_SEED + k)) for k in range(2)
    )
    assert all(
        (episode.steps, episode.error) == (3, "") for episode in roll_out(load_policy(point_run), task, 3).episodes
    )


def ending_route(seed: int) -> str:
    simulation = Ending()
    simulation.reset(seed)
    return simulation.route()


def test_damaged_rows_and_strips_are_named(tmp_path: Path) -> None:
    (tmp_path / "rollouts.json").write_text("[{}]")
    with pytest.raises(CheckpointError, match=r"rollouts\.json is damaged"):
        read_rollouts(tmp_path)
    Image.new("RGB", (13, 4)).save(tmp_path / "filmstrip.png")
    with pytest.raises(CheckpointError, match="no strip of 8"):
        read_strip(tmp_path)
    (tmp_path / "filmstrip.png").write_bytes(b"no picture")
    with pytest.raises(CheckpointError, match="damaged"):
        read_strip(tmp_path)
