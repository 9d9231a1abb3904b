"""A convolutional U-Net of the family of DDPM++ (2011.13456) and ADM (2105.05233), with cheap resampling."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from fewstep.networks.base import NetworkConfig, Shape
from fewstep.networks.condition import Condition
from fewstep.networks.layers import ConditionEmbedding, Conv2d, GroupNorm, check_inputs, silu, zeroed
from fewstep.networks.pyramid import Pyramid, ResidualBlock, Widths, same_size, widths_down, widths_up
from fewstep.utils.errors import ConfigError
from fewstep.utils.serialization import later


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """Settings of UNet."""

    width: int = 64
    """Channels at full resolution."""
    multipliers: tuple[int, ...] = (1, 2, 2)
    """Channels at each level over `width`, each level halving the resolution of the one before."""
    blocks: int = 2
    """Residual blocks per level on the way down, and as many on the way up."""
    attention: tuple[int, ...] = (16, 8, 7)
    """Heights of the feature maps that get self-attention; those that do not occur are ignored."""
    head_width: int = 32
    """Channels per attention head."""
    embedding_width: int = 256
    """Width of the embedding of times and conditions."""
    dropout: float = 0.0
    """Probability in [0, 1) inside residual blocks; 0 with objectives that differentiate the network in time."""
    max_frequency: float = 64.0
    """Highest frequency of the time embedding, radians per unit of t: the higher, the finer, but d/dt is noisier."""
    patch: int = 1
    """Side of the pixel blocks folded into channels (2301.11093): 2 makes every level a quarter as large and costly."""

    sees_skip: bool = later(bool)
    """Show it what a skip lets through (--model.preconditioning skip)."""

    @property
    def stochastic(self) -> bool:
        return self.dropout > 0

    def build(self, shape: Shape, num_classes: int, guided: bool, observation: Shape = ()) -> "UNet":
        return UNet(self, shape, num_classes, guided, observation)


class UNet(Pyramid):
    """Residual blocks on a pyramid of resolutions with skip connections across: (B, C, H, W) -> (B, C, H, W).

    Raises ConfigError unless H and W are divisible by patch 2^(levels - 1). Any memory layout works; on a CPU,
    `network.to(memory_format=torch.channels_last)` is often faster.
    """

    def __init__(self, config: UNetConfig, shape: Shape, num_classes: int, guided: bool, observation: Shape) -> None:
        super().__init__(shape, num_classes, guided, observation)
        _check(config, self.shape)
        channels = [config.width * multiplier for multiplier in config.multipliers]
        heights = [(self.shape[1] // config.patch) >> level for level in range(len(channels))]
        self.patch = config.patch
        folded = self.shape[0] * config.patch**2
        width = config.embedding_width
        self.embedding = ConditionEmbedding(width, num_classes, guided, config.max_frequency, observation)
        self.input = same_size(Conv2d, folded, channels[0], 3)
        down, up = widths_down(channels, config.blocks), widths_up(channels, config.blocks)
        self.down = nn.ModuleList(_stage(config, *stage) for stage in zip(down, heights, strict=True))
        self.middle = _stage(config, [(channels[-1], channels[-1])], heights[-1])
        self.up = nn.ModuleList(_stage(config, *stage) for stage in zip(up, reversed(heights), strict=True))
        self.norm = GroupNorm(channels[0])
        self.output = zeroed(same_size(Conv2d, channels[0], folded, 3))
        if config.sees_skip:
            self.see_skip(Conv2d(folded, channels[0], 3, padding=1, bias=False), width)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        check_inputs(x, t, s, self.shape)
        embedding = silu(self.embedding(t, s, cond))
        h = self.input(functional.pixel_unshuffle(x, self.patch))
        h = self.with_seen(h, cond, lambda seen: functional.pixel_unshuffle(seen, self.patch))
        h, skips = self.descend(h, embedding, functional.avg_pool2d)
        for block in self.middle:
            h = self.residual(block, h, embedding)
        out = functional.pixel_shuffle(self.output(self.climb(h, embedding, skips)), self.patch)
        return self.gated(out, embedding, cond)


def _stage(config: UNetConfig, widths: Widths, height: int) -> nn.ModuleList:
    """The residual blocks of one level in one direction, with attention at the heights that ask for it."""
    head = config.head_width if height in config.attention else None
    width, dropout = config.embedding_width, config.dropout
    return nn.ModuleList(ResidualBlock(pair, width, Conv2d, dropout=dropout, head_width=head) for pair in widths)


def _check(config: UNetConfig, shape: tuple[int, ...]) -> None:
    """Raise ConfigError where the settings make no network for this shape."""
    if len(shape) != 3:
        raise ConfigError(f"a U-Net takes images (channels, height, width), not samples of shape {shape}")
    if not config.multipliers or min(config.width, config.blocks, config.patch, *config.multipliers) < 1:
        raise ConfigError(f"a U-Net needs width, blocks, multipliers and patch of at least 1: {config}")
    if not 0 <= config.dropout < 1:
        raise ConfigError(f"dropout {config.dropout} must lie in [0, 1)")
    levels = len(config.multipliers)
    factor = config.patch * 2 ** (levels - 1)
    if shape[1] % factor or shape[2] % factor:
        raise ConfigError(
            f"images of {shape[1]}x{shape[2]} cannot be halved {levels - 1} times: {levels} levels of patch "
            f"{config.patch} need a height and width divisible by {factor}; pass fewer multipliers, or images of "
            "another size (--data.image-size)"
        )
