"""Training objectives: functions of a flow map and a batch."""

from fewstep.objectives.base import ALONE, Batch, Companions, Generated, Losses, Objective
from fewstep.objectives.consistency import CT, ECT, SCD, SCT, Tangent
from fewstep.objectives.distillation import CD, CTM, TeacherSteps
from fewstep.objectives.eulerian import ESD, ISD, MeanFlow, distillation_error, eulerian_residual
from fewstep.objectives.flow_matching import DiagonalMatching, Regression
from fewstep.objectives.self_distillation import LSD, PSD, Shortcut
from fewstep.objectives.table import CATALOGUE, Entry

__all__ = [
    "ALONE",
    "CATALOGUE",
    "CD",
    "CT",
    "CTM",
    "ECT",
    "ESD",
    "ISD",
    "LSD",
    "PSD",
    "SCD",
    "SCT",
    "Batch",
    "Companions",
    "DiagonalMatching",
    "Entry",
    "Generated",
    "Losses",
    "MeanFlow",
    "Objective",
    "Regression",
    "Shortcut",
    "Tangent",
    "TeacherSteps",
    "distillation_error",
    "eulerian_residual",
]
