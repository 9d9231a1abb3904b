"""A run's configuration: frozen dataclasses, and how it becomes a flow map."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fewstep.data import DataConfig
from fewstep.errors import ConfigError
from fewstep.flowmap import FlowMapConfig
from fewstep.networks import DiTConfig, MLPConfig, UNetConfig
from fewstep.objectives import ISD, DiagonalMatching
from fewstep.paths import EDM, VP, Linear, Path, Trig
from fewstep.preconditioning import (
    BCMPreconditioning,
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

PathName = Literal["linear", "trig", "edm", "vp"]
PreconditioningName = Literal["linear", "trig", "euler", "bcm"]
ScalingName = Literal["identity", "unit", "edm", "edm-input"]


@dataclass(frozen=True)
class ModelConfig:
    """The flow map: which path, preconditioning and inner scaling; they share the data's standard deviation."""

    path: PathName = "linear"
    preconditioning: PreconditioningName = "linear"
    scaling: ScalingName = "identity"
    sigma_data: float | None = None
    """Standard deviation of the data; None measures it on the training data."""

    def __post_init__(self) -> None:
        if self.sigma_data is not None and not 0 < self.sigma_data < math.inf:
            raise ConfigError(f"sigma_data is {self.sigma_data}; it must be positive and finite")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for the matrices and AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    """Learning rate of AdamW."""
    matrix_lr: float = 5e-4
    """Learning rate of Muon."""
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest gradient norm; 0 never clips."""
    warmup_images: int = 10_000
    """Images over which the learning rate rises from 0."""
    decay: Literal["constant", "cosine", "rsqrt"] = "constant"
    """After the warm-up: constant, cosine to 0, or 1/sqrt beyond decay_images (EDM2)."""
    decay_images: int = 1_000_000

    def __post_init__(self) -> None:
        if not (self.lr > 0 and self.matrix_lr > 0 and self.clip >= 0 and self.warmup_images >= 0):
            raise ConfigError("learning rates must be positive, clip and warmup_images at least 0")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.weight_decay >= 0 and self.decay_images >= 1):
            raise ConfigError("beta1 and beta2 must lie in [0, 1), weight_decay be at least 0, decay_images at least 1")


@dataclass(frozen=True)
class TrainingConfig:
    """Durations are in images seen, whatever the batch size."""

    images: int = 1_000_000
    """How long to train."""
    batch_size: int = 256
    """Global batch: over all processes and accumulation steps."""
    seed: int = 0
    precision: Literal["no", "bf16"] = "no"
    flip: bool = False
    """Mirror training images at random."""
    ema_power: tuple[float, ...] = (0.1,)
    """Relative widths of power-function averages (EDM2); the first average is the model that is sampled."""
    ema_decay: tuple[float, ...] = ()
    """Decays of constant averages, per step."""
    log_images: int = 12_800
    """Images between lines of the log."""
    sample_images: int = 100_000
    """Images between sample grids; 0 for none."""
    checkpoint_images: int = 100_000
    """Images between checkpoints."""
    keep: int = 2
    """Checkpoints to keep."""
    seconds: float = 0.0
    """Stop after this much training time, if images have not run out; 0 for no limit. Makes the length of the run
    depend on the machine."""

    def __post_init__(self) -> None:
        if min(self.images, self.batch_size, self.log_images, self.checkpoint_images, self.keep) < 1:
            raise ConfigError("images, batch_size, log_images, checkpoint_images and keep must be at least 1")
        if self.sample_images < 0 or self.seconds < 0:
            raise ConfigError("sample_images and seconds must be at least 0")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0 and below 2^63")


@dataclass(frozen=True)
class EvaluationConfig:
    """What `fewstep evaluate` and the report measure."""

    samples: int = 2000
    """Generated samples per measurement."""
    steps: tuple[int, ...] = (1, 2, 4, 16)
    """Steps of the map sampler (of the ODE sampler, for models trained on the diagonal alone)."""
    reference_steps: int = 32
    """Steps of the ODE reference."""
    omega: float = 1.0
    """Guidance when sampling; choose it by the Frechet distance."""
    seed: int = 1000

    def __post_init__(self) -> None:
        if not self.steps or min(*self.steps, self.reference_steps) < 1 or self.samples < 4:
            raise ConfigError(
                f"{self.samples} samples at {self.steps} steps, {self.reference_steps} for the reference: measuring "
                "needs at least 4 samples and one step count, each at least 1"
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the weights of a run, and what is measured of it."""

    recipe: str
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    network: MLPConfig | UNetConfig | DiTConfig = field(default_factory=MLPConfig)
    objective: ISD | DiagonalMatching = field(default_factory=ISD)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if isinstance(self.network, UNetConfig) and self.network.dropout and isinstance(self.objective, ISD):
            raise ConfigError(
                f"dropout {self.network.dropout} with iSD: dN/dt compares evaluations of one network, which dropout "
                "makes different ones; set --network.dropout 0"
            )


def flow_map_config(
    config: RunConfig,
    shape: tuple[int, ...],
    sigma_data: float,
    num_classes: int = 0,
    class_names: tuple[str, ...] = (),
    data_range: tuple[float, float] | None = None,
) -> FlowMapConfig:
    """The flow map of a run on data of this shape and standard deviation."""
    model = config.model
    sigma_data = sigma_data if model.sigma_data is None else model.sigma_data
    path = make_path(model.path, sigma_data)
    return FlowMapConfig(
        path=path,
        preconditioning=make_preconditioning(model.preconditioning, path, sigma_data),
        scaling=make_scaling(model.scaling, path, sigma_data),
        network=config.network,
        shape=shape,
        num_classes=num_classes,
        guided=config.objective.guided and num_classes > 0,
        sigma_data=sigma_data,
        class_names=class_names,
        data_range=data_range,
    )


def make_path(name: PathName, sigma_data: float) -> Path:
    """The path of that name with the published range."""
    match name:
        case "linear":
            return Linear()
        case "trig":
            return Trig(sigma_data)
        case "edm":
            return EDM()
        case "vp":
            return VP()


def make_preconditioning(name: PreconditioningName, path: Path, sigma_data: float) -> Preconditioning:
    """The preconditioning of that name on a path; raises ConfigError where it has no meaning."""
    match name:
        case "linear":
            return LinearPreconditioning()
        case "trig":
            if path.t_max > Trig().t_max + 1e-9:
                raise ConfigError(
                    "trig preconditioning needs a clock of at most pi/2: take the path trig, linear or vp"
                )
            return TrigPreconditioning()
        case "euler":
            return EulerPreconditioning(path)
        case "bcm":
            return BCMPreconditioning(sigma_data, path)


def make_scaling(name: ScalingName, path: Path, sigma_data: float) -> Scaling:
    """The inner scaling of that name."""
    match name:
        case "identity":
            return IdentityScaling()
        case "unit":
            return UnitScaling(sigma_data)
        case "edm":
            return EDMScaling(sigma_data, path)
        case "edm-input":
            return EDMInputScaling(sigma_data, path)
