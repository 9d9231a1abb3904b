"""The U-Net of EDM2 (2312.02696) with a second time: layers that keep the magnitude of what passes through them.

Weights are normalised as they are used; that they are also normalised after every update, which holds their learning
rate, is the original's training and not done here. Parameters are named as a network pickle's tensors. What a file
stores in half precision is computed with in float32, the gains too.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.networks.attention import attention
from fewstep.networks.base import Shape
from fewstep.networks.layers import affine, silu
from fewstep.teachers.edm_blocks import CheckpointableBlocks, Resampling, check_taps, filter_taps, resample, split_heads
from fewstep.teachers.edm_networks import EDMNetworkConfig
from fewstep.utils.tensors import check_positive

_EPS = 1e-4


def unit_magnitude(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """x / (eps + root mean square over the axes); (2312.02696, equation 66)."""
    count = math.prod(x.shape[axis] for axis in axes)
    norm: Tensor = torch.linalg.vector_norm(x, dim=axes, keepdim=True)
    return x / (_EPS + norm / math.sqrt(count))


def mp_silu(x: Tensor) -> Tensor:
    """silu(x)/0.596: unit magnitude for normal x (equation 81)."""
    return silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """((1 - t) a + t b)/sqrt((1 - t)^2 + t^2) (equation 88)."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Channels of both, b's share of the magnitude being t (equation 103)."""
    scale = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))
    weights = scale * (1 - t) / math.sqrt(a.shape[1]), scale * t / math.sqrt(b.shape[1])
    return torch.cat([weights[0] * a, weights[1] * b], 1)


class MPLayer(nn.Module):
    """A linear layer (no kernel) or a convolution with weights of unit magnitude, times gain (equation 47)."""

    def __init__(self, wide_in: int, wide_out: int, kernel: int = 0) -> None:
        super().__init__()
        self.out_features = wide_out
        sides = (kernel, kernel) if kernel else ()
        self.weight = nn.Parameter(torch.randn(wide_out, wide_in, *sides))

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        return self.with_weight(self.weight, x, gain)

    def with_weight(self, weight: Tensor, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """Of this weight in place of its own."""
        weight = unit_magnitude(weight, tuple(range(1, weight.ndim)))
        weight = weight * ((1.0 if gain is None else gain) / math.sqrt(weight[0].numel()))
        if weight.ndim == 2:
            return affine(x, weight, None, lambda x, _: functional.linear(x, weight))
        return affine(x, weight, None, lambda x, _: functional.conv2d(x, weight, padding=weight.shape[-1] // 2))


class MPFourier(nn.Module):
    """sqrt 2 cos(w t + phase), w and phases drawn once (equation 75): (B,) -> (B, channels)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, t: Tensor) -> Tensor:
        return math.sqrt(2) * torch.cos(t[:, None] * self.freqs.to(t.dtype) + self.phases.to(t.dtype))


class MPBlock(nn.Module):
    """h = conv(mp_silu(x)), h = conv(mp_silu(h (1 + linear(embedding)))), then mp_sum(x, h), and attention likewise.

    Blocks of the encoder normalise x over channels first, and change the number of channels there; those of the decoder
    do so where the branches meet.
    """

    taps: Tensor

    def __init__(
        self, wide: tuple[int, int], config: "EDM2UNetConfig", mode: Resampling, attend: bool, encoder: bool
    ) -> None:
        super().__init__()
        (wide_in, wide_out), self.config = wide, config
        self.mode, self.encoder = mode, encoder
        self.register_buffer("taps", filter_taps(config.resample_filter), persistent=False)
        self.heads = wide_out // config.channels_per_head if attend else 0
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.emb_linear = MPLayer(config.embedding_width, wide_out)
        self.conv_res0 = MPLayer(wide_out if encoder else wide_in, wide_out, 3)
        self.conv_res1 = MPLayer(wide_out, wide_out, 3)
        self.conv_skip = MPLayer(wide_in, wide_out, 1) if wide_in != wide_out else nn.Identity()
        if self.heads:
            self.attn_qkv, self.attn_proj = MPLayer(wide_out, 3 * wide_out, 1), MPLayer(wide_out, wide_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = resample(x, self.taps, self.mode)
        if self.encoder:
            x = unit_magnitude(self.conv_skip(x), (1,))
        h = self.conv_res0(mp_silu(x))
        gain = 1 + self.emb_linear(embedding, self.emb_gain)
        h = self.conv_res1(mp_silu(h * gain[:, :, None, None]))
        x = mp_sum(x if self.encoder else self.conv_skip(x), h, self.config.res_balance)
        if self.heads:
            q, k, v = (unit_magnitude(part, (3,)) for part in split_heads(self.attn_qkv(x), self.heads))
            mixed = self.attn_proj(attention(q, k, v).transpose(2, 3).reshape(x.shape))
            x = mp_sum(x, mixed, self.config.attn_balance)
        most = self.config.clip_act
        return x if most is None else x.clamp(-most, most)


class EDM2UNet(CheckpointableBlocks):
    """(x, t, one-hot labels) -> raw outputs. A channel of ones joins the input in place of biases."""

    def __init__(self, config: "EDM2UNetConfig", shape: Shape, num_classes: int) -> None:
        super().__init__()
        self.config, height = config, shape[1]
        widths = [config.model_channels * factor for factor in config.channel_mult]
        self.names = [f"{height >> level}x{height >> level}" for level in range(len(widths))]
        self.emb_fourier = MPFourier(config.noise_width)
        self.emb_noise = MPLayer(config.noise_width, config.embedding_width)
        self.emb_label = MPLayer(num_classes, config.embedding_width) if num_classes else None
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[f"{self.names[0]}_conv"] = MPLayer(shape[0] + 1, widths[0], 3)
        self._fill(widths, [height >> level in config.attn_resolutions for level in range(len(widths))])
        self.out_conv = MPLayer(widths[0], shape[0], 3)
        self.out_gain = nn.Parameter(torch.zeros(()))

    def _fill(self, widths: list[int], attends: list[bool]) -> None:
        """The blocks, down and up."""
        config, wide, skips = self.config, widths[0], [widths[0]]
        for level, (name, own) in enumerate(zip(self.names, widths, strict=True)):
            if level:
                self.enc[f"{name}_down"] = MPBlock((wide, wide), config, "down", False, True)
                skips.append(wide)
            for index in range(config.num_blocks):
                self.enc[f"{name}_block{index}"] = MPBlock((wide, own), config, "keep", attends[level], True)
                wide = own
                skips.append(wide)
        self.dec[f"{self.names[-1]}_in0"] = MPBlock((wide, wide), config, "keep", True, False)
        self.dec[f"{self.names[-1]}_in1"] = MPBlock((wide, wide), config, "keep", False, False)
        for level, (name, own) in reversed(list(enumerate(zip(self.names, widths, strict=True)))):
            if level < len(widths) - 1:
                self.dec[f"{name}_up"] = MPBlock((wide, wide), config, "up", False, False)
            for index in range(config.num_blocks + 1):
                block = MPBlock((wide + skips.pop(), own), config, "keep", attends[level], False)
                self.dec[f"{name}_block{index}"] = block
                wide = own

    def embed(self, t: Tensor, labels: Tensor) -> Tensor:
        """Of the time and the labels."""
        embedded: Tensor = self.emb_noise(self.emb_fourier(t))
        if self.emb_label is not None:
            scaled = labels * math.sqrt(labels.shape[1])
            embedded = mp_sum(embedded, self.emb_label(scaled), self.config.label_balance)
        return mp_silu(embedded)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        embedding = self.embed(t, labels)
        skips: list[Tensor] = []
        h = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        for name, block in self.enc.items():
            h = block(h) if name.endswith("_conv") else self.apply_block(block, h, embedding)
            skips.append(h)
        for name, block in self.dec.items():
            h = mp_cat(h, skips.pop(), self.config.concat_balance) if "_block" in name else h
            h = self.apply_block(block, h, embedding)
        outputs: Tensor = self.out_conv(h, self.out_gain)
        return outputs


@final
@dataclass(frozen=True)
class EDM2UNetConfig(EDMNetworkConfig):
    """EDM2; channel_mult_noise, channel_mult_emb: None for those of the first and the widest level."""

    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    channel_mult_noise: int | None = None
    channel_mult_emb: int | None = None
    label_balance: float = 0.5
    concat_balance: float = 0.5
    resample_filter: tuple[float, ...] = (1.0, 1.0)
    channels_per_head: int = 64
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256.0
    attention: ClassVar[tuple[str, ...]] = ("attn_qkv", "attn_proj")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            channels_per_head=self.channels_per_head, noise_width=self.noise_width, embedding_width=self.embedding_width
        )
        check_taps(self.resample_filter)

    @property
    def noise_width(self) -> int:
        """Features of the time."""
        return self.model_channels * (self.channel_mult_noise or self.channel_mult[0])

    @property
    def embedding_width(self) -> int:
        """Of time and labels together."""
        return self.model_channels * (self.channel_mult_emb or max(self.channel_mult))

    @property
    def time_layer(self) -> str:
        return "emb_noise"

    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        return EDM2UNet(self, shape, num_classes)

    def output_name(self, height: int) -> str:
        return "out_conv"
