"""A residual multilayer perceptron for points, poses, actions and small images, whatever their shape."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.networks.base import EmbeddingNetwork, NetworkConfig, Shape
from fewstep.networks.condition import Condition
from fewstep.networks.layers import ConditionEmbedding, LinearLayer, check_inputs, layer_norm, silu, zeroed
from fewstep.utils.errors import ConfigError
from fewstep.utils.serialization import later


@dataclass(frozen=True)
class MLPConfig(NetworkConfig):
    """Settings of MLP; the defaults make about 1.4 million parameters for 64 numbers."""

    width: int = 512
    """Width of the residual stream."""
    depth: int = 4
    """Residual blocks."""
    expansion: float = 0.5
    """A block's hidden width over `width`."""
    embedding_width: int = 128
    """Width of the embedding of times and conditions."""
    max_frequency: float = 64.0
    """Highest frequency of the time embedding, radians per unit of t: the higher, the finer, but d/dt is noisier."""

    sees_skip: bool = later(bool)
    """Show it what a skip lets through (--model.preconditioning skip)."""

    def build(self, shape: Shape, num_classes: int, guided: bool, observation: Shape = ()) -> "MLP":
        return MLP(self, shape, num_classes, guided, observation)


class MLP(EmbeddingNetwork):
    """Flatten, embed, `depth` residual blocks, and a linear layer that starts at zero: (B, *shape) -> (B, *shape)."""

    compiles = True

    def __init__(self, config: MLPConfig, shape: Shape, num_classes: int, guided: bool, observation: Shape) -> None:
        super().__init__(shape, num_classes, guided, observation)
        hidden = round(config.width * config.expansion) if math.isfinite(config.expansion) else 0
        if min(config.width, hidden) < 1 or config.depth < 1:
            raise ConfigError(f"an MLP needs width, hidden width and depth of at least 1: {config}")
        size = math.prod(self.shape)
        width = config.embedding_width
        self.embedding = ConditionEmbedding(width, num_classes, guided, config.max_frequency, observation)
        # One product yields the modulations of all blocks: many narrow ones would cost more in overhead than in work.
        self.modulation = LinearLayer(width, config.depth * 2 * hidden)
        # Observations enter beside the sample too: the embedding, which holds them, is narrower than many of them.
        seen = math.prod(observation) if observation else 0
        self.input = LinearLayer(size + seen, config.width)
        self.blocks = nn.ModuleList([MLPBlock(config.width, hidden) for _ in range(config.depth)])
        self.output = zeroed(LinearLayer(config.width, size))
        if config.sees_skip:
            self.see_skip(LinearLayer(size, config.width, bias=False), width)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        check_inputs(x, t, s, self.shape)
        embedding = silu(self.embedding(t, s, cond))
        modulation = self.modulation(embedding)
        scales, shifts = (part.unbind(1) for part in modulation.unflatten(1, (2, len(self.blocks), -1)).unbind(1))
        h = self.input(torch.cat([x.reshape(x.shape[0], -1), *self._seen(x, cond)], 1))
        h = self.with_seen(h, cond, lambda seen: seen.flatten(1))
        for block, scale, shift in zip(self.blocks, scales, shifts, strict=True):
            h = self.apply_block(block, h, scale, shift)
        out: Tensor = self.output(layer_norm(h))
        return self.gated(out.reshape(x.shape), embedding, cond)

    def _seen(self, x: Tensor, cond: Condition | None) -> list[Tensor]:
        """The observations, flat; the embedding has checked that they are there."""
        return [] if cond is None or cond.observation is None else [cond.observation.flatten(1).to(x.dtype)]


class MLPBlock(nn.Module):
    """h + W2 silu(W1 norm(h) * (1 + scale) + shift), W2 zero at first; h (B, width), scale and shift (B, hidden).

    The times set the slope and the bias of every hidden unit, as in the residual blocks of ADM (2105.05233).
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first = LinearLayer(width, hidden)
        self.last = zeroed(LinearLayer(hidden, width))

    def forward(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        hidden = self.first(layer_norm(h)) * (1 + scale) + shift
        out: Tensor = h + self.last(silu(hidden))
        return out
