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
from fewstep.utils.extras import installing
from fewstep.utils.files import parse_json
from fewstep.utils.tensors import check_memory

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
        actions = _rows(group, "actions", where, floats=True)
        return _observations(group, "observations", keys, where, len(actions), more=1)[:-1], actions

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
        actions = _rows(group, "actions", where, floats=True)
        promised = np.asarray(group.attrs.get("num_samples", len(actions)))
        if promised.shape != () or promised != len(actions):
            raise DataError(f"{where} has {len(actions)} actions but num_samples says {promised}: drop the episode")
        return _observations(group, "obs", keys, where, len(actions)), actions

    with _opened(file) as opened:
        chosen = None
        if split:
            names = np.asarray(_member(_member(opened, "mask", str(file)), split, f"{file}: mask")).ravel().tolist()
            chosen = sorted({name.decode() if isinstance(name, bytes) else str(name) for name in names})
        episodes = _episodes(_member(opened, "data", str(file)), "demo_", file, read, chosen)
    return _joined(file, episodes, task)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The HDF5 file, its failures turned into DataError; h5py tells of truncation with OSError, KeyError and more."""
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError(f"reading {file} needs h5py: {installing('policy')} ({error})") from error
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
        for file in (place, place / "data" / _MAIN_FILE, place / _MAIN_FILE):
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
    return [read(name, _member(group, name, str(file))) for name in names]


def _member(group: Any, name: str, where: str) -> Any:
    """What a group holds under a name; raises DataError where that is nothing, or lies in another file."""
    if not _is_group(group) or name not in group:
        raise DataError(f"{where} has no '{name}'; there are: {_listed(group)}")
    node, outer = group[name], group.file.filename
    # A virtual array is put together from others', which may be anywhere.
    elsewhere = node.file.filename != outer or (hasattr(node, "shape") and (node.external or node.is_virtual))
    if elsewhere:
        raise DataError(f"{where}/{name} lies in another file: copy its numbers into this one")
    return node


def _is_group(node: Any) -> bool:
    return hasattr(node, "keys")


def _listed(group: Any) -> str:
    names = sorted(group) if _is_group(group) else []
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "nothing"


def _observations(group: Any, name: str, keys: Sequence[str], where: str, actions: int, more: int = 0) -> _Rows:
    """One array (T + more, Do), or those of a group side by side, for T = `actions`."""
    node = _member(group, name, where)
    whole = f"{where}/{name}"
    if not _is_group(node):
        if keys:
            raise DataError(f"{whole} is one array: leave out the keys {', '.join(keys)}")
        parts = [_rows(group, name, where)]
    else:
        leaves: list[str] = []
        node.visititems(lambda key, found: None if _is_group(found) else leaves.append(key))
        parts = [_rows(node, key, whole) for key in keys or sorted(leaves)]
    if not parts:
        raise DataError(f"{whole} holds no arrays")
    if len({len(part) for part in parts}) > 1:
        raise DataError(
            f"{whole} holds arrays of {', '.join(str(len(part)) for part in parts)} steps: drop the episode"
        )
    if len(parts[0]) != actions + more:
        needs = f"not {actions + more}{', one more' if more else ''}"
        raise DataError(f"{whole} has {len(parts[0])} steps for {actions} actions, {needs}")
    return np.concatenate(parts, axis=1)


def _rows(group: Any, name: str, where: str, floats: bool = False) -> _Rows:
    """An array (T,) or (T, D) as (T, D) float32. Unsigned bytes are pictures; whole numbers as actions are choices."""
    node, where = _member(group, name, where), f"{where}/{name}"
    if _is_group(node):
        raise DataError(f"{where} is a group of {_listed(node)}: name one of its arrays")
    if not hasattr(node, "shape"):
        raise DataError(f"{where} is no array: name one of the arrays beside it")
    kinds = "f" if floats else "fib"
    if node.dtype.kind not in kinds or len(node.shape) not in (1, 2) or 0 in node.shape:
        raise DataError(
            f"{where} is {node.dtype} of shape {node.shape}: a policy needs one vector of "
            f"{'floats' if floats else 'numbers'} per step; pictures are not read"
        )
    check_memory(8 * node.size, where, "drop the episode")
    values = np.asarray(node[()], dtype=np.float64)
    if not (np.abs(values) <= np.finfo(np.float32).max).all():
        raise DataError(f"{where} has numbers that are not finite: repair or drop the episode")
    return values.reshape(len(values), -1).astype(np.float32)


def _joined(
    file: Path, episodes: list[tuple[_Rows, _Rows]], task: str, low: _Bounds = (), high: _Bounds = ()
) -> Demonstrations:
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
