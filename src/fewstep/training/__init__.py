"""Training: the loop, averages, optimisers, checkpoints."""

from fewstep.training.checkpoint import RunFolder, load
from fewstep.training.loop import train
from fewstep.training.settings import Attendants, Machine, TrainingResult
from fewstep.training.setup import build

__all__ = ["Attendants", "Machine", "RunFolder", "TrainingResult", "build", "load", "train"]
