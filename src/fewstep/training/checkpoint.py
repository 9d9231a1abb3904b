"""Checkpoints: safetensors and JSON, written aside and renamed, so that a reader never meets half of one.

RUN/checkpoints/step-N/  config.json + model.safetensors (a saved Pipeline with the first EMA's weights),
                         weights.safetensors, optimizer.safetensors, ema-NAME.safetensors, discriminator.safetensors,
                         state.json with a digest of each of these files, and one of what itself says; without it a
                         checkpoint is not whole
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from fewstep.sampling.pipeline import CONFIG_FILE, PROMPTS_FILE, WEIGHTS_FILE, Pipeline, load_pipeline
from fewstep.utils.errors import CheckpointError, FewstepError
from fewstep.utils.files import guarded, parse_json, reading, write_atomically
from fewstep.utils.serialization import JSON
from fewstep.utils.weights import check_finite, read_weights, save_weights

STATE_FILE = "state.json"
LAST_FILE = "weights.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
DISCRIMINATOR_FILE = "discriminator.safetensors"
_KEYS = {"step", "images", "seconds", "pending", "derivative", "digests", "digest"}


def remove_folder(folder: Path) -> None:
    """Delete a folder so that, stopped half-way, it is no longer taken for a whole one."""
    with guarded(folder):
        aside = _aside(folder)
        os.replace(folder, aside)
        shutil.rmtree(aside)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")


def save_checkpoint(
    folder: Path,
    pipeline: Pipeline,
    average: Mapping[str, Tensor],
    files: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, JSON],
) -> None:
    """Write a checkpoint aside and rename it into place, unless it is there; nothing is left behind when it fails.

    The saved pipeline has the weights `average`; files: tensors by the file's name. Raises CheckpointError when the
    disk refuses.
    """
    if (folder / STATE_FILE).is_file():
        return
    if folder.exists():  # not whole
        remove_folder(folder)
    with guarded(folder):
        aside = _aside(folder)
        aside.mkdir(parents=True)
        try:
            pipeline.save(aside, average)
            for name, tensors in files.items():
                save_weights(tensors, aside / name)
            state = state | {"digests": {file.name: _digest(file) for file in sorted(aside.iterdir())}}
            (aside / STATE_FILE).write_text(_vouched(state))
            for file in aside.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            os.replace(aside, folder)
        except SafetensorError as error:  # its form of "disk full"
            raise OSError(str(error)) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def stored(file: Path) -> tuple[dict[str, Tensor], str]:
    """A file's tensors, and its name for messages; raises CheckpointError when it cannot be read."""
    return read_weights(file), str(file)


def stored_discriminator(folder: Path) -> tuple[dict[str, Tensor], str]:
    """`stored` of the discriminator in a checkpoint; format 1 called it a critic."""
    file, old = folder / DISCRIMINATOR_FILE, folder / "critic.safetensors"
    if file.exists() or not old.exists():
        return stored(file)
    return {key.replace("critic.", "discriminator.", 1): value for key, value in read_weights(old).items()}, str(old)


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's step, images and seconds; whether what is shown at its step is still to be; digests of its files.

    derivative: what a probe chose in place of the objective's own, '' for nothing.

    Raises CheckpointError when the file is damaged, or not what was written, as far as its own digest tells.
    """
    file = folder / STATE_FILE
    with reading(file, "its checkpoint cannot be used"):
        state = parse_json(file.read_bytes())
        foreign = sorted(set(state) - _KEYS)  # a digest whose name is damaged would vouch for nothing
        if foreign or state.get("digest", own := _digest_of(state)) != own:
            raise ValueError(f"it says {foreign[0]!r}" if foreign else "it is not what was written")
        return {
            "step": int(state["step"]),
            "images": int(state["images"]),
            "seconds": float(state["seconds"]),
            "pending": bool(state.get("pending", False)),
            "derivative": str(state.get("derivative", "")),
            "digests": dict(state.get("digests", {})),
        }


def mark_shown(folder: Path) -> None:
    """Say that nothing of a checkpoint's step is still to be shown."""
    state = read_state(folder) | {"pending": False}
    write_atomically(folder / STATE_FILE, _vouched(state))


def _vouched(state: dict[str, Any]) -> str:
    """A state as it is stored, with a digest of itself."""
    return json.dumps(state | {"digest": _digest_of(state)}, indent=2) + "\n"


def _digest_of(state: dict[str, Any]) -> str:
    rest = {key: value for key, value in state.items() if key != "digest"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def check_digests(folder: Path, *names: str) -> None:
    """Raise CheckpointError naming a file of a checkpoint that is not what was written; names: which, all for none."""
    digests = read_state(folder)["digests"]
    for name in names or digests:
        file = folder / Path(name).name
        if name in digests and not (file.is_file() and _digest(file) == digests[name]):
            raise CheckpointError(f"{file} is damaged: it is not what was written")


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "blake2b").hexdigest()[:16]


def step_of(checkpoint: Path) -> int:
    """By the name of its folder."""
    return int(checkpoint.name[5:])


def load_checkpoint_pipeline(folder: Path, base: str = "") -> Pipeline:
    """The model in a checkpoint, or one that was saved without a training; raises CheckpointError as `load` does."""
    found = load_pipeline(folder, base)
    if (folder / STATE_FILE).is_file():
        check_digests(folder, CONFIG_FILE, WEIGHTS_FILE, PROMPTS_FILE)
    return found


def is_sound(checkpoint: Path) -> bool:
    """Whether a run's checkpoint can be gone on from: all of it can be read, is finite, and is what was written."""
    files = sorted(checkpoint.glob("*.safetensors"))
    try:
        buffers = {name for name, _ in load_checkpoint_pipeline(checkpoint).flow_map.network.named_buffers()}
        for file in files:
            check_finite({key: value for key, value in read_weights(file).items() if key not in buffers}, str(file))
        check_digests(checkpoint)
        whole = {LAST_FILE, OPTIMIZER_FILE} <= {file.name for file in files}
        return whole and read_state(checkpoint)["step"] == step_of(checkpoint)
    except FewstepError:
        return False
