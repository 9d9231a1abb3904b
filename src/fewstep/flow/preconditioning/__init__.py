"""Jump coefficients f, g and inner scaling c_skip, c_out, c_in, c_noise, as values (math.md §2)."""

from fewstep.flow.preconditioning.analytic import (
    AnalyticForwardPreconditioningConfig,
    AnalyticPreconditioning,
    AnalyticPreconditioningConfig,
)
from fewstep.flow.preconditioning.base import (
    JumpDerivatives,
    Preconditioning,
    PreconditioningConfig,
    origin_weight,
    origin_weight_derivative,
)
from fewstep.flow.preconditioning.estimation import EstimationSettings, StatisticsEstimator, estimate_statistics
from fewstep.flow.preconditioning.gap import ConsistencyGap, GapSettings, consistency_gap
from fewstep.flow.preconditioning.jumps import (
    BCMPreconditioning,
    BCMPreconditioningConfig,
    CMPreconditioning,
    CMPreconditioningConfig,
    EulerPreconditioning,
    EulerPreconditioningConfig,
    LinearPreconditioning,
    LinearPreconditioningConfig,
    TrigPreconditioning,
    TrigPreconditioningConfig,
)
from fewstep.flow.preconditioning.network_scaling import (
    EDMInputScaling,
    EDMInputScalingConfig,
    EDMScaling,
    EDMScalingConfig,
    IdentityScaling,
    IdentityScalingConfig,
    Scaling,
    ScalingConfig,
    ScalingValues,
    UnitScaling,
    UnitScalingConfig,
)
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics

__all__ = [
    "AnalyticForwardPreconditioningConfig",
    "AnalyticPreconditioning",
    "AnalyticPreconditioningConfig",
    "BCMPreconditioning",
    "BCMPreconditioningConfig",
    "CMPreconditioning",
    "CMPreconditioningConfig",
    "ConsistencyGap",
    "EDMInputScaling",
    "EDMInputScalingConfig",
    "EDMScaling",
    "EDMScalingConfig",
    "EstimationSettings",
    "EulerPreconditioning",
    "EulerPreconditioningConfig",
    "GapSettings",
    "IdentityScaling",
    "IdentityScalingConfig",
    "JumpDerivatives",
    "LinearPreconditioning",
    "LinearPreconditioningConfig",
    "Preconditioning",
    "PreconditioningConfig",
    "Scaling",
    "ScalingConfig",
    "ScalingValues",
    "StatisticsEstimator",
    "TrajectoryStatistics",
    "TrigPreconditioning",
    "TrigPreconditioningConfig",
    "UnitScaling",
    "UnitScalingConfig",
    "consistency_gap",
    "estimate_statistics",
    "origin_weight",
    "origin_weight_derivative",
]
