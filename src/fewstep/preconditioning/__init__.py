"""Jump coefficients f, g and inner scaling c_skip, c_out, c_in, c_noise, as values (math.md §2)."""

from fewstep.preconditioning.base import JumpDerivatives, Preconditioning
from fewstep.preconditioning.classic import (
    BCMPreconditioning,
    CMPreconditioning,
    EulerPreconditioning,
    LinearPreconditioning,
    TrigPreconditioning,
)
from fewstep.preconditioning.scaling import (
    EDMInputScaling,
    EDMScaling,
    IdentityScaling,
    Scaling,
    ScalingValues,
    UnitScaling,
)

__all__ = [
    "BCMPreconditioning",
    "CMPreconditioning",
    "EDMInputScaling",
    "EDMScaling",
    "EulerPreconditioning",
    "IdentityScaling",
    "JumpDerivatives",
    "LinearPreconditioning",
    "Preconditioning",
    "Scaling",
    "ScalingValues",
    "TrigPreconditioning",
    "UnitScaling",
]
