"""The networks of EDM and EDM2 written out a second time, as functions of a file's tensors: two levels of one block.

Plain operations of torch alone. Images are 8 x 8, channels 8 and 16; w is the file's tensors without the prefix.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]
Resampler = Callable[[Tensor, Tensor], Tensor]


def halved(x: Tensor, row: Tensor) -> Tensor:
    """Every second value of x filtered: y_i = sum_k r_k x_(2 i + k - p), along both axes."""
    for _ in range(2):
        edge = (len(row) - 1) // 2
        padded = functional.pad(x, (edge, edge))
        count = x.shape[-1] // 2
        parts = [row[k] * padded[..., k : k + 2 * count : 2] for k in range(len(row))]
        x = torch.stack(parts).sum(0).transpose(2, 3)
    return x


def doubled(x: Tensor, row: Tensor) -> Tensor:
    """Zeros put between the values of x, and twice the filter over them, along both axes."""
    for _ in range(2):
        edge = (len(row) - 1) // 2
        spread = torch.stack([x, torch.zeros_like(x)], -1).flatten(-2)
        padded = functional.pad(spread, (len(row) - 1 - edge, edge))
        count = spread.shape[-1]
        x = torch.stack([2 * row[k] * padded[..., k : k + count] for k in range(len(row))]).sum(0).transpose(2, 3)
    return x


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(heads, D, N) each, of one sample."""
    return torch.stack([v[h] @ (q[h].T @ k[h] / math.sqrt(len(q[h]))).softmax(1).T for h in range(len(q))])


def cosines_and_sines(t: Tensor, channels: int, last: int) -> tuple[Tensor, Tensor]:
    powers = torch.arange(channels // 2, dtype=torch.float32) / last
    angles = torch.outer(t, ((1 / 10_000) ** powers).to(t.dtype))
    return torch.cos(angles), torch.sin(angles)


class _Reference:
    """groups of 4 channels; eps of the norms."""

    eps = 1e-5

    def __init__(self, w: Weights, row: tuple[float, ...]) -> None:
        self.w = w
        self.row = torch.tensor(row, dtype=torch.float64) / sum(row)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return functional.group_norm(x, x.shape[1] // 4, self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps=self.eps)

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight = self.w[f"{name}.weight"]
        return functional.conv2d(x, weight, self.w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def attention(self, name: str, x: Tensor, heads: int) -> Tensor:
        """Channel (h C/heads + c) 3 + j of qkv is channel c of head h of query, key or value, by j."""
        qkv = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x)).flatten(2)
        mixed = [
            attended(*(sample[j::3].reshape(heads, -1, sample.shape[-1]) for j in range(3))).flatten(0, 1)
            for sample in qkv
        ]
        return self.conv(f"{name}.proj", torch.stack(mixed).reshape(x.shape))

    def change(self, mode: str) -> Callable[[Tensor], Tensor]:
        return {
            "keep": lambda x: x,
            "up": lambda x: doubled(x, self.row),
            "down": lambda x: halved(x, self.row),
        }[mode]


class Song(_Reference):
    """DDPM++ and NCSN++."""

    eps = 1e-6

    def block(self, name: str, x: Tensor, e: Tensor, mode: str = "keep", attend: bool = False) -> Tensor:
        change = self.change(mode)
        h = self.conv(f"{name}.conv0", change(functional.silu(self.norm(f"{name}.norm0", x))))
        h = h + self.linear(f"{name}.affine", e)[:, :, None, None]
        h = self.conv(f"{name}.conv1", functional.silu(self.norm(f"{name}.norm1", h)))
        skip = change(x)
        h = (h + (self.conv(f"{name}.skip", skip) if f"{name}.skip.weight" in self.w else skip)) / math.sqrt(2)
        return (h + self.attention(name, h, 1)) / math.sqrt(2) if attend else h

    def embed(self, t: Tensor, labels: Tensor, fourier: bool) -> Tensor:
        if fourier:
            angles = torch.outer(t, (2 * math.pi * self.w["map_noise.freqs"]).to(t.dtype))
            e = torch.cat([torch.sin(angles), torch.cos(angles)], 1)
        else:
            cosines, sines = cosines_and_sines(t, 8, 3)
            e = torch.cat([sines, cosines], 1)
        if labels.shape[1]:
            e = e + self.linear("map_label", labels * math.sqrt(labels.shape[1]))
        return functional.silu(self.linear("map_layer1", functional.silu(self.linear("map_layer0", e))))

    def output(self, name: str, x: Tensor) -> Tensor:
        return self.conv(f"{name}_aux_conv", functional.silu(self.norm(f"{name}_aux_norm", x)))

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, kind: dict[str, Any]) -> Tensor:
        e = self.embed(t, labels, kind["embedding_type"] == "fourier")
        first = self.conv("enc.8x8_conv", x)
        second = self.block("enc.8x8_block0", first, e)
        third = self.block("enc.4x4_down", second, e, "down")
        if kind["encoder_type"] == "skip":
            third = third + self.conv("enc.4x4_aux_skip", halved(x, self.row))
        if kind["encoder_type"] == "residual":
            weight, edge = self.w["enc.4x4_aux_residual.weight"], (len(self.row) - 1) // 2
            taps = torch.outer(self.row, self.row).expand(len(weight), 1, -1, -1)
            side = functional.conv2d(x, weight, padding=1 + edge)
            side = functional.conv2d(side, taps, stride=2, groups=len(weight))
            third = (third + side + self.w["enc.4x4_aux_residual.bias"][:, None, None]) / math.sqrt(2)
        fourth = self.block("enc.4x4_block0", third, e, attend=True)
        h = self.block("dec.4x4_in0", fourth, e, attend=True)
        h = self.block("dec.4x4_in1", h, e)
        h = self.block("dec.4x4_block0", torch.cat([h, fourth], 1), e)
        h = self.block("dec.4x4_block1", torch.cat([h, third], 1), e, attend=True)
        low = self.output("dec.4x4", h) if kind["decoder_type"] == "skip" else None
        h = self.block("dec.8x8_up", h, e, "up")
        h = self.block("dec.8x8_block0", torch.cat([h, second], 1), e)
        h = self.block("dec.8x8_block1", torch.cat([h, first], 1), e)
        return self.output("dec.8x8", h) + (0 if low is None else doubled(low, self.row))


class ADM(_Reference):
    """Heads are of 64 channels, so that only levels of 64 and more attend."""

    def block(self, name: str, x: Tensor, e: Tensor, mode: str = "keep", attend: bool = False) -> Tensor:
        change = self.change(mode)
        h = self.conv(f"{name}.conv0", change(functional.silu(self.norm(f"{name}.norm0", x))))
        scale, shift = self.linear(f"{name}.affine", e)[:, :, None, None].chunk(2, 1)
        h = self.conv(f"{name}.conv1", functional.silu(self.norm(f"{name}.norm1", h) * (scale + 1) + shift))
        skip = change(x)
        h = h + (self.conv(f"{name}.skip", skip) if f"{name}.skip.weight" in self.w else skip)
        return h + self.attention(name, h, h.shape[1] // 64) if attend else h

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        e = torch.cat(cosines_and_sines(t, 32, 16), 1)
        e = self.linear("map_layer1", functional.silu(self.linear("map_layer0", e)))
        e = functional.silu(e + self.linear("map_label", labels) if labels.shape[1] else e)
        first = self.conv("enc.8x8_conv", x)
        second = self.block("enc.8x8_block0", first, e)
        third = self.block("enc.4x4_down", second, e, "down")
        fourth = self.block("enc.4x4_block0", third, e, attend=True)
        h = self.block("dec.4x4_in0", fourth, e, attend=True)
        h = self.block("dec.4x4_in1", h, e)
        h = self.block("dec.4x4_block0", torch.cat([h, fourth], 1), e, attend=True)
        h = self.block("dec.4x4_block1", torch.cat([h, third], 1), e, attend=True)
        h = self.block("dec.8x8_up", h, e, "up")
        h = self.block("dec.8x8_block0", torch.cat([h, second], 1), e)
        h = self.block("dec.8x8_block1", torch.cat([h, first], 1), e)
        return self.conv("out_conv", functional.silu(self.norm("out_norm", h)))


class EDM2:
    """With the balances 0.5, 0.5, 0.3 and 0.3 of the paper, heads of 8 channels and activations within 256."""

    def __init__(self, w: Weights) -> None:
        self.w = w

    def unit(self, x: Tensor, *axes: int) -> Tensor:
        return x / (1e-4 + x.square().mean(axes, keepdim=True).sqrt())

    def silu(self, x: Tensor) -> Tensor:
        return functional.silu(x) / 0.596

    def sum(self, a: Tensor, b: Tensor, t: float) -> Tensor:
        return torch.lerp(a, b, t) / math.sqrt((1 - t) ** 2 + t**2)

    def cat(self, a: Tensor, b: Tensor) -> Tensor:
        """Each half the magnitude."""
        wide = a.shape[1] + b.shape[1]
        return torch.cat([a * math.sqrt(wide / 2 / a.shape[1]), b * math.sqrt(wide / 2 / b.shape[1])], 1)

    def layer(self, name: str, x: Tensor, gain: str = "") -> Tensor:
        weight = self.w[f"{name}.weight"]
        weight = self.unit(weight, *range(1, weight.ndim)) / math.sqrt(weight[0].numel())
        y = x @ weight.T if weight.ndim == 2 else functional.conv2d(x, weight, padding=weight.shape[-1] // 2)
        return y * self.w[gain] if gain else y

    def block(self, name: str, x: Tensor, e: Tensor, attend: bool = False) -> Tensor:
        skip = (lambda x: self.layer(f"{name}.conv_skip", x)) if f"{name}.conv_skip.weight" in self.w else (lambda x: x)
        if name.startswith("enc"):
            x = self.unit(skip(x), 1)
        h = self.layer(f"{name}.conv_res0", self.silu(x))
        h = h * (1 + self.layer(f"{name}.emb_linear", e, f"{name}.emb_gain"))[:, :, None, None]
        h = self.layer(f"{name}.conv_res1", self.silu(h))
        x = self.sum(x if name.startswith("enc") else skip(x), h, 0.3)
        if attend:
            heads = x.shape[1] // 8
            parts = self.layer(f"{name}.attn_qkv", x).flatten(2)
            mixed = [
                attended(*(self.unit(sample[j::3].reshape(heads, 8, -1), 1) for j in range(3))).flatten(0, 1)
                for sample in parts
            ]
            x = self.sum(x, self.layer(f"{name}.attn_proj", torch.stack(mixed).reshape(x.shape)), 0.3)
        return x.clamp(-256, 256)

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        angles = torch.outer(t, self.w["emb_fourier.freqs"]) + self.w["emb_fourier.phases"]
        e = self.layer("emb_noise", math.sqrt(2) * torch.cos(angles))
        if labels.shape[1]:
            e = self.sum(e, self.layer("emb_label", labels * math.sqrt(labels.shape[1])), 0.5)
        e = self.silu(e)
        half = torch.tensor([0.5, 0.5], dtype=x.dtype)
        first = self.layer("enc.8x8_conv", torch.cat([x, torch.ones_like(x[:, :1])], 1))
        second = self.block("enc.8x8_block0", first, e)
        third = self.block("enc.4x4_down", halved(second, half), e)
        fourth = self.block("enc.4x4_block0", third, e, attend=True)
        h = self.block("dec.4x4_in0", fourth, e, attend=True)
        h = self.block("dec.4x4_in1", h, e)
        h = self.block("dec.4x4_block0", self.cat(h, fourth), e, attend=True)
        h = self.block("dec.4x4_block1", self.cat(h, third), e, attend=True)
        h = self.block("dec.8x8_up", doubled(h, half), e)
        h = self.block("dec.8x8_block0", self.cat(h, second), e)
        h = self.block("dec.8x8_block1", self.cat(h, first), e)
        return self.layer("out_conv", h, "out_gain")
