"""What every MuJoCo task owes: equal episodes for equal seeds and actions, in any order; packages only when made."""

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.policies import tasks
from fewstep.policies.simulation import Simulation, Task, Vector
from fewstep.policies.tasks.fetch import FETCH_TASKS
from fewstep.policies.tasks.fetch_retrieve import RETRIEVE
from fewstep.policies.tasks.metaworld import METAWORLD_TASKS
from fewstep.policies.tasks.mujoco import EXPERT_NOISE, HEIGHT, WIDTH, NoisyExpert, packages_of
from fewstep.policies.tasks.registry import find_task
from fewstep.utils.errors import MissingExtraError, UnsupportedError

TASKS = {task.name: task for task in (*METAWORLD_TASKS, *FETCH_TASKS, RETRIEVE)}
PACKAGES = ("metaworld", "gymnasium_robotics", "gymnasium", "mujoco")


def require_packages(task: Task) -> None:
    pytest.importorskip("metaworld" if task in METAWORLD_TASKS else "gymnasium_robotics")


@pytest.fixture(scope="module", params=TASKS.values(), ids=TASKS)
def made(request: pytest.FixtureRequest) -> Iterator[tuple[Task, Simulation]]:
    """A task and a simulation of it that all its tests share, so that each finds it used."""
    task: Task = request.param
    require_packages(task)
    simulation = task.make(False)
    yield task, simulation
    simulation.close()


def wander(simulation: Simulation, start: int, seed: int, steps: int = 25) -> np.ndarray:
    """Observations (steps + 1, Do) from a start under random actions that `seed` draws."""
    actions = np.random.default_rng(seed).uniform(-1, 1, (steps, 4)).astype(np.float32)
    return np.array([simulation.reset(start), *(simulation.step(action).observation for action in actions)])


def test_equal_seeds_and_actions_give_equal_episodes_in_any_order(made: tuple[Task, Simulation]) -> None:
    task, simulation = made
    episode = wander(simulation, start=7, seed=0)
    assert episode.shape == (26, task.observation_size)
    assert episode.dtype == np.float32
    wander(simulation, start=FIRST_TEST_SEED + 7, seed=1, steps=40)
    wander(simulation, start=8, seed=2, steps=3)
    np.random.seed(1)
    np.testing.assert_array_equal(wander(simulation, start=7, seed=0), episode)
    np.testing.assert_array_equal(wander(task.make(False), start=7, seed=0), episode)
    assert np.random.random() == np.random.RandomState(1).random(), "numpy's global generator was drawn from"
    assert not np.array_equal(wander(simulation, start=7, seed=1)[1:], episode[1:])


def test_no_two_starts_are_the_same_in_demonstrations_and_tests(made: tuple[Task, Simulation]) -> None:
    _, simulation = made
    starts = [simulation.reset(first + seed) for first in (0, FIRST_TEST_SEED) for seed in range(6)]
    assert len(np.unique(starts, axis=0)) == len(starts)


@pytest.mark.parametrize(("name", "steps"), [("metaworld-assembly", 500), ("fetch-push", 50)])
def test_an_episode_may_outlast_the_packages_limit(name: str, steps: int) -> None:
    require_packages(TASKS[name])
    simulation = TASKS[name].make(False)
    simulation.reset(0)
    assert not any(simulation.step(np.zeros(4, dtype=np.float32)).ended for _ in range(steps + 5))


def test_an_expert_varies_with_its_seed_alone(made: tuple[Task, Simulation]) -> None:
    task, simulation = made
    assert task.expert is not None
    expert, start = task.expert(), simulation.reset(0)

    def act(seed: int) -> Vector:
        expert.begin(seed)
        return np.array([expert.act(start) for _ in range(5)])

    actions = act(4)
    assert actions.shape == (5, task.action_size)
    assert actions.dtype == np.float32
    np.testing.assert_array_equal(task.clip(actions), actions)
    np.testing.assert_array_equal(act(4), actions)
    assert not np.array_equal(act(5), actions)


def test_no_picture_is_drawn_unless_asked_for(made: tuple[Task, Simulation]) -> None:
    _, simulation = made
    with pytest.raises(UnsupportedError, match="render=True"):
        simulation.render()


@pytest.mark.parametrize("name", ["metaworld-pick-place", "fetch-pick-and-place", "fetch-retrieve"])
def test_drawing_changes_nothing(name: str) -> None:
    task = TASKS[name]
    require_packages(task)
    drawn, plain = task.make(True), task.make(False)
    np.testing.assert_array_equal(drawn.reset(5), plain.reset(5))
    try:
        picture = drawn.render()
    except UnsupportedError:
        pytest.skip("nothing here can draw")
    assert picture.shape == (HEIGHT, WIDTH, 3)
    assert picture.std() > 10
    assert task.expert is not None
    expert, seen = task.expert(), plain.reset(5)
    for _ in range(30):  # the expert grasps, which the least change would show
        action = expert.act(seen)
        outcome = drawn.step(action)
        drawn.render()
        seen = plain.step(action).observation
        np.testing.assert_array_equal(outcome.observation, seen)
    assert not np.array_equal(drawn.render(), picture)
    drawn.close()


class NoWindow:
    """What MuJoCo's default drawing library leaves where there is no screen."""

    _context = None

    def __init__(self, *_: int) -> None:
        pass


class NoDisplay:
    """What its others do."""

    def __init__(self, *_: int) -> None:
        raise RuntimeError("no\ndisplay")


@pytest.mark.parametrize(("library", "reason"), [(NoWindow, "there is no screen"), (NoDisplay, "no display")])
def test_where_nothing_can_draw_one_line_says_so(library: type, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gymnasium_robotics")
    simulation = TASKS["fetch-push"].make(True)
    simulation.reset(0)
    monkeypatch.setattr(pytest.importorskip("mujoco").gl_context, "GLContext", library)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=rf"drawn here \({reason}\); set MUJOCO_GL"):
            simulation.render()
    simulation.step(np.zeros(4, dtype=np.float32))
    simulation.close()


def test_the_noise_of_an_expert_has_its_scale_and_stays_in_bounds() -> None:
    middle, edge = (NoisyExpert(lambda _, value=value: np.full(4, value, dtype=np.float32)) for value in (0.0, 5.0))
    drawn = np.array([middle.act(np.zeros(3, dtype=np.float32)) for _ in range(2000)])
    assert abs(drawn.std() - EXPERT_NOISE) < 0.05 * EXPERT_NOISE
    assert abs(drawn.mean()) < 0.05 * EXPERT_NOISE
    drawn = np.array([edge.act(np.zeros(3, dtype=np.float32)) for _ in range(2000)])
    assert drawn.max() == 1
    # E max(0, -z) = 1 / sqrt(2 pi): noise is added to what is clipped already, else it would never show.
    assert abs((1 - drawn).mean() - EXPERT_NOISE / np.sqrt(2 * np.pi)) < 0.1 * EXPERT_NOISE


@pytest.mark.parametrize("module", ["mujoco", "metaworld", "fetch", "fetch_retrieve"])
def test_the_tasks_are_known_without_their_packages(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    assert runpy.run_path(str(Path(tasks.__file__).with_name(f"{module}.py")))["np"] is np


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("metaworld-hammer", "metaworld.env_dict", "metaworld"),
        ("fetch-push", "gymnasium_robotics.envs.fetch.push", "gymnasium-robotics"),
        ("fetch-retrieve", "gymnasium_robotics.envs.fetch.push", "gymnasium-robotics"),
        ("fetch-pick-and-place", "gymnasium_robotics.envs.fetch.pick_and_place", "gymnasium-robotics"),
    ],
)
def test_an_absent_package_is_named_with_the_extra_that_brings_it(
    name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for absent in (module, module.partition(".")[0]):
        monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(
        MissingExtraError, match=rf"{name} needs {package}: pip install .* \(the extra \[policy\]\)"
    ) as caught:
        TASKS[name].make(False)
    assert "\n" not in str(caught.value)


def test_an_absent_package_is_named_when_an_expert_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld.policies", None)
    expert = TASKS["metaworld-push"].expert
    assert expert is not None
    with pytest.raises(MissingExtraError, match="metaworld-push needs metaworld"):
        expert()


def test_a_drawing_library_that_does_not_load_is_no_missing_package(capsys: pytest.CaptureFixture[str]) -> None:
    told = pytest.raises(UnsupportedError, match=r"metaworld \('NoneType' has no glGetError\); set MUJOCO_GL")
    with told, packages_of("a-task", "metaworld"):
        raise AttributeError("'NoneType'\nhas no glGetError")
    with packages_of("a-task", "metaworld"):
        print("news", file=sys.stderr)
    assert capsys.readouterr().err == ""


def test_the_registry_has_them_all() -> None:
    assert all(find_task(name) is task for name, task in TASKS.items())
