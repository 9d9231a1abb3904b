"""What the U-Nets share in one and two dimensions: residual blocks on a pyramid of resolutions, with skips across."""

from collections.abc import Callable, Iterable
from itertools import chain, repeat

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.networks.attention import attention
from fewstep.networks.base import EmbeddingNetwork
from fewstep.networks.layers import Conv1d, Conv2d, GroupNorm, LinearLayer, silu, zeroed
from fewstep.utils.errors import ConfigError

Convolution = type[Conv1d] | type[Conv2d]
Widths = Iterable[tuple[int, int]]


class Pyramid(EmbeddingNetwork):
    """Stages of blocks h = block(h, embedding) down the levels and up again, each level half as long as the one before.

    Skips join the blocks of one level, scaled by sqrt(1/2) so that they leave the variance as it is.
    """

    compiles = True
    down: nn.ModuleList
    up: nn.ModuleList
    norm: GroupNorm

    def residual(self, block: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        """block(h, embedding), as `apply_block` does."""
        return self.apply_block(block, h, embedding, draws=self.training and getattr(block, "dropout", 0.0) > 0)

    def descend(self, h: Tensor, embedding: Tensor, halve: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(h, skips) after the stages down; halve(h, 2) pools over pairs of positions."""
        skips: list[Tensor] = []
        for level, stage in enumerate(self.down):
            h = halve(h, 2) if level else h
            for block in stage.children():
                h = self.residual(block, h, embedding)
                skips.append(h)
        return h, skips

    def climb(self, h: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        """h after the stages up, which use the skips up, and the last norm."""
        for level, stage in enumerate(self.up):
            h = functional.interpolate(h, scale_factor=2.0, mode="nearest") if level else h
            for block in stage.children():
                h = self.residual(block, torch.cat([h, skips.pop() * 0.5**0.5], 1), embedding)
        return silu(self.norm(h))


def widths_down(channels: list[int], blocks: int) -> list[Widths]:
    """(channels in, out) of the blocks of every stage down, from full resolution."""
    befores = [channels[0], *channels[:-1]]
    return [_stage((before, own), (own, own), blocks) for before, own in zip(befores, channels, strict=True)]


def widths_up(channels: list[int], blocks: int) -> list[Widths]:
    """(channels in, out) of the blocks of every stage up, from the lowest resolution; a skip adds to those in."""
    rising = zip([channels[-1], *channels[:0:-1]], reversed(channels), strict=True)
    return [_stage((below + own, own), (2 * own, own), blocks) for below, own in rising]


def _stage(first: tuple[int, int], others: tuple[int, int], blocks: int) -> Widths:
    """However many, they are listed as they are built: a file may name any number."""
    return chain([first], repeat(others, blocks - 1))


def same_size(convolution: Convolution, wide_in: int, wide_out: int, kernel: int) -> Conv1d | Conv2d:
    """A convolution of odd `kernel` that keeps the number of positions."""
    return convolution(wide_in, wide_out, kernel, padding=kernel // 2)


class ResidualBlock(nn.Module):
    """Two convolutions, the second starting at zero, and attention where asked for: (B, C_in, *positions) -> C_out.

    h = conv(silu(norm(x))); h = conv(silu(norm(h) * (1 + scale) + shift)); skip(x) + h, with scale and shift linear
    in the embedding (B, E) (FiLM, 1709.07871) and skip of kernel 1 where the channels change.
    head_width: channels per attention head, None for no attention.
    """

    def __init__(
        self,
        channels: tuple[int, int],
        embedding_width: int,
        convolution: Convolution,
        kernel: int = 3,
        *,
        dropout: float = 0.0,
        head_width: int | None = None,
    ) -> None:
        super().__init__()
        wide_in, wide_out = channels
        self.dropout = dropout
        self.first_norm = GroupNorm(wide_in)
        self.first = same_size(convolution, wide_in, wide_out, kernel)
        self.modulation = LinearLayer(embedding_width, 2 * wide_out)
        self.last_norm = GroupNorm(wide_out)
        self.last = zeroed(same_size(convolution, wide_out, wide_out, kernel))
        self.skip = nn.Identity() if wide_in == wide_out else convolution(wide_in, wide_out, 1)
        self.attend = nn.Identity() if head_width is None else AttentionBlock(wide_out, head_width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding).chunk(2, 1)
        h = self.first(silu(self.first_norm(x)))
        h = silu(self.last_norm(h, scale, shift))
        h = functional.dropout(h, self.dropout, self.training) if self.dropout else h
        out: Tensor = self.attend(self.skip(x) + self.last(h))
        return out


class AttentionBlock(nn.Module):
    """x + project(attention(norm(x))) over all positions, the projection zero at first; x (B, C, *positions)."""

    def __init__(self, channels: int, head_width: int) -> None:
        super().__init__()
        if head_width < 1 or channels % head_width:
            raise ConfigError(
                f"{channels} channels do not split into attention heads of head_width {head_width}: change either"
            )
        self.heads = channels // head_width
        self.norm = GroupNorm(channels)
        self.qkv = LinearLayer(channels, 3 * channels)
        self.project = zeroed(LinearLayer(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed: Tensor = self.project(attention(q, k, v).transpose(1, 2).flatten(2))
        return x + mixed.transpose(1, 2).reshape(x.shape)
