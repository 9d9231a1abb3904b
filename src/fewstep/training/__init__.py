"""Training: the loop, averages, optimisers, checkpoints."""

from fewstep.training.loop import train
from fewstep.training.run_folder import RunFolder, load
from fewstep.training.settings import Callbacks, Runtime, TrainingResult
from fewstep.training.setup import build

__all__ = ["Callbacks", "RunFolder", "Runtime", "TrainingResult", "build", "load", "train"]
