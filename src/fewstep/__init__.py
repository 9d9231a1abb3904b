"""fewstep: generative models that need one to four network calls.

Every name below is imported when it is first asked for: the command line shows its help without PyTorch.
"""

import ast
import importlib
from pathlib import Path as _File
from typing import TYPE_CHECKING, Any

from fewstep._version import __version__

if TYPE_CHECKING:
    from fewstep.data.base import Dataset as Dataset
    from fewstep.data.base import Loaded as Loaded
    from fewstep.data.base import Samples as Samples
    from fewstep.data.demonstrations.episodes import Demonstrations as Demonstrations
    from fewstep.data.demonstrations.episodes import load_demonstrations as load_demonstrations
    from fewstep.data.demonstrations.episodes import save_demonstrations as save_demonstrations
    from fewstep.data.sources import DataConfig as DataConfig
    from fewstep.data.sources import DataSource as DataSource
    from fewstep.data.sources import ImageSource as ImageSource
    from fewstep.data.sources import load_dataset as load_dataset
    from fewstep.evaluation.running import Run as Run
    from fewstep.evaluation.running import train as train
    from fewstep.flow.closed_form import GaussianData as GaussianData
    from fewstep.flow.closed_form import MixtureData as MixtureData
    from fewstep.flow.derivatives import Derivative as Derivative
    from fewstep.flow.flow_map import FlowMap as FlowMap
    from fewstep.flow.flow_map import FlowMapConfig as FlowMapConfig
    from fewstep.flow.guidance import ClassifierFreeGuidance as ClassifierFreeGuidance
    from fewstep.flow.guidance import DrawnGuidance as DrawnGuidance
    from fewstep.flow.guidance import FixedGuidance as FixedGuidance
    from fewstep.flow.guidance import NoGuidance as NoGuidance
    from fewstep.flow.paths import EDM as EDM
    from fewstep.flow.paths import VP as VP
    from fewstep.flow.paths import Linear as Linear
    from fewstep.flow.paths import Path as Path
    from fewstep.flow.paths import PathConfig as PathConfig
    from fewstep.flow.paths import Trig as Trig
    from fewstep.flow.preconditioning.analytic import AnalyticPreconditioning as AnalyticPreconditioning
    from fewstep.flow.preconditioning.base import Preconditioning as Preconditioning
    from fewstep.flow.preconditioning.base import PreconditioningConfig as PreconditioningConfig
    from fewstep.flow.preconditioning.estimation import EstimationSettings as EstimationSettings
    from fewstep.flow.preconditioning.estimation import estimate_statistics as estimate_statistics
    from fewstep.flow.preconditioning.gap import GapSettings as GapSettings
    from fewstep.flow.preconditioning.gap import consistency_gap as consistency_gap
    from fewstep.flow.preconditioning.jumps import BCMPreconditioning as BCMPreconditioning
    from fewstep.flow.preconditioning.jumps import CMPreconditioning as CMPreconditioning
    from fewstep.flow.preconditioning.jumps import EulerPreconditioning as EulerPreconditioning
    from fewstep.flow.preconditioning.jumps import LinearPreconditioning as LinearPreconditioning
    from fewstep.flow.preconditioning.jumps import TrigPreconditioning as TrigPreconditioning
    from fewstep.flow.preconditioning.network_scaling import EDMInputScaling as EDMInputScaling
    from fewstep.flow.preconditioning.network_scaling import EDMScaling as EDMScaling
    from fewstep.flow.preconditioning.network_scaling import IdentityScaling as IdentityScaling
    from fewstep.flow.preconditioning.network_scaling import Scaling as Scaling
    from fewstep.flow.preconditioning.network_scaling import ScalingConfig as ScalingConfig
    from fewstep.flow.preconditioning.network_scaling import UnitScaling as UnitScaling
    from fewstep.flow.preconditioning.statistics import TrajectoryStatistics as TrajectoryStatistics
    from fewstep.networks.base import Network as Network
    from fewstep.networks.base import NetworkConfig as NetworkConfig
    from fewstep.networks.condition import NULL_LABEL as NULL_LABEL
    from fewstep.networks.condition import Condition as Condition
    from fewstep.networks.dit import DiTConfig as DiTConfig
    from fewstep.networks.mlp import MLPConfig as MLPConfig
    from fewstep.networks.unet import UNetConfig as UNetConfig
    from fewstep.networks.unet1d import UNet1dConfig as UNet1dConfig
    from fewstep.objectives import CD as CD
    from fewstep.objectives import CT as CT
    from fewstep.objectives import CTM as CTM
    from fewstep.objectives import ECT as ECT
    from fewstep.objectives import EMD as EMD
    from fewstep.objectives import ESD as ESD
    from fewstep.objectives import ISD as ISD
    from fewstep.objectives import LMD as LMD
    from fewstep.objectives import LSD as LSD
    from fewstep.objectives import PSD as PSD
    from fewstep.objectives import SCD as SCD
    from fewstep.objectives import SCT as SCT
    from fewstep.objectives import TABLE as TABLE
    from fewstep.objectives import Batch as Batch
    from fewstep.objectives import Companions as Companions
    from fewstep.objectives import DiagonalMatching as DiagonalMatching
    from fewstep.objectives import Losses as Losses
    from fewstep.objectives import MeanFlow as MeanFlow
    from fewstep.objectives import Objective as Objective
    from fewstep.objectives import Regression as Regression
    from fewstep.objectives import Shortcut as Shortcut
    from fewstep.objectives import TeacherSteps as TeacherSteps
    from fewstep.objectives import Weighting as Weighting
    from fewstep.objectives import eulerian_error as eulerian_error
    from fewstep.objectives.losses import Comparison as Comparison
    from fewstep.objectives.pairs import JointObjective as JointObjective
    from fewstep.objectives.pairs import PairObjective as PairObjective
    from fewstep.policies.policy import Policy as Policy
    from fewstep.policies.policy import load_policy as load_policy
    from fewstep.policies.rollout import roll_out as roll_out
    from fewstep.policies.simulation import Expert as Expert
    from fewstep.policies.simulation import Outcome as Outcome
    from fewstep.policies.simulation import Simulation as Simulation
    from fewstep.policies.simulation import Task as Task
    from fewstep.recipes import recipe as recipe
    from fewstep.recipes.config import RunConfig as RunConfig
    from fewstep.sampling.generate import SamplingSettings as SamplingSettings
    from fewstep.sampling.generate import generate as generate
    from fewstep.sampling.pipeline import Pipeline as Pipeline
    from fewstep.sampling.pipeline import PipelineConfig as PipelineConfig
    from fewstep.teachers import TeacherModel as TeacherModel
    from fewstep.training import Callback as Callback
    from fewstep.training import Moment as Moment
    from fewstep.training import RunFolder as RunFolder
    from fewstep.training import Runtime as Runtime
    from fewstep.training import Start as Start
    from fewstep.training import TrainingResult as TrainingResult
    from fewstep.training import load as load
    from fewstep.training.teacher import load_teacher as load_teacher
    from fewstep.utils.errors import FewstepError as FewstepError
    from fewstep.utils.parts import import_file as import_file
    from fewstep.utils.random import Draws as Draws

_IMPORTS = [node for node in ast.walk(ast.parse(_File(__file__).read_text())) if isinstance(node, ast.ImportFrom)]
_MODULES = {name.asname: str(node.module) for node in _IMPORTS for name in node.names if name.asname == name.name}
"""Where each public name is at home, read off the imports above, which only type checkers run."""

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
