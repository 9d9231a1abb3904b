"""Fetch behind a block: two ways round, both of the expert's, and between them a mean that does not arrive."""

import numpy as np
import pytest

from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.policies.simulation import Simulation, Vector
from fewstep.policies.tasks.fetch import push
from fewstep.policies.tasks.fetch_retrieve import RETRIEVE, retrieve


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    pytest.importorskip("gymnasium_robotics")


STARTS = range(FIRST_TEST_SEED, FIRST_TEST_SEED + 20)


@pytest.fixture
def simulation() -> Simulation:
    return RETRIEVE.make(False)


def test_the_block_is_to_come_back_towards_the_hand(simulation: Simulation) -> None:
    for start in STARTS:
        observation = simulation.reset(start).astype(np.float64)
        to_hand, to_goal = observation[:2] - observation[3:5], observation[25:27] - observation[3:5]
        way = np.linalg.norm(to_goal)
        assert 0.12 - 1e-6 < way < 0.18 + 1e-6
        assert to_hand @ to_goal >= (np.cos(0.3) - 1e-5) * way * np.linalg.norm(to_hand)
        assert observation[27] == pytest.approx(observation[5])
        assert np.array_equal(simulation.reset(start), observation.astype(np.float32))


def test_the_expert_goes_the_way_it_draws_and_arrives(simulation: Simulation) -> None:
    assert RETRIEVE.expert is not None
    expert, routes, solved = RETRIEVE.expert(), [], 0
    for start in STARTS:
        expert.begin(start)
        observation = simulation.reset(start)
        for _ in range(RETRIEVE.max_steps // 2):
            outcome = simulation.step(expert.act(observation))
            observation = outcome.observation
            if outcome.success:
                break
        solved += outcome.success
        routes.append(simulation.route())
        assert routes[-1] == ("counterclockwise" if expert.sense > 0 else "clockwise")  # type: ignore[attr-defined]
    assert solved >= 19
    assert min(routes.count("clockwise"), routes.count("counterclockwise")) >= 5


def mean_of_both(observation: Vector) -> Vector:
    ways = [np.clip(retrieve(observation, sense), -1, 1) for sense in (-1.0, 1.0)]
    return (ways[0] + ways[1]) / 2


def test_the_mean_of_both_ways_does_not_arrive(simulation: Simulation) -> None:
    solved = 0
    for start in STARTS[:10]:
        observation = simulation.reset(start)
        for _ in range(RETRIEVE.max_steps):
            outcome = simulation.step(mean_of_both(observation))
            observation = outcome.observation
            if outcome.success:
                break
        solved += outcome.success
    assert solved <= 2


@pytest.mark.parametrize(("sense", "name"), [(1.0, "counterclockwise"), (-1.0, "clockwise")])
def test_a_way_is_taken_once_the_hand_has_gone_a_quarter_round(simulation: Simulation, sense: float, name: str) -> None:
    assert simulation.route() == ""
    observation = simulation.reset(FIRST_TEST_SEED)
    begun, turned, routes = observation[:2] - observation[3:5], [], []
    for _ in range(12):
        observation = simulation.step(np.clip(retrieve(observation, sense), -1, 1)).observation
        off = observation[:2] - observation[3:5]
        turned.append(float(np.arctan2(begun[0] * off[1] - begun[1] * off[0], begun @ off)))
        routes.append(simulation.route())
    before = [abs(turn) < np.pi / 2 for turn in turned].index(False)
    assert before > 2
    assert routes == [""] * before + [name] * (12 - before)
    assert turned[before] * sense > 0
    assert simulation.reset(FIRST_TEST_SEED) is not None
    assert simulation.route() == ""


def test_over_the_block_is_neither_way(simulation: Simulation) -> None:
    for start in STARTS[:5]:
        observation = simulation.reset(start)
        for _ in range(RETRIEVE.max_steps):
            outcome = simulation.step(np.clip(push(observation), -1, 1))
            observation = outcome.observation
            if outcome.success:
                break
        assert outcome.success
        assert simulation.route() == ""
