"""A small discriminator of samples for adversarial losses: images (and their classes) to one score each."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.networks.layers import GroupNorm, silu
from fewstep.utils.errors import ConfigError


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Settings of Discriminator, which scores samples for an adversarial loss."""

    width: int = 32
    """Channels at full resolution, doubled at every halving until the sides are at most 4."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"a discriminator of width {self.width}: it must be at least 1")

    def build(self, shape: tuple[int, ...], num_classes: int) -> "Discriminator":
        """Make the discriminator for samples of shape (C, H, W)."""
        return Discriminator(self, shape, num_classes)


class Discriminator(nn.Module):
    """3x3 convolutions, then a linear score plus the class's own projection (1802.05637): (B, C, H, W) -> (B,)."""

    def __init__(self, config: DiscriminatorConfig, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ConfigError(f"a discriminator reads samples (C, H, W), not of shape {shape}")
        channels, height, width = shape
        self.first = nn.Conv2d(channels, config.width, 3, padding=1)
        self.norms, self.convolutions = nn.ModuleList(), nn.ModuleList()
        wide = config.width
        while max(height, width) > 4:
            self.norms.append(GroupNorm(wide))
            self.convolutions.append(nn.Conv2d(wide, 2 * wide, 3, padding=1))
            height, width, wide = (height + 1) // 2, (width + 1) // 2, 2 * wide
        self.hidden = nn.Linear(wide * height * width, 4 * config.width)
        self.score = nn.Linear(4 * config.width, 1)
        self.labels = nn.Embedding(num_classes + 1, 4 * config.width) if num_classes else None
        self.num_classes = num_classes

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores (B,) of samples x with classes labels (B,), NULL_LABEL for none."""
        h = self.first(x)
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            h = functional.avg_pool2d(convolution(silu(norm(h))), 2, ceil_mode=True)
        h = silu(self.hidden(silu(h.flatten(1))))
        scores: Tensor = self.score(h).squeeze(1)
        if self.labels is None:
            return scores
        rows = torch.full((len(x),), self.num_classes, device=x.device) if labels is None else labels
        projected: Tensor = (self.labels(torch.where(rows < 0, self.num_classes, rows)) * h).sum(1)
        return scores + projected
