"""Training: the loop, averages, optimisers, checkpoints."""

from fewstep.training.checkpoint import RunFolder, load
from fewstep.training.loop import Attendants, Machine, TrainingResult, build, train

__all__ = ["Attendants", "Machine", "RunFolder", "TrainingResult", "build", "load", "train"]
