"""fewstep: generative models that need one to four network calls."""

from fewstep._version import __version__
from fewstep.conditions import NULL_LABEL, Condition
from fewstep.config import RunConfig
from fewstep.data import DataConfig, Dataset, load_dataset
from fewstep.errors import FewstepError
from fewstep.flowmap import FlowMap, FlowMapConfig
from fewstep.guidance import ClassifierFreeGuidance, DrawnGuidance, FixedGuidance, NoGuidance
from fewstep.networks import DiTConfig, MLPConfig, Network, UNetConfig
from fewstep.objectives import ISD, Batch, DiagonalMatching, Losses, Objective
from fewstep.oracles import GaussianData, MixtureData
from fewstep.paths import EDM, VP, Linear, Path, Trig
from fewstep.preconditioning import (
    BCMPreconditioning,
    CMPreconditioning,
    EDMInputScaling,
    EDMScaling,
    EulerPreconditioning,
    IdentityScaling,
    LinearPreconditioning,
    Preconditioning,
    Scaling,
    TrigPreconditioning,
    UnitScaling,
)
from fewstep.sampling import SamplingSettings, generate
from fewstep.training import Machine, RunFolder, load, train

__all__ = [
    "EDM",
    "ISD",
    "NULL_LABEL",
    "VP",
    "BCMPreconditioning",
    "Batch",
    "CMPreconditioning",
    "ClassifierFreeGuidance",
    "Condition",
    "DataConfig",
    "Dataset",
    "DiTConfig",
    "DiagonalMatching",
    "DrawnGuidance",
    "EDMInputScaling",
    "EDMScaling",
    "EulerPreconditioning",
    "FewstepError",
    "FixedGuidance",
    "FlowMap",
    "FlowMapConfig",
    "GaussianData",
    "IdentityScaling",
    "Linear",
    "LinearPreconditioning",
    "Losses",
    "MLPConfig",
    "Machine",
    "MixtureData",
    "Network",
    "NoGuidance",
    "Objective",
    "Path",
    "Preconditioning",
    "RunConfig",
    "RunFolder",
    "SamplingSettings",
    "Scaling",
    "Trig",
    "TrigPreconditioning",
    "UNetConfig",
    "UnitScaling",
    "__version__",
    "generate",
    "load",
    "load_dataset",
    "train",
]
