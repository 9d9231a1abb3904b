"""Jump coefficients f, g and inner scaling c_skip, c_out, c_in, c_noise, as values (math.md §2)."""

from fewstep.flow.preconditioning.analytic import AnalyticPreconditioning
from fewstep.flow.preconditioning.base import (
    JumpDerivatives,
    Preconditioning,
    origin_weight,
    origin_weight_derivative,
)
from fewstep.flow.preconditioning.estimation import StatisticsEstimator, estimate_statistics
from fewstep.flow.preconditioning.gap import ConsistencyGap, consistency_gap
from fewstep.flow.preconditioning.jumps import (
    BCMPreconditioning,
    CMPreconditioning,
    EulerPreconditioning,
    LinearPreconditioning,
    TrigPreconditioning,
)
from fewstep.flow.preconditioning.network_scaling import (
    EDMInputScaling,
    EDMScaling,
    IdentityScaling,
    Scaling,
    ScalingValues,
    UnitScaling,
)
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics

__all__ = [
    "AnalyticPreconditioning",
    "BCMPreconditioning",
    "CMPreconditioning",
    "ConsistencyGap",
    "EDMInputScaling",
    "EDMScaling",
    "EulerPreconditioning",
    "IdentityScaling",
    "JumpDerivatives",
    "LinearPreconditioning",
    "Preconditioning",
    "Scaling",
    "ScalingValues",
    "StatisticsEstimator",
    "TrajectoryStatistics",
    "TrigPreconditioning",
    "UnitScaling",
    "consistency_gap",
    "estimate_statistics",
    "origin_weight",
    "origin_weight_derivative",
]
