"""A U-Net along time for chunks of actions, conditioned by FiLM, after Diffusion Policy (2303.04137) and Janner's
diffuser (2205.09991)."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from fewstep.networks.base import NetworkConfig, Shape
from fewstep.networks.condition import Condition
from fewstep.networks.layers import ConditionEmbedding, Conv1d, GroupNorm, check_inputs, silu, zeroed
from fewstep.networks.pyramid import Pyramid, ResidualBlock, same_size, widths_down, widths_up
from fewstep.utils.errors import ConfigError
from fewstep.utils.serialization import later


@dataclass(frozen=True)
class UNet1dConfig(NetworkConfig):
    """Settings of UNet1d."""

    width: int = 64
    """Channels at full length."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channels at each level over `width`, each level halving the length of the one before."""
    blocks: int = 1
    """Residual blocks per level on the way down, and as many on the way up."""
    kernel: int = 5
    """Length of the convolutions, odd."""
    embedding_width: int = 128
    """Width of the embedding of times and observations."""
    max_frequency: float = 16.0
    """Highest frequency of the time embedding, radians per unit of t: the higher, the finer, but d/dt is noisier."""

    sees_skip: bool = later(bool)
    """Show it what a skip lets through (--model.preconditioning skip)."""

    def build(self, shape: Shape, num_classes: int, guided: bool, observation: Shape = ()) -> "UNet1d":
        return UNet1d(self, shape, num_classes, guided, observation)


class UNet1d(Pyramid):
    """Convolution, a stack of residual blocks down and one up with skips, a convolution that starts at zero.

    Samples are (B, steps, channels); each step of the chunk is a position. A residual block's scale and shift per
    channel (FiLM, 1709.07871) are linear in the embedding of times, observations and labels.
    """

    def __init__(self, config: UNet1dConfig, shape: Shape, num_classes: int, guided: bool, observation: Shape) -> None:
        super().__init__(shape, num_classes, guided, observation)
        _check(config, self.shape)
        size, width = self.shape[1], config.embedding_width
        self.embedding = ConditionEmbedding(width, num_classes, guided, config.max_frequency, observation)
        channels = [config.width * factor for factor in config.multipliers]

        def block(widths: tuple[int, int]) -> ResidualBlock:
            return ResidualBlock(widths, width, Conv1d, config.kernel)

        down, up = widths_down(channels, config.blocks), widths_up(channels, config.blocks)
        self.input = same_size(Conv1d, size, channels[0], config.kernel)
        # `up` is registered before `middle` is drawn: optimisers number parameters, in files too, by that order.
        self.down, self.up = nn.ModuleList(nn.ModuleList(map(block, stage)) for stage in down), nn.ModuleList()
        self.middle = block((channels[-1], channels[-1]))
        self.up.extend(nn.ModuleList(map(block, stage)) for stage in up)
        self.norm = GroupNorm(channels[0])
        self.output = zeroed(same_size(Conv1d, channels[0], size, config.kernel))
        if config.sees_skip:
            half = config.kernel // 2
            self.see_skip(Conv1d(size, channels[0], config.kernel, padding=half, bias=False), width)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        check_inputs(x, t, s, self.shape)
        embedding = silu(self.embedding(t, s, cond))
        h = self.input(x.transpose(1, 2))
        h = self.with_seen(h, cond, lambda seen: seen.transpose(1, 2))
        h, skips = self.descend(h, embedding, functional.avg_pool1d)
        out: Tensor = self.output(self.climb(self.residual(self.middle, h, embedding), embedding, skips))
        return self.gated(out.transpose(1, 2), embedding, cond)


def _check(config: UNet1dConfig, shape: tuple[int, ...]) -> None:
    """Raise ConfigError where the settings make no network for this shape."""
    if len(shape) != 2:
        raise ConfigError(f"a U-Net along time takes chunks (steps, channels), not samples of shape {shape}")
    least = min(config.width, config.blocks, config.kernel, *config.multipliers) if config.multipliers else 0
    if least < 1 or config.kernel % 2 == 0:
        raise ConfigError(f"a U-Net needs width, blocks and multipliers of at least 1 and an odd kernel: {config}")
    factor = 2 ** (len(config.multipliers) - 1)
    if shape[0] % factor:
        raise ConfigError(
            f"chunks of {shape[0]} steps cannot be halved {len(config.multipliers) - 1} times: take a horizon "
            f"divisible by {factor}, or fewer multipliers"
        )
