"""Demonstrations: episodes of observations and actions in one file, and the chunks that a policy learns from."""

import difflib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fewstep.data.base import source_path
from fewstep.data.npz import read_arrays
from fewstep.utils.errors import DataError
from fewstep.utils.files import parse_json, write_atomically

_NEEDED = ("observations", "actions", "episode_ends")
_ARRAYS = (*_NEEDED, "task", "action_low", "action_high")


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """Episodes one after the other: step i shows observations[i], at which actions[i] was taken.

    observations: (N, Do) float32. actions: (N, Da) float32. ends: (E,) int64, rising to N: episode e holds the steps
    ends[e - 1] .. ends[e] - 1. task: the task's name, empty when unknown. action_low, action_high: bounds (Da,), one
    number where it is the same for all, empty when unknown. Raises DataError for other shapes or types, values that are
    not finite, episodes without steps, or bounds that do not fit.
    """

    observations: Tensor
    actions: Tensor
    ends: Tensor
    task: str = ""
    action_low: tuple[float, ...] = ()
    action_high: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        observations, actions, ends = self.observations, self.actions, self.ends
        if observations.ndim != 2 or actions.ndim != 2 or len(observations) != len(actions) or 0 in actions.shape:
            raise DataError(
                f"observations of shape {tuple(observations.shape)} and actions of shape {tuple(actions.shape)}: give "
                "(N, Do) and (N, Da) of the same N, at least 1"
            )
        if observations.dtype != torch.float32 or actions.dtype != torch.float32 or ends.dtype != torch.int64:
            raise DataError(
                f"observations are {observations.dtype}, actions {actions.dtype}, episode ends {ends.dtype}: give "
                "float32, float32 and int64"
            )
        for name, values in (("observations", observations), ("actions", actions)):
            bad = torch.nonzero(~values.isfinite().all(1))
            if len(bad):
                raise DataError(f"step {int(bad[0])} has {name} that are not finite: repair or drop its episode")
        if ends.ndim != 1 or not len(ends) or int(ends[-1]) != len(actions) or bool((ends <= self.starts).any()):
            raise DataError(f"episode ends must rise from at least 1 to the {len(actions)} steps, one per episode")
        for name in ("action_low", "action_high"):
            object.__setattr__(self, name, _bounds(name, getattr(self, name), actions.shape[1]))
        check_bounds(actions, self.action_low, self.action_high)

    def __repr__(self) -> str:
        seen, done = self.observations.shape[1], self.actions.shape[1]
        steps = f"{len(self)} episodes, {len(self.actions):,} steps"
        return f"Demonstrations({self.task!r}: {steps}, {seen} numbers seen and {done} moved)"

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def starts(self) -> Tensor:
        """First step of every episode, (E,)."""
        return torch.cat([self.ends.new_zeros(1), self.ends[:-1]])


def _bounds(name: str, given: Any, count: int) -> tuple[float, ...]:
    """Bounds as numbers, one for all of `count` actions repeated; raises DataError for what are none."""
    try:
        return (float(given),) * count if isinstance(given, (int, float)) else tuple(map(float, given))
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{name} is {repr(given)[:40]}: give one number for each action, or one for all") from error


def check_bounds(actions: Tensor, low: tuple[float, ...], high: tuple[float, ...]) -> None:
    """Raise DataError unless there are no bounds, or finite ones low <= high (Da,) that hold all actions (N, Da)."""
    if not low and not high:
        return
    if len(low) != actions.shape[1] or len(high) != actions.shape[1]:
        raise DataError(
            f"action bounds of {len(low)} and {len(high)} numbers for actions of {actions.shape[1]}: give one of each "
            "per number, or none"
        )
    if not all(math.isfinite(a) and math.isfinite(b) and a <= b for a, b in zip(low, high, strict=True)):
        raise DataError(f"action bounds {low} and {high} must be finite, the first below the second")
    slack = 1e-4 * (torch.tensor(high) - torch.tensor(low)) + 1e-6 * torch.tensor(high).abs()
    outside = (actions < torch.tensor(low) - slack) | (actions > torch.tensor(high) + slack)
    if bool(outside.any()):
        step, number = torch.nonzero(outside)[0].tolist()
        raise DataError(
            f"action {actions[step, number]:g} of step {step} lies outside its bounds [{low[number]:g}, "
            f"{high[number]:g}]: clip the actions as they were carried out, or leave out the bounds"
        )


def save_demonstrations(demonstrations: Demonstrations, file: Path | str) -> Path:
    """Write observations, actions, episode_ends, the task's name and the bounds, as `load_demonstrations` reads them.

    A .npz file holds them all as arrays; any other is safetensors, with the last two as JSON in its header.
    """
    own, file = demonstrations, Path(file)
    tensors = {"observations": own.observations, "actions": own.actions, "episode_ends": own.ends}
    about = {"task": own.task, "action_low": own.action_low, "action_high": own.action_high}
    if file.suffix == ".npz":
        packed = io.BytesIO()
        np.savez(packed, **{key: np.asarray(value) for key, value in (tensors | about).items()})  # type: ignore[arg-type]
        write_atomically(file, packed.getvalue())
    else:
        kept = {key: value.contiguous() for key, value in tensors.items()}
        write_atomically(file, save(kept, {"demonstrations": json.dumps(about)}))
    return file


def load_demonstrations(file: Path | str) -> Demonstrations:
    """Read a .safetensors or .npz file with observations (N, Do), actions (N, Da) and episode_ends (E,).

    An .npz may also hold `task` and `action_low`, `action_high`. Numbers of other widths are converted. Raises
    DataError naming the file when it is missing, damaged, lacks an array, or has one by another name.
    """
    file = source_path(file)
    if not file.is_file():
        raise DataError(f"{file}: no such file; record demonstrations with `fewstep demos TASK`")
    arrays, about = _read_npz(file) if file.suffix == ".npz" else _read_safetensors(file)
    _check_names(file, arrays)
    try:
        return Demonstrations(
            arrays["observations"].to(torch.float32),
            arrays["actions"].to(torch.float32),
            arrays["episode_ends"].to(torch.int64),
            str(about.get("task", "")),
            about.get("action_low", ()),
            about.get("action_high", ()),
        )
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def _check_names(file: Path, arrays: Mapping[str, object]) -> None:
    """Raise DataError for arrays that are missing, and for those whose name says nothing here."""
    unknown = [name for name in arrays if name not in _ARRAYS]
    missing = [name for name in _NEEDED if name not in arrays]
    close = {name: difflib.get_close_matches(name, missing or _ARRAYS, n=1, cutoff=0.5) for name in unknown}
    meant = [f"{name} (did you mean {near[0]}?)" if near else name for name, near in close.items()]
    if missing:
        also = f", and has {', '.join(meant)}" if unknown else ""
        raise DataError(f"{file} lacks {', '.join(missing)}{also}: demonstrations have {', '.join(_NEEDED)}")
    if unknown:
        raise DataError(
            f"{file} has {', '.join(meant)}, which demonstrations do not: leave out all but {', '.join(_ARRAYS)}"
        )


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, "pt") as opened:
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            about = parse_json((opened.metadata() or {}).get("demonstrations", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{file} is damaged or not a safetensors file ({error})") from error
    about = about if isinstance(about, dict) else {}
    return arrays, about | {key: arrays[key].tolist() for key in ("action_low", "action_high") if key in arrays}


def _read_npz(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    found = read_arrays(file, _ARRAYS)
    try:
        arrays = {name: torch.from_numpy(found[name]) for name in found if found[name].dtype.kind in "fiu"}
    except TypeError as error:
        raise DataError(f"{file} has numbers of a width that is not read ({error})") from error
    strange = [f"{name} of type {found[name].dtype}" for name in _NEEDED if name in found and name not in arrays]
    if strange:
        raise DataError(f"{file} has {', '.join(strange)}: give numbers")
    return arrays, {key: found[key].tolist() for key in ("task", "action_low", "action_high") if key in found}
