"""The diffusion transformer DiT (2212.09748) with rotary positions, RMS norms and gated MLPs."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.networks.attention import attention
from fewstep.networks.base import EmbeddingNetwork, NetworkConfig, Shape
from fewstep.networks.condition import Condition
from fewstep.networks.layers import (
    ConditionEmbedding,
    LinearLayer,
    RMSNorm,
    RotaryEmbedding2d,
    check_inputs,
    silu,
    zeroed,
)
from fewstep.utils.errors import ConfigError
from fewstep.utils.serialization import later

_PUBLISHED = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, depth and heads of each size in table 1 of 2212.09748."""


@dataclass(frozen=True)
class DiTConfig(NetworkConfig):
    """Settings of DiT."""

    width: int = 384
    """Width of a token, a multiple of 4 times `heads`."""
    depth: int = 12
    """Transformer blocks."""
    heads: int = 6
    """Attention heads."""
    patch: int = 2
    """Side in pixels of the square in one token: at half of it the tokens are four times as many."""
    mlp_ratio: float = 4.0
    """Hidden width of a plain MLP over `width`; the gated MLP gets two thirds of it, which costs the same."""
    checkpoint: bool = False
    """Recompute each block in the backward pass, for less memory and about a third more work."""
    max_frequency: float = 64.0
    """Highest frequency of the time embedding, radians per unit of t: the higher, the finer, but d/dt is noisier."""

    sees_skip: bool = later(bool)
    """Show it what a skip lets through (--model.preconditioning skip)."""

    @staticmethod
    def of(
        size: Literal["S", "B", "L", "XL"],
        patch: Literal[1, 2, 4],
        *,
        depth: int | None = None,
        checkpoint: bool = False,
    ) -> "DiTConfig":
        """The published size, with another depth if one is given; DiT-B/2 is of("B", 2)."""
        if size not in _PUBLISHED:
            raise ConfigError(f"no published DiT has size {size!r}; choose one of {', '.join(_PUBLISHED)}")
        width, published_depth, heads = _PUBLISHED[size]
        layers = published_depth if depth is None else depth
        return DiTConfig(width=width, depth=layers, heads=heads, patch=patch, checkpoint=checkpoint)

    def build(self, shape: Shape, num_classes: int, guided: bool, observation: Shape = ()) -> "DiT":
        return DiT(self, shape, num_classes, guided, observation)


class DiT(EmbeddingNetwork):
    """Patches as tokens, `depth` transformer blocks, a linear layer that starts at zero: (B, C, H, W) -> (B, C, H, W).

    Positions enter twice: a learned vector per token, because rotations tell only displacements, and the rotations.
    Raises ConfigError unless H and W are divisible by `patch`, and `width` by four times `heads`.
    """

    def __init__(self, config: DiTConfig, shape: Shape, num_classes: int, guided: bool, observation: Shape) -> None:
        super().__init__(shape, num_classes, guided, observation)
        _check(config, self.shape)
        channels, height, width = self.shape
        self.patch = config.patch
        self.grid = (height // config.patch, width // config.patch)
        self.recomputes = config.checkpoint
        self.compiles = not config.checkpoint
        size = channels * config.patch**2
        self.embedding = ConditionEmbedding(config.width, num_classes, guided, config.max_frequency, observation)
        self.input = LinearLayer(size, config.width)
        self.position = nn.Parameter(0.02 * torch.randn(self.grid[0] * self.grid[1], config.width))
        self.rotary = RotaryEmbedding2d(config.width // config.heads, self.grid)
        self.blocks = nn.ModuleList([TransformerBlock(config) for _ in range(config.depth)])
        self.norm = RMSNorm(config.width)
        self.modulation = zeroed(LinearLayer(config.width, 2 * config.width))
        self.output = zeroed(LinearLayer(config.width, size))
        if config.sees_skip:
            self.see_skip(LinearLayer(size, config.width, bias=False), config.width)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        check_inputs(x, t, s, self.shape)
        embedding = silu(self.embedding(t, s, cond))
        h = self.with_seen(self.input(self._to_tokens(x)) + self.position, cond, self._to_tokens)
        for block in self.blocks:
            h = self.apply_block(block, h, embedding, self.rotary)
        scale, shift = self.modulation(embedding)[:, None].chunk(2, -1)
        return self.gated(self._to_image(self.output(self.norm(h) * (1 + scale) + shift)), embedding, cond)

    def _to_tokens(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, C * patch^2), tokens in row-major order."""
        rows, columns = self.grid
        split = x.reshape(x.shape[0], x.shape[1], rows, self.patch, columns, self.patch)
        return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _to_image(self, tokens: Tensor) -> Tensor:
        """The inverse of _to_tokens."""
        split = tokens.reshape(len(tokens), *self.grid, self.shape[0], self.patch, self.patch)
        return split.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), *self.shape)


class TransformerBlock(nn.Module):
    """Self-attention and a gated MLP, both modulated and gated by the embedding (adaLN-zero, 2212.09748).

    h += gate * f(norm(h) * (1 + scale) + shift) for f in (attention, MLP), with h (B, N, width), embedding (B, width)
    and shift, scale, gate linear in the embedding and zero at first: a block starts as the identity.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.modulation = zeroed(LinearLayer(config.width, 6 * config.width))
        self.attention_norm = RMSNorm(config.width)
        self.attention = SelfAttention(config.width, config.heads)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = SwiGLU(config.width, gated_width(config.width, config.mlp_ratio))

    def forward(self, h: Tensor, embedding: Tensor, rotary: RotaryEmbedding2d) -> Tensor:
        modulation = self.modulation(embedding)[:, None].chunk(6, -1)
        shift, scale, gate = modulation[:3]
        h = h + gate * self.attention(self.attention_norm(h) * (1 + scale) + shift, rotary)
        shift, scale, gate = modulation[3:]
        out: Tensor = h + gate * self.mlp(self.mlp_norm(h) * (1 + scale) + shift)
        return out


class SelfAttention(nn.Module):
    """Multi-head attention with normalised, rotated queries and keys, (B, N, width) -> (B, N, width).

    Normalising queries and keys bounds the logits, which keeps large models stable (2302.05442).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = LinearLayer(width, 3 * width)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.project = LinearLayer(width, width)

    def forward(self, h: Tensor, rotary: RotaryEmbedding2d) -> Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attention(rotary(self.q_norm(q)), rotary(self.k_norm(k)), v)
        out: Tensor = self.project(mixed.transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """W3 (silu(W1 h) * W2 h), (..., width) -> (..., width) (2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first = LinearLayer(width, 2 * hidden)
        self.last = LinearLayer(hidden, width)

    def forward(self, h: Tensor) -> Tensor:
        gate, value = self.first(h).chunk(2, -1)
        out: Tensor = self.last(silu(gate) * value)
        return out


def gated_width(width: int, mlp_ratio: float) -> int:
    """Two thirds of mlp_ratio * width, rounded to a multiple of 8: three matrices then cost what two did."""
    return max(8, 8 * round(mlp_ratio * width / 12))


def _check(config: DiTConfig, shape: tuple[int, ...]) -> None:
    """Raise ConfigError where the settings make no network for this shape."""
    if len(shape) != 3:
        raise ConfigError(f"a DiT takes images (channels, height, width), not samples of shape {shape}")
    if min(config.width, config.heads, config.patch) < 1 or config.depth < 0 or not 0 < config.mlp_ratio < math.inf:
        raise ConfigError(f"a DiT needs width, heads and patch >= 1, depth >= 0 and mlp_ratio > 0: {config}")
    if config.width % (4 * config.heads):
        raise ConfigError(
            f"width {config.width} over {config.heads} heads must be a multiple of 4: rows and columns each turn pairs"
        )
    if shape[1] % config.patch or shape[2] % config.patch:
        raise ConfigError(f"images of {shape[1]}x{shape[2]} do not split into patches of side {config.patch}")
