"""Training: the loop, averages, optimisers, checkpoints."""

from fewstep.training.loop import train
from fewstep.training.run_folder import RunFolder, load
from fewstep.training.settings import Attendants, Machine, TrainingResult
from fewstep.training.setup import build

__all__ = ["Attendants", "Machine", "RunFolder", "TrainingResult", "build", "load", "train"]
