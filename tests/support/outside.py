"""One part of each kind, as a user writes them in a file of their own; tests train, resume and measure them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewstep.data.base import Loaded, Samples
from fewstep.data.sources import DataConfig, ImageSource
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import EDM, Path, PathConfig, PathValues
from fewstep.flow.preconditioning.base import Preconditioning, PreconditioningConfig
from fewstep.flow.preconditioning.network_scaling import Scaling, ScalingConfig, ScalingValues
from fewstep.networks.base import Network, NetworkConfig
from fewstep.networks.condition import Condition
from fewstep.objectives import ALONE, Batch, Companions, DiagonalMatching, Losses, Objective
from fewstep.recipes import recipe
from fewstep.recipes.config import RunConfig
from fewstep.teachers import TeacherModel


@dataclass(frozen=True)
class ScaledMatching(Objective):
    """Flow matching times a number."""

    scale: float = 2.0
    """What the loss is multiplied by."""
    label_dropout: float = 0.0

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        losses = DiagonalMatching()(flow_map, batch, companions)
        return replace(losses, loss=self.scale * losses.loss)


@dataclass(frozen=True)
class BentPath(Path):
    """alpha = 1 - t^power, sigma = t."""

    power: float = 2.0
    t_min = 0.0
    t_max = 1.0

    def values(self, t: Tensor) -> PathValues:
        falling = -self.power * t ** (self.power - 1)
        return PathValues(1 - t**self.power, t, falling, torch.ones_like(t))

    def time_from_tau(self, tau: Tensor) -> Tensor:
        """For power 2: t / (1 - t^2) = tau."""
        return 2 * tau / (1 + torch.sqrt(1 + 4 * tau**2))


@dataclass(frozen=True)
class BentPathConfig(PathConfig):
    """A path that leaves the data slowly."""

    def build(self, sigma_data: float) -> Path:
        return BentPath()


@dataclass(frozen=True)
class SteepPreconditioning(Preconditioning):
    """f = 1, g = rate (s - t)."""

    rate: float = 2.0

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        g = self.rate * (s - t)
        return torch.ones_like(g), g

    def diagonal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.full_like(t, self.rate)


@dataclass(frozen=True)
class SteepPreconditioningConfig(PreconditioningConfig):
    """The mean velocity over a rate."""

    rate: float = 2.0
    """What the network's output is multiplied by."""

    def build(self, path: Path, sigma_data: float, statistics: object = None) -> Preconditioning:
        return SteepPreconditioning(self.rate)


@dataclass(frozen=True)
class HalfScaling(Scaling):
    """The network reads half of x."""

    def values(self, t: Tensor) -> ScalingValues:
        one = torch.ones_like(t)
        return ScalingValues(torch.zeros_like(t), one, one / 2)

    def c_noise(self, t: Tensor) -> Tensor:
        return t


@dataclass(frozen=True)
class HalfScalingConfig(ScalingConfig):
    """Half of the input."""

    def build(self, path: Path, sigma_data: float) -> Scaling:
        return HalfScaling()


class Layer(Network):
    """A linear layer of the sample and its two times."""

    def __init__(
        self, shape: tuple[int, ...], num_classes: int, guided: bool, observation: tuple[int, ...] = ()
    ) -> None:
        super().__init__(shape, num_classes, guided, observation)
        size = int(torch.tensor(shape).prod())
        self.layer = nn.Linear(size + 2, size)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        found: Tensor = self.layer(torch.cat([x.flatten(1), t[:, None], s[:, None]], dim=1))
        return found.reshape(x.shape)


@dataclass(frozen=True)
class LayerConfig(NetworkConfig):
    """Settings of Layer, which has none."""

    def build(
        self, shape: tuple[int, ...], num_classes: int, guided: bool, observation: tuple[int, ...] = ()
    ) -> Network:
        return Layer(shape, num_classes, guided, observation)


@dataclass(frozen=True)
class BandsSource(ImageSource):
    """Bright columns on noise, in as many classes as there are places for them."""

    width: int = 4
    """Side of an image."""

    reads_root = False

    def load(self, settings: DataConfig) -> Loaded:
        generator = torch.Generator().manual_seed(settings.seed)
        labels = torch.arange(200) % self.width
        values = 0.1 * torch.randn(200, 1, self.width, self.width, generator=generator)
        values[torch.arange(200), :, :, labels] += 0.5
        return Loaded("bands", Samples(values, labels), None, tuple(str(k) for k in range(self.width)))


class MeanTeacher(TeacherModel):
    """The denoiser of a standard normal distribution on EDM's path: x / (1 + t^2)."""

    def __init__(self) -> None:
        super().__init__(EDM(), (1, 6, 6), num_classes=6)
        self.register_buffer("variance", torch.ones(()))

    def denoise(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        noise = t.reshape(-1, 1, 1, 1) ** 2
        return x * self.variance / (self.variance + noise)


def outside() -> RunConfig:
    """Ten steps on digits with nothing but parts of this file."""
    base = recipe("digits")
    return replace(
        base,
        recipe="outside",
        data=DataConfig(source=BandsSource(width=6)),
        model=replace(
            base.model,
            path=BentPathConfig(),
            preconditioning=SteepPreconditioningConfig(3.0),
            scaling=HalfScalingConfig(),
        ),
        network=LayerConfig(),
        objective=ScaledMatching(),
        optimizer=replace(base.optimizer, warmup_images=0),
        training=replace(
            base.training, images=320, batch_size=32, log_images=64, checkpoint_images=96, sample_images=160
        ),
        evaluation=replace(
            base.evaluation, steps=(1, 2), samples=64, reference_steps=4,
            curve_images=160, curve_steps=(1,), curve_samples=64,
        ),
    )  # fmt: skip


def _helper() -> None:
    """Private functions are no recipes."""
