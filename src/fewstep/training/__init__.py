"""Training: the loop, averages, optimisers, checkpoints."""

from fewstep.training.callbacks import Callback, Moment, Start, TrainingResult
from fewstep.training.loop import train_run
from fewstep.training.run_folder import RunFolder, load
from fewstep.training.settings import Callbacks, Runtime
from fewstep.training.setup import build

__all__ = [
    "Callback",
    "Callbacks",
    "Moment",
    "RunFolder",
    "Runtime",
    "Start",
    "TrainingResult",
    "build",
    "load",
    "train_run",
]
