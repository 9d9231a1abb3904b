"""Demonstrations from Minari's and robomimic's files: what is read, in which order, and what is refused."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.data.demonstrations.importers import import_minari, import_robomimic
from fewstep.utils.errors import DataError, MissingExtraError

h5py = pytest.importorskip("h5py")

ROBOT_KEYS = ("robot0_eef_pos", "object")


def episode(number: int, steps: int, width: int) -> Any:
    """Rows that tell which episode and step they are from."""
    return 100.0 * number + np.arange(steps)[:, None] + np.arange(width) / 10


def write_minari(folder: Path, lengths: tuple[int, ...] = (3, 5, 2), space: object = None) -> Path:
    """A dataset in Minari's layout, its observations a group with one array inside another; gives the HDF5 file."""
    (folder / "data").mkdir(parents=True)
    file = folder / "data" / "main_data.hdf5"
    with h5py.File(file, "w") as opened:
        for number, steps in enumerate(lengths):
            group = opened.create_group(f"episode_{number}", track_order=True)
            group["observations/position/hand"] = episode(number, steps + 1, 2)
            group["observations/goal"] = -episode(number, steps + 1, 1)
            group["actions"] = episode(number, steps, 2).astype(np.float32)
            for name in ("terminations", "truncations"):
                group[name] = np.zeros(steps, dtype=bool)
            group["rewards"] = np.zeros(steps)
            group.attrs["total_steps"] = steps
    if space is not None:
        about = {"data_format": "hdf5", "action_space": json.dumps(space)}
        (folder / "data" / "metadata.json").write_text(json.dumps(about))
    return file


def write_robomimic(file: Path, lengths: tuple[int, ...] = (3, 5, 2)) -> Path:
    """Demonstrations in robomimic's layout, with a split that leaves out the middle one."""
    with h5py.File(file, "w") as opened:
        for number, steps in enumerate(lengths):
            group = opened.create_group(f"data/demo_{number}")
            group.attrs["num_samples"] = steps
            group["obs/object"] = episode(number, steps, 3)
            group["obs/robot0_eef_pos"] = -episode(number, steps, 2)
            group["obs/agentview_image"] = np.zeros((steps, 8, 8, 3), dtype=np.uint8)
            group["actions"] = episode(number, steps, 4)
            group["dones"] = np.zeros(steps, dtype=np.int64)
        opened["data"].attrs["env_args"] = json.dumps({"env_name": "Lift"})
        opened["mask/train"] = np.array([b"demo_2", b"demo_0"])
    return file


def box(low: list[float], high: list[float]) -> dict[str, object]:
    return {"type": "Box", "dtype": "float32", "shape": [len(low)], "low": low, "high": high}


def test_minari_episodes_follow_each_other_without_their_last_observations(tmp_path: Path) -> None:
    write_minari(tmp_path, space=box([-1.0, -2.0], [300.0, 301.0]))
    found = import_minari(tmp_path, task="pointmaze-ring")
    assert found.ends.tolist() == [3, 8, 10]
    positions = np.concatenate([episode(number, steps, 2) for number, steps in enumerate((3, 5, 2))])
    expected = np.concatenate([-positions[:, :1], positions], axis=1).astype(np.float32)
    assert np.array_equal(found.observations.numpy(), expected)
    assert np.array_equal(found.actions.numpy(), positions.astype(np.float32))
    assert (found.task, found.action_low, found.action_high) == ("pointmaze-ring", (-1.0, -2.0), (300.0, 301.0))


def test_minari_actions_outside_their_own_bounds_are_refused(tmp_path: Path) -> None:
    file = write_minari(tmp_path, space=box([-1.0, -2.0], [1.0, 2.0]))
    with pytest.raises(DataError, match=rf"{file.name}: action 2 of step 2 lies outside its bounds \[-1, 1\]"):
        import_minari(tmp_path)


def test_minari_keys_choose_and_order_the_observations(tmp_path: Path) -> None:
    file = write_minari(tmp_path)
    found = import_minari(file, keys=("position/hand", "goal"))
    alone = import_minari(file, keys=("position/hand",))
    assert found.observations.shape == (10, 3)
    assert torch.equal(found.observations[:, :2], alone.observations)
    assert torch.equal(found.observations[:, 2], -found.observations[:, 0])


def test_minari_observations_may_be_one_array(tmp_path: Path) -> None:
    file = write_minari(tmp_path)
    with h5py.File(file, "a") as opened:
        for number, steps in enumerate((3, 5, 2)):
            del opened[f"episode_{number}/observations"]
            opened[f"episode_{number}/observations"] = episode(number, steps + 1, 4)
    assert import_minari(file).observations.shape == (10, 4)
    with pytest.raises(DataError, match=r"episode_0/observations is one array: leave out the keys goal"):
        import_minari(file, keys=("goal",))


def test_more_than_ten_episodes_keep_their_numbers_order(tmp_path: Path) -> None:
    lengths = tuple(range(1, 13))
    robot = import_robomimic(write_robomimic(tmp_path / "a.hdf5", lengths), ROBOT_KEYS)
    for found in (import_minari(write_minari(tmp_path / "m", lengths)), robot):
        assert found.ends.tolist() == np.cumsum(lengths).tolist()
        assert found.actions[found.starts, 0].tolist() == [100.0 * number for number in range(12)]


@pytest.mark.parametrize(
    "space",
    [
        None,
        {"type": "Discrete", "n": 3, "start": 0},
        box([-1.0], [1.0]),
        box([-np.inf, -1.0], [1.0, 1.0]),
        {"type": "Box", "low": [[-1.0, -1.0]], "high": [[1.0, 1.0]]},
        "no space",
    ],
)
def test_minari_bounds_are_left_out_where_the_space_tells_none(tmp_path: Path, space: object) -> None:
    found = import_minari(write_minari(tmp_path, space=space))
    assert (found.action_low, found.action_high) == ((), ())


def test_minari_datasets_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    write_minari(tmp_path / "maze" / "ring-v0")
    assert len(import_minari("maze/ring-v0")) == 3
    with pytest.raises(DataError, match=r"^maze/other-v0: no such file or folder, nor a Minari dataset under"):
        import_minari("maze/other-v0")


def test_what_minari_itself_writes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari, spaces = pytest.importorskip("minari"), pytest.importorskip("gymnasium").spaces
    collector = pytest.importorskip("minari.data_collector")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    observed = {"b": spaces.Box(-1, 1, (2,)), "a": spaces.Dict({"c": spaces.Box(-1, 1, (1,))})}
    buffers = [
        collector.EpisodeBuffer(
            id=number,
            observations={"b": episode(number, steps + 1, 2), "a": {"c": episode(number, steps + 1, 1)}},
            actions=episode(number, steps, 3),
            rewards=np.zeros(steps),
            terminations=np.zeros(steps, dtype=bool),
            truncations=np.zeros(steps, dtype=bool),
            infos=None,
        )
        for number, steps in enumerate((3, 5))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses an environment, an author, a permalink
        minari.create_dataset_from_buffers(
            "ring/own-v0", buffers, observation_space=spaces.Dict(observed), action_space=spaces.Box(-200, 200, (3,))
        )
    found = import_minari("ring/own-v0")
    assert found.ends.tolist() == [3, 8]
    assert found.observations[3].tolist() == pytest.approx([100.0, 100.0, 100.1])
    assert (found.action_low, found.action_high) == ((-200.0,) * 3, (200.0,) * 3)


def test_robomimic_keys_are_set_side_by_side_in_their_order(tmp_path: Path) -> None:
    found = import_robomimic(write_robomimic(tmp_path / "a.hdf5"), ROBOT_KEYS, task="lift")
    rows = np.concatenate([episode(number, steps, 3) for number, steps in enumerate((3, 5, 2))])
    expected = np.concatenate([-rows[:, :2], rows], axis=1).astype(np.float32)
    assert np.array_equal(found.observations.numpy(), expected)
    assert (found.ends.tolist(), found.actions.shape, found.task) == ([3, 8, 10], (10, 4), "lift")
    assert (found.action_low, found.action_high) == ((), ())


def test_robomimic_splits_choose_episodes(tmp_path: Path) -> None:
    file = write_robomimic(tmp_path / "a.hdf5")
    found = import_robomimic(file, ROBOT_KEYS, split="train")
    assert found.ends.tolist() == [3, 5]
    assert found.actions[3, 0] == 200.0
    with pytest.raises(DataError, match=r"mask has no 'valid'; there are: train$"):
        import_robomimic(file, ROBOT_KEYS, split="valid")
    with h5py.File(file, "a") as opened:
        del opened["data/demo_2"]
    with pytest.raises(DataError, match=r"lists demo_2 in its split but has no such episode$"):
        import_robomimic(file, ROBOT_KEYS, split="train")


def replace(name: str, values: object) -> Callable[[Any], None]:
    def change(opened: Any) -> None:
        del opened[name]
        if values is not None:
            opened[name] = values

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (replace("episode_1/actions", None), "episode_1 has no 'actions'; there are: observations, rewards"),
        (replace("episode_1/observations", None), "episode_1 has no 'observations'; there are: actions, rewards"),
        (replace("episode_1/actions", episode(1, 6, 2)), "has 6 steps for 6 actions, not 7, one more"),
        (replace("episode_1/actions", np.zeros((5, 3))), r"episode 1 .* = \(3, 3\) but the first has \(3, 2\)"),
        (replace("episode_1/actions", np.zeros(5, dtype=np.int64)), "actions is int64 .* vector of floats"),
        (replace("episode_1/actions", np.zeros((0, 2))), r"actions is float64 of shape \(0, 2\)"),
        (replace("episode_1/observations/goal", np.full((6, 1), np.nan)), "episode_1/observations/goal .* not finite"),
        (replace("episode_1/actions", np.full((5, 2), 1e39)), "episode_1/actions .* not finite"),
        (replace("episode_1/observations/goal", np.zeros((4, 1))), "arrays of 4, 6 steps: drop the episode"),
        (replace("episode_1/observations/goal", np.zeros((6, 4, 4, 3), np.uint8)), "pictures are not read"),
        (replace("episode_1/observations/goal", np.zeros((6, 9), np.uint8)), "pictures are not read"),
    ],
)
def test_bad_minari_episodes_are_named(tmp_path: Path, change: Callable[[Any], None], complaint: str) -> None:
    file = write_minari(tmp_path)
    with h5py.File(file, "a") as opened:
        change(opened)
    with pytest.raises(DataError, match=complaint) as refusal:
        import_minari(tmp_path)
    assert str(refusal.value).startswith(f"{file}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (replace("data/demo_1/obs/object", None), "obs has no 'object'; there are: agentview_image, robot0_eef_pos"),
        (replace("data/demo_1/obs", None), "demo_1 has no 'obs'; there are: actions, dones"),
        (replace("data/demo_1/actions", np.zeros((4, 4))), "has 4 actions but num_samples says 5"),
        (replace("data/demo_1/obs/object", np.zeros((6, 3))), "arrays of 5, 6 steps"),
        (replace("data/demo_1/obs/object", np.full((5, 3), np.inf)), "demo_1/obs/object .* not finite"),
        (replace("data", None), "has no 'data'; there are: mask"),
    ],
)
def test_bad_robomimic_episodes_are_named(tmp_path: Path, change: Callable[[Any], None], complaint: str) -> None:
    file = write_robomimic(tmp_path / "a.hdf5")
    with h5py.File(file, "a") as opened:
        change(opened)
    with pytest.raises(DataError, match=complaint) as refusal:
        import_robomimic(file, ROBOT_KEYS)
    assert str(refusal.value).startswith(str(file))


def test_robomimic_observations_of_another_length_than_the_actions_are_refused(tmp_path: Path) -> None:
    file = write_robomimic(tmp_path / "a.hdf5")
    with h5py.File(file, "a") as opened:
        replace("data/demo_1/obs/object", np.zeros((6, 3)))(opened)
    with pytest.raises(DataError, match=r"demo_1/obs has 6 steps for 5 actions, not 5$"):
        import_robomimic(file, ("object",))


@pytest.mark.parametrize("read", [import_minari, import_robomimic])
def test_files_that_are_not_whole_hdf5_are_refused_by_name(tmp_path: Path, read: Callable[[Path], object]) -> None:
    whole = write_robomimic(tmp_path / "whole.hdf5", (400, 400)).read_bytes()
    for content, complaint in (
        (b"", "is not an HDF5 file"),
        (b"text", "is not an HDF5 file"),
        (whole[: len(whole) // 2], "is damaged or cut short"),
    ):
        file = tmp_path / "bad.hdf5"
        file.write_bytes(content)
        with pytest.raises(DataError, match=complaint) as refusal:
            read(file)
        assert str(refusal.value).startswith(str(file))
        assert "\n" not in str(refusal.value)
    with pytest.raises(DataError, match=r"absent\.hdf5: no such file"):
        read(tmp_path / "absent.hdf5")


def test_files_of_the_other_kind_and_empty_folders_are_refused(tmp_path: Path) -> None:
    file = write_robomimic(tmp_path / "a.hdf5")
    with pytest.raises(DataError, match=r"has no groups episode_0, episode_1, \.\.\.; there are: data, mask$"):
        import_minari(file)
    with pytest.raises(DataError, match=r"has no data/main_data\.hdf5: give a Minari dataset in its HDF5 format$"):
        import_minari(tmp_path)


def test_a_group_among_robomimic_keys_is_refused(tmp_path: Path) -> None:
    file = write_robomimic(tmp_path / "a.hdf5")
    with h5py.File(file, "a") as opened:
        opened["data/demo_0/obs/robot/arm"] = np.zeros((3, 2))
    with pytest.raises(DataError, match=r"obs/robot is a group of arm: name one of its arrays$"):
        import_robomimic(file, ("robot",))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_robomimic(tmp_path / "a.hdf5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError, match=r"needs h5py: pip install .*h5py.*\[policy\]"):
        import_robomimic(file)
