"""Layers that forward-mode differentiation and torch.compile both pass through, and the embedding of conditions.

PyTorch's fused attention has no forward-mode formula outside the math backend, its GroupNorm has none for
non-contiguous input, and compiling a Jacobian-vector product (JVP) fails on its affine norms. Everything here is
made of elementary operations instead, so one code path serves training, exact derivatives and sampling. Its products
with a weight count the weight's tangent too, a matrix of zeros, at full price: LinearLayer and the convolutions do not.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from fewstep.networks.condition import Condition
from fewstep.utils.errors import ConfigError, ShapeError
from fewstep.utils.forward_ad import tangents_recorded
from fewstep.utils.tensors import check_batch, expand

Layer = TypeVar("Layer", bound=nn.Module)
_LOWEST_FREQUENCY, _FREQUENCIES = 0.5, 32
"""Of the features of a time, in radians per unit, and how many they are."""


def check_inputs(x: Tensor, t: Tensor, s: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ShapeError unless x is (B, *shape) and t, s are (B,)."""
    if x.ndim == 0 or tuple(x.shape[1:]) != shape:
        raise ShapeError(f"samples of shape {tuple(x.shape)} given to a network for (B, *{shape})")
    check_batch(x, t, s)


def carries_tangent(*values: Tensor) -> bool:
    """Whether forward-mode differentiation (torch.func.jvp or forward_ad) is passing through any of the values."""
    return any(forward_ad.unpack_dual(value).tangent is not None for value in values)


def affine(
    x: Tensor, weight: Tensor, bias: Tensor | None, product: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """product(x, bias), linear in x but for the bias. A tangent of x costs one product more, in place of two.

    Where the weight or the bias carries a tangent, PyTorch's formula is what is needed; where torch.func.vmap runs
    within the differentiation, so that tangents are out of sight, it is what there is.
    """
    if vectorised(x) or vectorised(weight):
        return product(x, bias)
    primal, tangent = forward_ad.unpack_dual(x)
    if tangent is None or carries_tangent(weight) or (bias is not None and carries_tangent(bias)):
        return product(x, bias)
    with nullcontext() if tangents_recorded() else torch.no_grad():
        moved = product(tangent, None)
    found: Tensor = forward_ad.make_dual(product(primal, bias), moved)
    return found


def vectorised(x: Tensor) -> bool:
    """Whether the innermost transform that x passes through is torch.func.vmap; False under torch.compile."""
    return not torch.compiler.is_compiling() and bool(torch._C._functorch.is_batchedtensor(x))


class LinearLayer(nn.Linear):
    """x W^T + b over the last axis, (..., in) -> (..., out): torch.nn.Linear with a cheaper tangent."""

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.weight, self.bias, lambda x, bias: functional.linear(x, self.weight, bias))


class Conv1d(nn.Conv1d):
    """torch.nn.Conv1d with a cheaper tangent: (B, C, positions)."""

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.weight, self.bias, lambda x, bias: self._conv_forward(x, self.weight, bias))


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d with a cheaper tangent: (B, C, rows, columns)."""

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.weight, self.bias, lambda x, bias: self._conv_forward(x, self.weight, bias))


def zeroed(layer: Layer) -> Layer:
    """The same layer with weight and bias set to zero, so that it starts as the zero map."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _at_least_float32(x: Tensor) -> Tensor:
    """Statistics of half-precision values are taken in float32; wider types keep their own."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) (1702.03118). The fused one cannot be differentiated backward while its input has a tangent."""
    return x * torch.sigmoid(x)


class RMSNorm(nn.Module):
    """scale * x / sqrt(mean(x^2) + eps) over the last axis, (..., width) -> (..., width) (1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = _at_least_float32(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.scale


def layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last axis, (..., width) -> (..., width) (1607.06450).

    Without the learned scale and shift: a linear layer that follows does both itself.
    """
    wide = _at_least_float32(x)
    centred = wide - wide.mean(-1, keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class GroupNorm(nn.Module):
    """Normalise x (B, C, *positions) over groups of channels and all positions, in any memory layout (1803.08494).

    The learned scale and shift are per channel. forward(x, scale, shift), both (B, C), returns
    norm(x) * (1 + scale) + shift; folding the modulation in costs no further pass over x.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups, self.eps = default_groups(channels), 1e-5
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        wide = _at_least_float32(x)
        centred = wide - expand(self._group_mean(wide), wide)
        inverse = torch.rsqrt(self._group_mean(centred.square()) + self.eps)
        gain = self.scale if scale is None else self.scale * (1 + scale)
        offset = self.shift if scale is None else self.shift * (1 + scale)
        offset = offset if shift is None else offset + shift
        normed = centred * expand(gain * inverse, wide) + expand(offset.expand(inverse.shape), wide)
        return normed.to(x.dtype)

    def _group_mean(self, x: Tensor) -> Tensor:
        """Each channel's group mean, (B, C). Positions go first: that order is quick for channels_last too."""
        means = x.mean(tuple(range(2, x.ndim))).reshape(x.shape[0], self.groups, -1)
        return means.mean(2, keepdim=True).expand(means.shape).reshape(x.shape[0], -1)


def default_groups(channels: int) -> int:
    """The largest number of equal groups, at most 32, that leaves at least four channels in each where it can."""
    most = max(1, min(32, channels // 4))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


class RotaryEmbedding2d(nn.Module):
    """Rotate pairs of features by angles that grow with a token's row and column (RoPE, 2104.09864, on two axes).

    Tokens lie on a grid (rows, columns) in row-major order. Half of the pairs turn with the row, half with the
    column, at frequencies base^(-i / (head_width / 4)), i = 0, 1, ...: dot products of rotated queries and keys
    depend on the tokens' displacement only. (..., N, head_width) -> the same shape, head_width a multiple of 4.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, head_width: int, grid: tuple[int, int], base: float = 100.0) -> None:
        super().__init__()
        count = head_width // 4
        frequencies = base ** (-torch.arange(count, dtype=torch.float32) / count)
        rows, columns = (torch.arange(size, dtype=torch.float32)[:, None] * frequencies for size in grid)
        by_row = rows[:, None].expand(*grid, count)
        by_column = columns[None].expand(*grid, count)
        angles = torch.cat([by_row, by_column], -1).flatten(0, 1)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        turned = (first * self.cosine - second * self.sine, first * self.sine + second * self.cosine)
        return torch.cat(turned, -1).to(x.dtype)


class Embedding(nn.Module):
    """Linear-SiLU-Linear of features, (B, F) -> (B, width); zero_init makes it start at zero, whatever they are."""

    def __init__(self, features: int, width: int, zero_init: bool = False) -> None:
        super().__init__()
        self.first = LinearLayer(features, width)
        self.last = zeroed(LinearLayer(width, width)) if zero_init else LinearLayer(width, width)

    def forward(self, features: Tensor) -> Tensor:
        embedded: Tensor = self.last(silu(self.first(features.to(self.first.weight.dtype))))
        return embedded


def time_features(t: Tensor, frequencies: Tensor) -> Tensor:
    """[cos(w t), sin(w t)] for each of the frequencies w (F,), in radians per unit of t: (B,) -> (B, 2 F).

    A feature's derivative grows as w: a high frequency resolves short times but inflates d/dt, and with it the
    variance of every objective that differentiates the network in time.
    """
    angles = _at_least_float32(t).unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class ConditionEmbedding(nn.Module):
    """The sum of the embeddings of t, s, the label, the guidance and the observation: (B,), (B,), cond -> (B, width).

    The branches of s and of the guidance end in a zero layer. A network therefore starts independent of both, and
    one that takes over the other weights of a teacher, which knows t alone, starts as that teacher. Both times have 32
    geometric frequencies from 0.5 to max_frequency. Labels have a table of num_classes + 1 rows; the last one stands
    for "no class".
    """

    frequencies: Tensor

    def __init__(
        self, width: int, num_classes: int, guided: bool, max_frequency: float = 64.0, observation: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        if width < 1 or num_classes < 0:
            raise ConfigError(f"embedding width {width} must be at least 1 and num_classes {num_classes} at least 0")
        if not max_frequency >= _LOWEST_FREQUENCY:
            raise ConfigError(f"max_frequency is {max_frequency}; it must be at least {_LOWEST_FREQUENCY}")
        span = torch.linspace(math.log(_LOWEST_FREQUENCY), math.log(max_frequency), _FREQUENCIES)
        self.register_buffer("frequencies", span.exp(), persistent=False)
        self.num_classes, self.seen = num_classes, tuple(observation)
        self.t_branch = Embedding(2 * _FREQUENCIES, width)
        self.s_branch = Embedding(2 * _FREQUENCIES, width, zero_init=True)
        self.labels = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.guidance = Embedding(3, width, zero_init=True) if guided else None
        self.observation = Embedding(math.prod(observation), width) if observation else None
        if self.labels is not None:
            nn.init.normal_(self.labels.weight, std=0.02)

    def forward(self, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        cond = Condition() if cond is None else cond
        of_t, of_s = (time_features(time, self.frequencies) for time in (t, s))
        embedded: Tensor = self.t_branch(of_t) + self.s_branch(of_s)
        if self.labels is not None:
            embedded = embedded + self.labels(self._rows(cond.labels, t))
        elif cond.labels is not None:
            raise ConfigError("labels were given to a network that was built with num_classes=0")
        if self.guidance is not None:
            embedded = embedded + self.guidance(_guidance(cond.guidance, t))
        elif cond.guidance is not None:
            raise ConfigError("guidance was given to a network that was built with guided=False")
        if self.observation is not None:
            embedded = embedded + self.observation(self._flat(cond.observation))
        elif cond.observation is not None:
            raise ConfigError("an observation was given to a network that was built without")
        return embedded

    def _rows(self, labels: Tensor | None, t: Tensor) -> Tensor:
        """Rows (B,) of the table. Values are not checked: that would make the device wait."""
        if labels is None:
            return torch.full(t.shape, self.num_classes, dtype=torch.int64, device=t.device)
        if labels.shape != t.shape:
            raise ShapeError(f"labels of shape {tuple(labels.shape)} for times of shape {tuple(t.shape)}: pass (B,)")
        return torch.where(labels < 0, self.num_classes, labels.long())

    def _flat(self, observation: Tensor | None) -> Tensor:
        """The last observations, (B, To, Do) -> (B, To * Do)."""
        if observation is None or tuple(observation.shape[1:]) != self.seen:
            found = "none" if observation is None else f"shape {tuple(observation.shape)}"
            raise ShapeError(f"observations of shape (B, {', '.join(map(str, self.seen))}) are needed, not {found}")
        return observation.flatten(1)


def _guidance(guidance: Tensor | None, t: Tensor) -> Tensor:
    """(log omega, t_lo, t_hi), (B, 3); none given means log omega = 0 on the interval [0, 1]."""
    if guidance is None:
        return torch.tensor([0.0, 0.0, 1.0]).to(t.device, non_blocking=True).expand(len(t), 3)
    if guidance.shape != (len(t), 3):
        raise ShapeError(f"guidance of shape {tuple(guidance.shape)} for {len(t)} samples: pass ({len(t)}, 3)")
    return guidance
