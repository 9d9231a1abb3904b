"""Training objectives: functions of a flow map and a batch."""

from fewstep.objectives.base import Batch, Losses, Objective
from fewstep.objectives.matching import DiagonalMatching
from fewstep.objectives.selfdistillation import ISD, distillation_error, eulerian_residual

__all__ = ["ISD", "Batch", "DiagonalMatching", "Losses", "Objective", "distillation_error", "eulerian_residual"]
