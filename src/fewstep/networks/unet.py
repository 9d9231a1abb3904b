"""A convolutional U-Net of the family of DDPM++ (2011.13456) and ADM (2105.05233), with cheap resampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.networks.base import Network, NetworkConfig
from fewstep.networks.condition import Condition
from fewstep.networks.layers import ConditionEmbedding, Conv2d, GroupNorm, Linear, attention, check_inputs, silu, zeroed
from fewstep.utils.errors import ConfigError


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

    @property
    def stochastic(self) -> bool:
        return self.dropout > 0

    def build(self, shape: tuple[int, ...], num_classes: int, guided: bool, observation: tuple[int, ...] = ()) -> UNet:
        return UNet(self, shape, num_classes, guided, observation)


class UNet(Network):
    """Residual blocks on a pyramid of resolutions with skip connections across: (B, C, H, W) -> (B, C, H, W).

    Raises ConfigError unless H and W are divisible by patch 2^(levels - 1). Any memory layout works; on a CPU,
    `network.to(memory_format=torch.channels_last)` is often faster.
    """

    def __init__(
        self,
        config: UNetConfig,
        shape: tuple[int, ...],
        num_classes: int,
        guided: bool,
        observation: tuple[int, ...] = (),
    ) -> None:
        super().__init__(shape, num_classes, guided, observation)
        _check(config, self.shape)
        channels = [config.width * multiplier for multiplier in config.multipliers]
        levels = range(len(channels))
        height = self.shape[1] // config.patch
        self.patch = config.patch
        folded = self.shape[0] * config.patch**2
        self.embedding = ConditionEmbedding(
            config.embedding_width, num_classes, guided, config.max_frequency, observation
        )
        self.input = _convolution(folded, channels[0])
        self.down = nn.ModuleList()
        for level in levels:
            first = channels[max(level - 1, 0)]
            widths = [(first if index == 0 else channels[level], channels[level]) for index in range(config.blocks)]
            self.down.append(_stage(config, widths, height >> level))
        bottom = channels[-1]
        self.middle = _stage(config, [(bottom, bottom)], height >> levels[-1])
        self.up = nn.ModuleList()
        for level in reversed(levels):
            below = channels[min(level + 1, levels[-1])]
            widths = [(below if index == 0 else channels[level], channels[level]) for index in range(config.blocks)]
            self.up.append(_stage(config, [(i + channels[level], o) for i, o in widths], height >> level))
        self.norm = GroupNorm(channels[0])
        self.output = _zeroed_convolution(channels[0], folded)

    @property
    def last_layer(self) -> Tensor:
        return self.output.weight

    def freeze_second_time(self) -> None:
        self.embedding.s_branch.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        check_inputs(x, t, s, self.shape)
        embedding = silu(self.embedding(t, s, cond))
        h = self.input(functional.pixel_unshuffle(x, self.patch))
        skips: list[Tensor] = []
        for level, stage in enumerate(self.down):
            h = functional.avg_pool2d(h, 2) if level else h
            for block in stage.children():
                h = block(h, embedding)
                skips.append(h)
        for block in self.middle:
            h = block(h, embedding)
        for level, stage in enumerate(self.up):
            h = functional.interpolate(h, scale_factor=2.0, mode="nearest") if level else h
            for block in stage.children():
                h = block(torch.cat([h, skips.pop() * 0.5**0.5], 1), embedding)
        out: Tensor = functional.pixel_shuffle(self.output(silu(self.norm(h))), self.patch)
        return out


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, the second starting at zero, and attention where asked for: (B, C_in, H, W) -> C_out.

    h = conv(silu(norm(x))); h = conv(silu(norm(h) * (1 + scale) + shift)); skip(x) + h, with scale and shift linear
    in the embedding (B, E) and skip a 1x1 convolution where the channels change.
    """

    def __init__(self, channels: tuple[int, int], config: UNetConfig, attend: bool) -> None:
        super().__init__()
        wide_in, wide_out = channels
        self.dropout = config.dropout
        self.first_norm = GroupNorm(wide_in)
        self.first = _convolution(wide_in, wide_out)
        self.modulation = Linear(config.embedding_width, 2 * wide_out)
        self.last_norm = GroupNorm(wide_out)
        self.last = _zeroed_convolution(wide_out, wide_out)
        self.skip = nn.Identity() if wide_in == wide_out else Conv2d(wide_in, wide_out, 1)
        self.attend = SelfAttention(wide_out, config.head_width) if attend else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding).chunk(2, 1)
        h = self.first(silu(self.first_norm(x)))
        h = silu(self.last_norm(h, scale, shift))
        h = functional.dropout(h, self.dropout, self.training) if self.dropout else h
        out: Tensor = self.attend(self.skip(x) + self.last(h))
        return out


class SelfAttention(nn.Module):
    """x + project(attention(norm(x))) over all positions, the projection zero at first; x (B, C, H, W)."""

    def __init__(self, channels: int, head_width: int) -> None:
        super().__init__()
        if head_width < 1 or channels % head_width:
            raise ConfigError(
                f"{channels} channels do not split into attention heads of head_width {head_width}: change either"
            )
        self.heads = channels // head_width
        self.norm = GroupNorm(channels)
        self.qkv = Linear(channels, 3 * channels)
        self.project = zeroed(Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed: Tensor = self.project(attention(q, k, v).transpose(1, 2).flatten(2))
        return x + mixed.transpose(1, 2).reshape(x.shape)


def _stage(config: UNetConfig, widths: list[tuple[int, int]], height: int) -> nn.ModuleList:
    """The residual blocks of one level in one direction."""
    return nn.ModuleList([ResidualBlock(pair, config, height in config.attention) for pair in widths])


def _convolution(wide_in: int, wide_out: int) -> nn.Conv2d:
    return Conv2d(wide_in, wide_out, 3, padding=1)


def _zeroed_convolution(wide_in: int, wide_out: int) -> nn.Conv2d:
    convolution = _convolution(wide_in, wide_out)
    nn.init.zeros_(convolution.weight)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution


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
