"""Experiment trackers beside log.jsonl, by Accelerate: TensorBoard, Weights & Biases, Trackio (extra [track])."""

from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from fewstep.recipes.config import RunConfig
from fewstep.training.settings import TrackerName
from fewstep.utils.errors import MissingExtraError, UnsupportedError
from fewstep.utils.extras import installing
from fewstep.utils.serialization import to_json

PROJECT = "fewstep"


def check_trackers(names: tuple[TrackerName, ...]) -> None:
    """Raise MissingExtraError for a tracker that is not installed."""
    for name in names:
        if name not in map(str, get_available_trackers()):
            raise MissingExtraError(f"{name} is not installed: {installing('track')}")


def start_trackers(accelerator: Accelerator, config: RunConfig, root: Path, images: int) -> None:
    """Start what the accelerator logs with, for the run in the folder `root` that has seen so many images.

    TensorBoard writes RUN/tensorboard/fewstep, without the events beyond those images that a killed process wrote;
    Weights & Biases writes RUN/wandb, a new run of the group RUN at each start; Trackio keeps its own folder. Raises
    UnsupportedError when one cannot start, as without a login.
    """
    about = {"name": root.name, "group": root.name, "config": to_json(config)}
    options = {"tensorboard": {"purge_step": images + 1}, "wandb": {"dir": str(root), **about}, "trackio": about}
    try:
        accelerator.init_trackers(PROJECT, init_kwargs=options)
    except Exception as error:  # every tracker fails in a way of its own
        accelerator.trackers.clear()  # those that have not started cannot be finished
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnsupportedError(
            f"the run cannot be tracked ({reason}): log in, or work offline (WANDB_MODE=offline, no TRACKIO_SPACE_ID)"
        ) from error
