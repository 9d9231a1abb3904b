"""Demonstrations that others recorded: Minari's datasets and robomimic's files.

Both keep one HDF5 group per episode, so h5py alone reads them; neither package need be installed, and nothing is ever
fetched. Pictures are left aside: policies here observe vectors.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.data.base import source_path
from fewstep.data.demonstrations.episodes import Demonstrations
from fewstep.utils.errors import DataError, MissingExtraError
from fewstep.utils.files import parse_json

ROBOMIMIC_KEYS = ("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
"""What robomimic's own policies observe where they see no pictures."""

_MAIN_FILE = "main_data.hdf5"
_Rows = NDArray[np.float32]
_Bounds = tuple[float, ...]


def import_minari(source: Path | str, keys: Sequence[str] = (), task: str = "") -> Demonstrations:
    """A Minari dataset on this machine, by its name (such as D4RL/pointmaze/umaze-v2), folder, or main_data.hdf5.

    `episode_<i>` holds `observations`, an array (T + 1, Do) or a group of them, and `actions` (T, Da); the observation
    after the last action is dropped. Of a group the arrays named by `keys` are set side by side, all in sorted order
    when none is named (one inside another is `outer/inner`). Bounds come from the action space in metadata.json.
    Raises DataError naming the file, and the episode or array, for what cannot be such data; MissingExtraError without
    h5py. Source: Minari's dataset standard, docs "Dataset Standards".
    """
    file = _minari_file(source)

    def read(name: str, group: Any) -> tuple[_Rows, _Rows]:
        where = f"{file}: {name}"
        actions = _rows(_member(group, "actions", where), f"{where}/actions", floats=True)
        observations = _observations(_member(group, "observations", where), keys, f"{where}/observations")
        _check_length(observations, len(actions) + 1, len(actions), f"{where}/observations", ", one more")
        return observations[:-1], actions

    with _opened(file) as opened:
        episodes = _episodes(opened, "episode_", file, read)
    return _joined(file, episodes, task, *_minari_bounds(file.with_name("metadata.json")))


def import_robomimic(
    source: Path | str, keys: Sequence[str] = ROBOMIMIC_KEYS, split: str = "", task: str = ""
) -> Demonstrations:
    """A robomimic file: `data/demo_<i>/obs/<key>` (T, ...) and `data/demo_<i>/actions` (T, Da), bounds unknown.

    keys: observations set side by side in this order. split: the name of a list under `mask`, such as train; empty for
    all episodes. Raises DataError naming the file, and the episode or array, for what cannot be such data;
    MissingExtraError without h5py. Source: robomimic's docs, "Dataset Contents and Visualization".
    """
    file = source_path(source)

    def read(name: str, group: Any) -> tuple[_Rows, _Rows]:
        where = f"{file}: data/{name}"
        actions = _rows(_member(group, "actions", where), f"{where}/actions", floats=True)
        promised = np.asarray(group.attrs.get("num_samples", len(actions)))
        if promised.shape != () or promised != len(actions):
            raise DataError(f"{where} has {len(actions)} actions but num_samples says {promised}: drop the episode")
        observations = _observations(_member(group, "obs", where), keys, f"{where}/obs")
        _check_length(observations, len(actions), len(actions), f"{where}/obs", "")
        return observations, actions

    with _opened(file) as opened:
        chosen = _split(opened, split, file) if split else None
        episodes = _episodes(_member(opened, "data", str(file)), "demo_", file, read, chosen)
    return _joined(file, episodes, task, (), ())


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The HDF5 file, its failures turned into DataError; h5py tells of truncation with OSError, KeyError and more."""
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError(f"reading {file} needs h5py: pip install 'fewstep[policy]' ({error})") from error
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    if not h5py.is_hdf5(file):
        raise DataError(f"{file} is not an HDF5 file: give a Minari dataset's {_MAIN_FILE}, or a robomimic .hdf5")
    try:
        with h5py.File(file, "r") as opened:
            yield opened
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise DataError(f"{file} is damaged or cut short ({' '.join(str(error).split())}): copy it again") from error


def _minari_file(source: Path | str) -> Path:
    home = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")
    for place in (source_path(source), home / source):
        if place.is_file():
            return place
        for file in (place / "data" / _MAIN_FILE, place / _MAIN_FILE):
            if file.is_file():
                return file
        if place.is_dir():
            raise DataError(f"{place} has no data/{_MAIN_FILE}: give a Minari dataset in its HDF5 format")
    raise DataError(f"{source}: no such file or folder, nor a Minari dataset under {home}")


def _minari_bounds(file: Path) -> tuple[_Bounds, _Bounds]:
    """The action space's (Da,) bounds, where metadata.json tells them and all are finite; it is optional."""
    try:
        space = parse_json(parse_json(file.read_bytes())["action_space"])
        bounds = np.array([space["low"], space["high"]], dtype=np.float64)
    except (OSError, ValueError, KeyError, TypeError):
        return (), ()
    if bounds.ndim != 2 or not np.isfinite(bounds).all():
        return (), ()
    return tuple(bounds[0].tolist()), tuple(bounds[1].tolist())


def _episodes(
    group: Any,
    prefix: str,
    file: Path,
    read: Callable[[str, Any], tuple[_Rows, _Rows]],
    chosen: Sequence[str] | None = None,
) -> list[tuple[_Rows, _Rows]]:
    """What `read` makes of each group whose name is the prefix and a number, in the numbers' order."""
    names = [name for name in group if name.startswith(prefix) and name.removeprefix(prefix).isdecimal()]
    if chosen is not None:
        absent = sorted(set(chosen) - set(names))
        if absent:
            raise DataError(f"{file} lists {absent[0]} in its split but has no such episode")
        if not chosen:
            raise DataError(f"{file} lists no episodes in its split: name another, or take all")
        names = list(chosen)
    if not names:
        raise DataError(f"{file} has no groups {prefix}0, {prefix}1, ...; there are: {_listed(group)}")
    names.sort(key=lambda name: int(name.removeprefix(prefix)))
    return [read(name, group[name]) for name in names]


def _split(opened: Any, split: str, file: Path) -> list[str]:
    masks = _member(opened, "mask", str(file))
    names = np.asarray(_member(masks, split, f"{file}: mask")).ravel().tolist()
    return sorted({name.decode() if isinstance(name, bytes) else str(name) for name in names})


def _member(group: Any, name: str, where: str) -> Any:
    if not _is_group(group) or name not in group:
        raise DataError(f"{where} has no '{name}'; there are: {_listed(group)}")
    return group[name]


def _is_group(node: Any) -> bool:
    import h5py

    return isinstance(node, h5py.Group)


def _is_array(node: Any) -> bool:
    import h5py

    return isinstance(node, h5py.Dataset)


def _listed(group: Any) -> str:
    names = sorted(group) if _is_group(group) else []
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "nothing"


def _observations(node: Any, keys: Sequence[str], where: str) -> _Rows:
    """One array (T, Do), or those of a group side by side."""
    if not _is_group(node):
        if keys:
            raise DataError(f"{where} is one array: leave out the keys {', '.join(keys)}")
        return _rows(node, where)
    parts = [_rows(_member(node, key, where), f"{where}/{key}") for key in keys or _leaves(node)]
    if not parts:
        raise DataError(f"{where} holds no arrays")
    if len({len(part) for part in parts}) > 1:
        raise DataError(
            f"{where} holds arrays of {', '.join(str(len(part)) for part in parts)} steps: drop the episode"
        )
    return np.concatenate(parts, axis=1)


def _leaves(group: Any) -> list[str]:
    names: list[str] = []
    group.visititems(lambda name, node: None if _is_group(node) else names.append(name))
    return sorted(names)


def _rows(node: Any, where: str, floats: bool = False) -> _Rows:
    """An array (T,) or (T, D) as (T, D) float32. Unsigned bytes are pictures; whole numbers as actions are choices."""
    if _is_group(node):
        raise DataError(f"{where} is a group of {_listed(node)}: name one of its arrays")
    if not _is_array(node):
        raise DataError(f"{where} is no array: name one of the arrays beside it")
    kinds = "f" if floats else "fib"
    if node.dtype.kind not in kinds or len(node.shape) not in (1, 2) or 0 in node.shape:
        raise DataError(
            f"{where} is {node.dtype} of shape {node.shape}: a policy needs one vector of "
            f"{'floats' if floats else 'numbers'} per step; pictures are not read"
        )
    values = np.asarray(node[()], dtype=np.float64)
    if not (np.abs(values) <= np.finfo(np.float32).max).all():
        raise DataError(f"{where} has numbers that are not finite: repair or drop the episode")
    return values.reshape(len(values), -1).astype(np.float32)


def _check_length(observations: _Rows, wanted: int, actions: int, where: str, more: str) -> None:
    if len(observations) != wanted:
        raise DataError(f"{where} has {len(observations)} steps for {actions} actions, not {wanted}{more}")


def _joined(file: Path, episodes: list[tuple[_Rows, _Rows]], task: str, low: _Bounds, high: _Bounds) -> Demonstrations:
    """Episodes one after the other."""
    widths = [(observations.shape[1], actions.shape[1]) for observations, actions in episodes]
    other = next((number for number, width in enumerate(widths) if width != widths[0]), None)
    if other is not None:
        raise DataError(
            f"{file}: episode {other} (counted from 0) has (Do, Da) = {widths[other]} but the first has {widths[0]}"
        )
    if len(low) != widths[0][1]:
        low, high = (), ()
    observations, actions = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*episodes, strict=True))
    ends = torch.tensor([len(part) for _, part in episodes]).cumsum(0)
    try:
        return Demonstrations(observations, actions, ends, task, low, high)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
