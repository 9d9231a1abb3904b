"""Checkpoints: safetensors and JSON, written aside and renamed, so that a reader never meets half of one.

RUN/checkpoints/step-N/  config.json + model.safetensors (a saved Pipeline with the first EMA's weights),
                         weights.safetensors, optimizer.safetensors, ema-NAME.safetensors, discriminator.safetensors,
                         state.json
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.sampling.pipeline import WEIGHTS_FILE, Pipeline
from fewstep.training.ema import EMA
from fewstep.training.gan import GAN
from fewstep.training.optimizers import Optimizers
from fewstep.utils.files import guarded, parse_json, reading
from fewstep.utils.serialization import JSON
from fewstep.utils.weights import fit_weights, read_weights, save_weights

STATE_FILE = "state.json"
DISCRIMINATOR_FILE = "discriminator.safetensors"


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder aside and rename it into place; nothing is left behind when it fails."""
    with guarded(folder):
        aside = _aside(folder)
        aside.mkdir(parents=True)
        try:
            fill(aside)
            for file in aside.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            os.replace(aside, folder)
        except SafetensorError as error:  # its form of "disk full"
            raise OSError(str(error)) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


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
    optimizers: Optimizers,
    emas: list[EMA],
    state: dict[str, JSON],
    gan: GAN | None = None,
) -> None:
    """Write a checkpoint, unless it is there; the saved pipeline has the weights of the first average."""
    if folder.exists():
        return

    def fill(aside: Path) -> None:
        pipeline.save(aside, emas[0].weights)
        save_weights(pipeline.flow_map.network.state_dict(), aside / "weights.safetensors")
        save_weights(optimizers.tensors(), aside / "optimizer.safetensors")
        for ema in emas[1:]:
            save_weights(ema.weights, aside / f"ema-{ema.name}.safetensors")
        if gan is not None:
            save_weights(gan.tensors(), aside / DISCRIMINATOR_FILE)
        (aside / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")

    write_folder(folder, fill)


def load_checkpoint(
    folder: Path, flow_map: FlowMap, optimizers: Optimizers, emas: list[EMA], gan: GAN | None = None
) -> dict[str, Any]:
    """Restore weights, optimiser and averages; returns the state. Raises CheckpointError when files do not fit."""
    weights = folder / "weights.safetensors"
    fit_weights(flow_map.network, read_weights(weights), str(weights))
    states = folder / "optimizer.safetensors"
    optimizers.load(read_weights(states), str(states))
    for i, ema in enumerate(emas):
        average = folder / (WEIGHTS_FILE if i == 0 else f"ema-{ema.name}.safetensors")
        ema.load(read_weights(average), str(average))
    if gan is not None:
        gan.load(*discriminator_state(folder))
    return read_state(folder)


def discriminator_state(folder: Path) -> tuple[dict[str, Tensor], str]:
    """The discriminator's tensors in a checkpoint, and where they lie; format 1 called it a critic."""
    file, old = folder / DISCRIMINATOR_FILE, folder / "critic.safetensors"
    if file.exists() or not old.exists():
        return read_weights(file), str(file)
    return {key.replace("critic.", "discriminator.", 1): value for key, value in read_weights(old).items()}, str(old)


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's step, images and seconds; raises CheckpointError when the file is damaged."""
    file = folder / STATE_FILE
    with reading(file, "delete its checkpoint to go on from the one before"):
        state = parse_json(file.read_bytes())
        return {"step": int(state["step"]), "images": int(state["images"]), "seconds": float(state["seconds"])}
