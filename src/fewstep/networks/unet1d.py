"""A U-Net along time for chunks of actions, conditioned by FiLM, after Diffusion Policy (2303.04137) and Janner's
diffuser (2205.09991)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.networks.base import Network, NetworkConfig
from fewstep.networks.condition import Condition
from fewstep.networks.layers import ConditionEmbedding, Conv1d, GroupNorm, Linear, check_inputs, silu
from fewstep.utils.errors import ConfigError


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

    def build(
        self, shape: tuple[int, ...], num_classes: int, guided: bool, observation: tuple[int, ...] = ()
    ) -> UNet1d:
        return UNet1d(self, shape, num_classes, guided, observation)


class UNet1d(Network):
    """Convolution, a stack of residual blocks down and one up with skips, a convolution that starts at zero.

    Samples are (B, steps, channels); each step of the chunk is a position. A residual block's scale and shift per
    channel (FiLM, 1709.07871) are linear in the embedding of times, observations and labels.
    """

    def __init__(
        self,
        config: UNet1dConfig,
        shape: tuple[int, ...],
        num_classes: int,
        guided: bool,
        observation: tuple[int, ...] = (),
    ) -> None:
        super().__init__(shape, num_classes, guided, observation)
        _check(config, self.shape)
        size, width = self.shape[1], config.embedding_width
        self.embedding = ConditionEmbedding(width, num_classes, guided, config.max_frequency, observation)
        channels = [config.width * factor for factor in config.multipliers]
        last = len(channels) - 1
        self.input = _convolution(size, channels[0], config.kernel)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, own in enumerate(channels):
            before = channels[max(level - 1, 0)]
            self.down.append(_stage(config, [before if index == 0 else own for index in range(config.blocks)], own))
        self.middle = ResidualBlock1d(channels[-1], channels[-1], config)
        for level in range(last, -1, -1):
            own, below = channels[level], channels[min(level + 1, last)]
            widths = [(below if index == 0 else own) + own for index in range(config.blocks)]
            self.up.append(_stage(config, widths, own))
        self.norm = GroupNorm(channels[0])
        self.output = _zeroed(_convolution(channels[0], size, config.kernel))

    @property
    def last_layer(self) -> Tensor:
        return self.output.weight

    def freeze_second_time(self) -> None:
        self.embedding.s_branch.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        check_inputs(x, t, s, self.shape)
        embedding = silu(self.embedding(t, s, cond))
        h = self.input(x.transpose(1, 2))
        skips: list[Tensor] = []
        for level, stage in enumerate(self.down):
            h = functional.avg_pool1d(h, 2) if level else h
            for block in stage.children():
                h = block(h, embedding)
                skips.append(h)
        h = self.middle(h, embedding)
        for level, stage in enumerate(self.up):
            h = functional.interpolate(h, scale_factor=2.0, mode="nearest") if level else h
            for block in stage.children():
                h = block(torch.cat([h, skips.pop() * 0.5**0.5], 1), embedding)
        out: Tensor = self.output(silu(self.norm(h)))
        return out.transpose(1, 2)


class ResidualBlock1d(nn.Module):
    """h = conv(silu(norm(x))); h = conv(silu(norm(h) * (1 + scale) + shift)), zero at first; skip(x) + h.

    x (B, C_in, T) -> (B, C_out, T); scale and shift are linear in the embedding (B, E), skip a 1x1 convolution where
    the channels change.
    """

    def __init__(self, wide_in: int, wide_out: int, config: UNet1dConfig) -> None:
        super().__init__()
        self.first_norm = GroupNorm(wide_in)
        self.first = _convolution(wide_in, wide_out, config.kernel)
        self.modulation = Linear(config.embedding_width, 2 * wide_out)
        self.last_norm = GroupNorm(wide_out)
        self.last = _zeroed(_convolution(wide_out, wide_out, config.kernel))
        self.skip = nn.Identity() if wide_in == wide_out else Conv1d(wide_in, wide_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding).chunk(2, 1)
        h = self.first(silu(self.first_norm(x)))
        h = self.last(silu(self.last_norm(h, scale, shift)))
        out: Tensor = self.skip(x) + h
        return out


def _stage(config: UNet1dConfig, widths: list[int], own: int) -> nn.ModuleList:
    """The residual blocks of one level in one direction, to `own` channels."""
    return nn.ModuleList([ResidualBlock1d(width, own, config) for width in widths])


def _convolution(wide_in: int, wide_out: int, kernel: int) -> nn.Conv1d:
    return Conv1d(wide_in, wide_out, kernel, padding=kernel // 2)


def _zeroed(convolution: nn.Conv1d) -> nn.Conv1d:
    nn.init.zeros_(convolution.weight)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution


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
