"""A run's configuration: frozen dataclasses, and how it becomes a flow map."""

from dataclasses import dataclass, field
from typing import Literal

from fewstep.data.sources import DataConfig
from fewstep.flow.flow_map import FlowMapConfig
from fewstep.flow.paths import LinearPathConfig, PathConfig
from fewstep.flow.preconditioning.base import PreconditioningConfig
from fewstep.flow.preconditioning.jumps import LinearPreconditioningConfig
from fewstep.flow.preconditioning.network_scaling import IdentityScalingConfig, ScalingConfig
from fewstep.flow.preconditioning.regression import Measured
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.networks.base import NetworkConfig
from fewstep.networks.discriminator import DiscriminatorConfig
from fewstep.networks.mlp import MLPConfig
from fewstep.objectives import ISD, Objective
from fewstep.utils.errors import ConfigError
from fewstep.utils.parts import take_kinds
from fewstep.utils.serialization import later
from fewstep.utils.tensors import check_choice, check_least, check_positive, check_share


@dataclass(frozen=True)
class ModelConfig:
    """The flow map: which path, preconditioning and inner scaling; they share the data's standard deviation."""

    path: PathConfig = field(default_factory=LinearPathConfig)
    """From data to noise."""
    preconditioning: PreconditioningConfig = field(default_factory=LinearPreconditioningConfig)
    """What a jump X = f x + g N makes of the network's output N."""
    scaling: ScalingConfig = field(default_factory=IdentityScalingConfig)
    """Of the network's input and output."""
    sigma_data: float | None = None
    """Standard deviation of the data; None measures it on the training data."""

    def __post_init__(self) -> None:
        take_kinds(self)
        if self.sigma_data is not None:
            check_positive(sigma_data=self.sigma_data)
        self.preconditioning.check_scaling(self.scaling)

    @property
    def noise_clock(self) -> bool:
        """Whether the path's clock tells noise levels."""
        return self.path.noise_clock


@dataclass(frozen=True)
class OptimizerConfig:
    """What moves the weights, and how far."""

    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw for everything, adamw8bit for the same with moments in 8 bits (extra [bnb]), or muon for the matrices of
    the network's blocks and AdamW for the rest."""
    lr: float = 1e-4
    """Learning rate of AdamW."""
    matrix_lr: float = 5e-4
    """Learning rate of Muon."""
    beta1: float = 0.9
    """Decay of AdamW's average of gradients, in [0, 1)."""
    beta2: float = 0.99
    """Decay of AdamW's average of their squares, in [0, 1)."""
    weight_decay: float = 0.0
    """Each step takes this times the learning rate off the weights; 0 takes nothing."""
    clip: float = 1.0
    """Largest gradient norm; 0 never clips."""
    warmup_images: int = 10_000
    """Images over which the learning rate rises from 0."""
    warmup_share: float = later(float)
    """Largest share of the run, by images or seconds, over which it rises; 0 for no limit. A run that is shorter than
    its recipe, or ends by seconds, gets 0.05."""
    decay: Literal["constant", "cosine", "rsqrt"] = "constant"
    """After the warm-up: constant, cosine to 0, or 1/sqrt beyond decay_images (EDM2)."""
    decay_images: int = 1_000_000
    """Images after which rsqrt begins to fall; the other decays ignore it."""

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, matrix_lr=self.matrix_lr)
        check_least(0, clip=self.clip, warmup_images=self.warmup_images, weight_decay=self.weight_decay)
        check_least(1, decay_images=self.decay_images)
        if not 0 <= self.warmup_share <= 1:
            raise ConfigError(f"warmup_share is {self.warmup_share}; it must lie in [0, 1]")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(f"beta1 is {self.beta1} and beta2 {self.beta2}: they must lie in [0, 1)")


@dataclass(frozen=True)
class TrainingConfig:
    """Durations are in images seen, whatever the batch size."""

    images: int = 1_000_000
    """How long to train."""
    batch_size: int = 256
    """Global batch: over all processes and accumulation steps."""
    seed: int = 0
    """Decides the first weights, the order of the data, and every draw of noise and times."""
    precision: Literal["no", "bf16"] = "no"
    """bf16 evaluates the network in bfloat16 where that is safe (autocast); no does all in float32."""
    flip: bool = False
    """Mirror training images at random."""
    ema_power: tuple[float, ...] = (0.1,)
    """Relative widths of power-function averages (EDM2); the first average is the model that is sampled."""
    ema_decay: tuple[float, ...] = ()
    """Decays of constant averages, per step."""
    ema_ramp: bool = later(lambda: True)
    """Hold a constant average's decay to (1 + step)/(10 + step), so that short runs forget the first weights."""
    log_images: int = 12_800
    """Images between lines of the log."""
    sample_images: int = 100_000
    """Images between sample grids; 0 for none."""
    checkpoint_images: int = 100_000
    """Images between checkpoints."""
    checkpoint_seconds: float = later(lambda: 300.0)
    """Seconds after which there is a checkpoint all the same; 0 for none by time."""
    keep: int = 2
    """Checkpoints to keep."""
    seconds: float = 0.0
    """Longest training time in seconds; 0 for no limit. It makes the length of the run depend on the machine."""

    def __post_init__(self) -> None:
        check_least(1, images=self.images, batch_size=self.batch_size, log_images=self.log_images, keep=self.keep)
        check_least(1, checkpoint_images=self.checkpoint_images)
        check_least(
            0, sample_images=self.sample_images, seconds=self.seconds, checkpoint_seconds=self.checkpoint_seconds
        )
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
    guidance_scale: float = 1.0
    """Guidance when sampling; choose it by the Frechet distance."""
    gamma: float = 0.0
    """Of gamma-sampling: 1 re-noises fully between steps, as consistency models must; 0 is the map itself."""
    seed: int = 1000
    """Decides the noise that samples start from."""
    classes: Literal["data", "uniform"] = later(lambda: "data")
    """Classes of the samples: data gives them the shares that they have in the held-out data, uniform equal ones."""
    curve_images: int = 0
    """Images between points of the learning curve that `fewstep compare` reads; 0 for none."""
    curve_steps: tuple[int, ...] = (1, 2)
    """Step counts that the learning curve measures."""
    curve_samples: int = 1000
    """Generated samples per point of the learning curve."""

    def __post_init__(self) -> None:
        for name, steps in (("steps", self.steps), ("curve_steps", self.curve_steps)):
            if min(steps, default=0) < 1:
                raise ConfigError(f"{name} is {steps}; it needs at least one step count, each at least 1")
        check_least(1, reference_steps=self.reference_steps)
        check_least(4, samples=self.samples, curve_samples=self.curve_samples)
        check_least(0, curve_images=self.curve_images)
        check_share("gamma", self.gamma)
        check_positive(guidance_scale=self.guidance_scale)


@dataclass(frozen=True)
class StatisticsConfig:
    """How the statistics of an analytic preconditioning are estimated (fewstep.flow.preconditioning.statistics)."""

    points: int = 120
    """Noise levels, uniform in lambda."""
    samples: int = 256
    """Samples at each level."""
    probes: int = 1
    """Rademacher probes of the trace; 0 uses Stein's identity; -1 is exact up to 64 dimensions, else one probe."""
    centred: bool = True
    """About the data's mean; otherwise about zero, as published."""
    shrink: bool = True
    """Draw uncertain estimates at high noise to their limit."""
    use: Literal["both", "l", "s"] = "both"
    """Ablation: leave the other one at zero (s estimated afresh for l = 0)."""
    refresh_images: int = 0
    """Images between estimates from the averaged model itself; 0 estimates from the teacher, once."""
    seed: int = 0
    """Decides which samples are drawn, their noise and the probes."""
    classes: Literal["pooled", "origin"] = later(lambda: "pooled")
    """Of data with classes: about the mean of all data, or (origin) each sample about that of its class."""

    def __post_init__(self) -> None:
        check_choice("classes", self.classes, ("pooled", "origin"))
        if self.classes == "origin" and not self.centred:
            raise ConfigError("statistics about the means of classes are centred: leave --statistics.no-centred out")
        check_least(4, points=self.points)
        check_least(2, samples=self.samples)
        check_least(0, refresh_images=self.refresh_images)
        check_least(-1, probes=self.probes)


@dataclass(frozen=True)
class GANConfig:
    """The discriminator of an adversarial loss; used where the objective's adversarial weight is positive."""

    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    lr: float = 5e-4
    """Learning rate of the discriminator's AdamW, above 0."""
    start_images: int = 0
    """Images after which the adversarial loss begins."""

    def __post_init__(self) -> None:
        check_positive(**{"the discriminator's lr": self.lr})
        check_least(0, start_images=self.start_images)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the weights of a run, and what is measured of it."""

    recipe: str
    """Name of the recipe, which the command line has given already: leave this out."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    network: NetworkConfig = field(default_factory=MLPConfig)
    objective: Objective = field(default_factory=ISD)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    teacher: str = ""
    """Model to distil: a run, a saved model, a folder of diffusers, a network pickle of EDM, OWNER/NAME of one of these
    folders on the Hugging Face Hub, or FILE.py:NAME; its statistics serve an analytic preconditioning."""
    initial: str = ""
    """Run or saved model whose weights the network starts from; "teacher" for the teacher's own."""
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)
    gan: GANConfig = field(default_factory=GANConfig)

    def __post_init__(self) -> None:
        objective = type(self.objective).__name__
        if self.network.stochastic and self.objective.differentiates:
            raise ConfigError(
                f"dropout with {objective}: dN/dt compares evaluations of one network, which dropout makes different "
                "ones; set --network.dropout 0"
            )
        if self.model.preconditioning.data_end_only:
            self._check_data_end()
        if not self.objective.anchored:
            raise ConfigError(
                f"{objective} without samples at s = t learns nothing of the data: any map that agrees with itself "
                "would do (docs/explanation/why-an-anchor.md); give it a share of them"
            )

    def _check_data_end(self) -> None:
        if self.objective.needs_velocity:
            raise ConfigError(
                f"cm preconditioning jumps to the data end alone and has no velocity, which "
                f"{type(self.objective).__name__} needs: train CT, ECT or CD with it, or take bcm"
            )
        curve = self.evaluation.curve_steps if self.evaluation.curve_images else ()
        if max((*self.evaluation.steps, *curve)) > 1 and self.evaluation.gamma != 1:
            raise ConfigError(
                "cm preconditioning jumps to the data end alone, so that several steps take new noise in between: set "
                f"--evaluation.gamma 1 in place of {self.evaluation.gamma}"
            )


def flow_map_config(
    config: RunConfig,
    shape: tuple[int, ...],
    sigma_data: float,
    num_classes: int = 0,
    statistics: TrajectoryStatistics | None = None,
    observation: tuple[int, ...] = (),
    teacher: FlowMapConfig | None = None,
    measured: Measured | None = None,
) -> FlowMapConfig:
    """The flow map of a run on such data; statistics: for an analytic preconditioning; observation: a policy's.

    teacher: whose path, inner scaling and network are taken where the run says so. measured: for a skip.
    """
    model = config.model
    sigma_data = sigma_data if model.sigma_data is None else model.sigma_data
    path = model.path.beside(None if teacher is None else teacher.path, sigma_data)
    built = model.preconditioning.build(path, sigma_data, statistics)
    preconditioning = model.preconditioning.let_through(built, path, measured)
    own = None if teacher is None else teacher.scaling
    return FlowMapConfig(
        path=path,
        preconditioning=preconditioning,
        scaling=model.scaling.beside(own, path, sigma_data, preconditioning.denoises),
        network=config.network.beside(None if teacher is None else teacher.network),
        shape=shape,
        num_classes=num_classes,
        guided=config.objective.guided and num_classes > 0,
        sigma_data=sigma_data,
        observation=observation,
    )
