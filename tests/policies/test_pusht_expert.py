"""PushT's expert: its geometry by plain definitions, its table against the physics, and that it solves the task."""

import math
from itertools import pairwise

import numpy as np
import pytest

from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.policies.simulation import Vector
from fewstep.policies.tasks.pusht import PUSHT, PushT
from fewstep.policies.tasks.pusht_expert import (
    PushTable,
    PushTExpert,
    Roads,
    compose,
    distance,
    pose_error,
    to_block,
    to_world,
)
from fewstep.policies.tasks.pusht_table import GOAL_POSE, make_table, place


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    pytest.importorskip("gym_pusht")


@pytest.fixture(scope="module")
def expert() -> PushTExpert:
    return PushTExpert()


@pytest.fixture(scope="module")
def pushes(expert: PushTExpert) -> PushTable:
    return expert._table


def solve(expert: PushTExpert, start: int, variation: int, steps: int = PUSHT.max_steps) -> tuple[bool, list[Vector]]:
    simulation = PushT()
    observation = simulation.reset(start)
    expert.begin(variation)
    actions = []
    for _ in range(steps):
        actions.append(expert.act(observation))
        outcome = simulation.step(actions[-1])
        observation = outcome.observation
        if outcome.success:
            return True, actions
    return False, actions


def test_the_distance_is_that_of_the_physics_own_shapes() -> None:
    table = make_table()
    table.reset(seed=0)
    place(table, (500.0, 500.0, 0.0, 0.0, 0.0))
    points = np.random.default_rng(0).uniform([-90.0, -40.0], [90.0, 160.0], (200, 2))
    nearest = [min(shape.point_query(tuple(point)).distance for shape in table.block.shapes) for point in points]
    assert distance(points) == pytest.approx(np.array(nearest), abs=1e-6)


def test_frames_are_those_of_the_physics_and_each_others_inverse() -> None:
    table = make_table()
    table.reset(seed=0)
    pose, point = np.array([200.0, 320.0, 2.5]), np.array([30.0, -70.0])
    place(table, (20.0, 20.0, *pose))
    assert to_world(pose, point) == pytest.approx(np.array(table.block.local_to_world(tuple(point))))
    assert to_block(pose, to_world(pose, point)) == pytest.approx(point)


def test_moves_compose_as_motions_of_the_plane() -> None:
    rng = np.random.default_rng(1)
    pose, first, second = rng.normal(size=(3, 3)) * (50.0, 50.0, 1.0)
    both = compose(np.append(first[:2], first[2]), second)
    assert compose(compose(pose, first), second) == pytest.approx(compose(pose, both))
    assert to_world(compose(pose, first), second[:2]) == pytest.approx(to_world(pose, to_world(first, second[:2])))


def test_the_error_is_the_root_mean_square_distance_over_the_area() -> None:
    x, y = np.meshgrid(np.arange(-59.5, 60), np.arange(0.5, 120))
    area = np.stack([x, y], -1)[distance(np.stack([x, y], -1)) < 0]
    assert len(area) == 6300
    for pose in (GOAL_POSE, np.array([200.0, 300.0, -1.0]), np.array([258.0, 255.0, math.pi / 4 + 0.05])):
        apart = ((to_world(pose, area) - to_world(GOAL_POSE, area)) ** 2).sum(-1)
        assert pose_error(pose) == pytest.approx(math.sqrt(apart.mean()), rel=1e-3, abs=1e-9)


def test_contacts_touch_and_pushes_against_them_move_the_block_away(pushes: PushTable) -> None:
    assert distance(pushes.contacts) == pytest.approx(np.full(len(pushes.contacts), 15.0))
    assert distance(pushes.contacts + pushes.normals) == pytest.approx(np.full(len(pushes.contacts), 16.0), abs=1e-2)
    assert np.abs(pushes.moves[:, 0]).max() < 0.5
    centroid = to_world(pushes.moves[:, 40], np.array([0.0, 45.0])) - (0.0, 45.0)
    assert (-(centroid * pushes.normals).sum(-1) > 1.0).all()


@pytest.mark.parametrize(("contact", "length"), [(3, 40), (20, 25), (45, 60), (60, 12)])
def test_the_table_predicts_pushes_from_any_pose(pushes: PushTable, contact: int, length: int) -> None:
    """The circle, told to go to the push's end by steps of 10 pixels, moves the block as the slow push did."""
    table = make_table()
    table.reset(seed=0)
    pose, line = (
        np.array([280.0, 230.0, 2.2]),
        pushes.contacts[contact] - np.outer([-8, length], pushes.normals[contact]),
    )
    begin, end = to_world(pose, line)
    place(table, (*begin, *pose))
    for share in np.minimum(np.arange(1, 25) * 10 / (length + 8), 1.0):
        table.step(begin + share * (end - begin))
    expected = compose(pose, pushes.moves[contact, length])
    assert np.array([*table.block.position, table.block.angle]) == pytest.approx(expected, abs=1.0)
    assert table.block.angle == pytest.approx(expected[2], abs=0.02)


def test_ways_round_the_block_keep_clear_of_it(expert: PushTExpert) -> None:
    roads: Roads = expert._roads
    start, allowed = np.array([30.0, 60.0]), np.ones(len(roads.nodes), dtype=bool)
    lengths, before = roads.ways(start, allowed)
    assert np.isfinite(lengths).all()
    for node in range(len(roads.nodes)):
        way = [roads.nodes[node]]
        while before[node] >= 0:
            node = int(before[node])
            way.append(roads.nodes[node])
        way.append(start)
        points = np.concatenate([np.linspace(*ends, 50) for ends in pairwise(way)])
        assert distance(points).min() > 14.5
    assert lengths == pytest.approx(np.maximum(lengths, np.sqrt(((roads.nodes - start) ** 2).sum(-1))))


def test_ways_avoid_nodes_that_are_not_allowed(expert: PushTExpert) -> None:
    roads, start = expert._roads, np.array([0.0, -60.0])
    allowed = roads.nodes[:, 0] < 30.0
    lengths, before = roads.ways(start, allowed)
    assert np.isinf(lengths[~allowed]).all()
    assert np.isfinite(lengths[allowed]).all()
    assert all(allowed[node] for node in before if node >= 0)
    free, _ = roads.ways(start, np.ones_like(allowed))
    assert (lengths >= free - 1e-9).all()


@pytest.mark.parametrize("seed", [4, FIRST_TEST_SEED, FIRST_TEST_SEED + 1])
def test_the_expert_solves_the_task(expert: PushTExpert, seed: int) -> None:
    success, actions = solve(expert, seed, seed)
    assert success
    assert len(actions) <= 200
    assert np.array_equal(actions, PUSHT.clip(np.array(actions)))


def test_demonstrations_vary_by_the_seed_alone(expert: PushTExpert) -> None:
    _, first = solve(expert, 17, 3, steps=30)
    _, other = solve(expert, 17, 4, steps=30)
    _, again = solve(expert, 17, 3, steps=30)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first[0].dtype == np.float32


def test_the_expert_finds_its_way_after_a_disturbance(expert: PushTExpert) -> None:
    simulation = PushT()
    observation = simulation.reset(5)
    expert.begin(5)
    for _ in range(25):
        observation = simulation.step(expert.act(observation)).observation
    place(simulation._table, (80.0, 80.0, 330.0, 300.0, 4.0))
    for _ in range(PUSHT.max_steps):
        outcome = simulation.step(expert.act(observation))
        observation = outcome.observation
        if outcome.success:
            return
    pytest.fail(f"covered {outcome.score:.2f}")


def test_a_circle_that_no_way_leads_from_goes_to_the_middle(expert: PushTExpert) -> None:
    expert.begin(0)
    observation = np.array([100.0, 100.0, 5000.0, 5000.0, 0.0], dtype=np.float32)
    assert expert.act(observation).tolist() == [256.0, 256.0]
