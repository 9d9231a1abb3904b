"""Training objectives: functions of a flow map and a batch."""

from fewstep.objectives.base import ALONE, Batch, Companions, FakeSamples, Losses, Objective
from fewstep.objectives.consistency import CT, ECT
from fewstep.objectives.ctm import CTM
from fewstep.objectives.distillation import CD, TeacherSteps
from fewstep.objectives.eulerian import eulerian_error, eulerian_residual
from fewstep.objectives.flow_map_distillation import EMD, LMD
from fewstep.objectives.flow_matching import DiagonalMatching
from fewstep.objectives.isd import ISD
from fewstep.objectives.losses import Distance, Weighting
from fewstep.objectives.mean_flow import MeanFlow
from fewstep.objectives.pairs import Pairs
from fewstep.objectives.regression import Regression
from fewstep.objectives.scm import SCD, SCT, Tangent
from fewstep.objectives.self_distillation import ESD, LSD, PSD
from fewstep.objectives.shortcut import Shortcut
from fewstep.objectives.table import TABLE, Entry

__all__ = [
    "ALONE",
    "CD",
    "CT",
    "CTM",
    "ECT",
    "EMD",
    "ESD",
    "ISD",
    "LMD",
    "LSD",
    "PSD",
    "SCD",
    "SCT",
    "TABLE",
    "Batch",
    "Companions",
    "DiagonalMatching",
    "Distance",
    "Entry",
    "FakeSamples",
    "Losses",
    "MeanFlow",
    "Objective",
    "Pairs",
    "Regression",
    "Shortcut",
    "Tangent",
    "TeacherSteps",
    "Weighting",
    "eulerian_error",
    "eulerian_residual",
]
