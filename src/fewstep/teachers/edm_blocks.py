"""What the networks of EDM and EDM2 are made of (2206.00364): resampling, residual blocks, features of time."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.networks.attention import attention
from fewstep.networks.layers import Conv2d, GroupNorm, LinearLayer, affine, silu
from fewstep.networks.pyramid import same_size
from fewstep.utils.errors import ConfigError

Resampling = Literal["keep", "up", "down"]


def resample(x: Tensor, taps: Tensor, mode: Resampling, padding: int | None = None) -> Tensor:
    """Every channel halved or doubled by the separable filter `taps` (1, 1, K, K), K even; `keep` is x itself."""
    if mode == "keep":
        return x
    channels = x.shape[1]
    padding = (taps.shape[-1] - 1) // 2 if padding is None else padding
    weight = taps.to(x.dtype).expand(channels, 1, -1, -1)
    if mode == "down":
        return affine(x, weight, None, lambda x, _: functional.conv2d(x, weight, None, 2, padding, 1, channels))
    weight = 4 * weight
    return affine(
        x, weight, None, lambda x, _: functional.conv_transpose2d(x, weight, None, 2, padding, groups=channels)
    )


def filter_taps(values: tuple[float, ...]) -> Tensor:
    """The outer product of a filter with itself, summing to 1: (1, 1, K, K)."""
    row = torch.tensor(values, dtype=torch.float32)
    return (row[:, None] * row / row.sum() ** 2)[None, None]


def check_taps(taps: tuple[float, ...]) -> None:
    """Raise ConfigError for a filter that changes no resolution."""
    if not taps or len(taps) % 2 or sum(taps) == 0:
        raise ConfigError(f"a filter {taps}: it needs an even number of taps with a sum")


class Resample(nn.Module):
    """A change of resolution, without weights."""

    resample_filter: Tensor

    def __init__(self, taps: tuple[float, ...], mode: Resampling) -> None:
        super().__init__()
        self.mode = mode
        self.register_buffer("resample_filter", filter_taps(taps))

    def forward(self, x: Tensor) -> Tensor:
        return resample(x, self.resample_filter, self.mode)


class ResamplingConv2d(Conv2d):
    """A change of resolution, then a convolution.

    after: the convolution comes first, padded for both, and then the filter, which halves.
    """

    resample_filter: Tensor

    def __init__(
        self, wide_in: int, wide_out: int, kernel: int, taps: tuple[float, ...], mode: Resampling, after: bool = False
    ) -> None:
        edge = (len(taps) - 1) // 2 if after else 0
        super().__init__(wide_in, wide_out, kernel, padding=kernel // 2 + edge)
        self.mode, self.after = mode, after
        self.register_buffer("resample_filter", filter_taps(taps))

    def forward(self, x: Tensor) -> Tensor:
        return self.with_weight(self.weight, x)

    def with_weight(self, weight: Tensor, x: Tensor) -> Tensor:
        """Of this weight in place of its own."""
        x = x if self.after else resample(x, self.resample_filter, self.mode)
        x = affine(x, weight, self.bias, lambda x, bias: self._conv_forward(x, weight, bias))
        return resample(x, self.resample_filter, self.mode, 0) if self.after else x


class Norm(GroupNorm):
    """GroupNorm with an eps of its own."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(channels)
        self.eps = eps


@dataclass(frozen=True)
class BlockSettings:
    """embedding: its width. taps: of the filter that changes the resolution. adaptive: the embedding scales and shifts
    the second norm, or shifts its input. balance: factor of every sum. head_width: channels of a head, 0 for one head.
    project: a skip that changes the resolution has weights even where channels stay as many.
    """

    embedding: int
    taps: tuple[float, ...] = (1.0, 1.0)
    adaptive: bool = True
    balance: float = 1.0
    head_width: int = 64
    project: bool = False
    eps: float = 1e-5

    def norm(self, channels: int) -> GroupNorm:
        """At most 32 groups of four channels or more."""
        return Norm(channels, self.eps)

    def convolution(self, wide_in: int, wide_out: int, kernel: int, mode: Resampling = "keep") -> nn.Module:
        """Of odd kernel, after a change of resolution if there is one."""
        if mode == "keep":
            return same_size(Conv2d, wide_in, wide_out, kernel)
        return ResamplingConv2d(wide_in, wide_out, kernel, self.taps, mode)

    def skip(self, wide_in: int, wide_out: int, mode: Resampling) -> nn.Module:
        """What stands beside the convolutions."""
        if wide_in != wide_out or (self.project and mode != "keep"):
            return self.convolution(wide_in, wide_out, 1, mode)
        return nn.Identity() if mode == "keep" else Resample(self.taps, mode)


class CheckpointableBlocks(nn.Module):
    """A network whose blocks may be computed anew for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpointing: Callable[..., Tensor] | None = None

    def enable_gradient_checkpointing(self, function: Callable[..., Tensor]) -> None:
        """Apply blocks by function(block, *args) where gradients are taken, as networks of diffusers do."""
        self.checkpointing = function

    def apply_block(self, block: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        """block(h, embedding)."""
        apply = self.checkpointing if torch.is_grad_enabled() else None
        found: Tensor = block(h, embedding) if apply is None else apply(block, h, embedding)
        return found


class Block(nn.Module):
    """h = conv(silu(norm(x))), then conv(silu(norm(h) (1 + a) + b)) or conv(silu(norm(h + b))), a and b linear in the
    embedding; with c the balance, y = c (h + skip(x)), and c (y + attention(y)) where there is attention.
    """

    def __init__(
        self, wide_in: int, wide_out: int, settings: BlockSettings, mode: Resampling = "keep", attend: bool = False
    ) -> None:
        super().__init__()
        self.settings = settings
        heads = wide_out // settings.head_width if settings.head_width else 1
        self.heads = heads if attend else 0
        self.norm0, self.norm1 = settings.norm(wide_in), settings.norm(wide_out)
        self.conv0 = settings.convolution(wide_in, wide_out, 3, mode)
        self.affine = LinearLayer(settings.embedding, (2 if settings.adaptive else 1) * wide_out)
        self.conv1 = settings.convolution(wide_out, wide_out, 3)
        self.skip = settings.skip(wide_in, wide_out, mode)
        if self.heads:
            self.norm2 = settings.norm(wide_out)
            self.qkv = settings.convolution(wide_out, 3 * wide_out, 1)
            self.proj = settings.convolution(wide_out, wide_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h, modulation = self.conv0(silu(self.norm0(x))), self.affine(embedding)
        if self.settings.adaptive:
            h = self.norm1(h, *modulation.chunk(2, 1))
        else:
            h = self.norm1(h + modulation[:, :, None, None])
        y: Tensor = (self.conv1(silu(h)) + self.skip(x)) * self.settings.balance
        if not self.heads:
            return y
        q, k, v = split_heads(self.qkv(self.norm2(y)), self.heads)
        mixed: Tensor = self.proj(attention(q, k, v).transpose(2, 3).reshape(y.shape))
        return (mixed + y) * self.settings.balance


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (B, heads, N, D) each, of (B, 3 C, H, W), where they alternate within a head."""
    q, k, v = qkv.reshape(len(qkv), heads, qkv.shape[1] // heads // 3, 3, -1).transpose(2, 4).unbind(3)
    return q, k, v


def sinusoids(t: Tensor, channels: int, endpoint: bool) -> tuple[Tensor, Tensor]:
    """Cosines and sines of w t, w falling geometrically from 1 to 1e-4, which `endpoint` reaches: (B, channels/2) each.

    Frequencies are rounded to float32 in every precision, as the weights were trained with.
    """
    half = channels // 2
    fractions = torch.arange(half, dtype=torch.float32, device=t.device) / (half - int(endpoint))
    angles = t[:, None] * ((1 / 10_000) ** fractions).to(t.dtype)
    return angles.cos(), angles.sin()


class FourierFeatures(nn.Module):
    """Sines and cosines of 2 pi w t, the frequencies w drawn once (2006.10739)."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * (2 * math.pi * self.freqs).to(t.dtype)
        return torch.cat([angles.sin(), angles.cos()], 1)
