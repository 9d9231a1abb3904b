"""The kinds of diffusers' autoencoders: what each one's `encode` gives, and how its settings are called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.utils.text import listed


@dataclass(frozen=True)
class Units:
    """How a diffusion pipeline reads its autoencoder's latents z: as (z - shift) factor, channel by channel."""

    shift: tuple[float, ...]
    factor: tuple[float, ...]


@dataclass(frozen=True)
class AutoencoderKind:
    """posterior: mean and standard deviation of what `encode` gives. levels, channels: the names of the settings that
    have an entry for each level, and the number of latents' channels. of_video: whether it takes (n, C, T, H, W).
    """

    posterior: Callable[[Any], tuple[Tensor, Tensor]]
    levels: str = "block_out_channels"
    channels: str = "latent_channels"
    of_video: bool = False

    def factor(self, settings: Any) -> int:
        """Pixels to a latent's side."""
        halvings = len(getattr(settings, self.levels)) - 1
        return int(2**halvings * _patch(settings))

    def image_channels(self, settings: Any) -> int:
        """Channels of an image."""
        return int(settings.in_channels) // _patch(settings) ** 2

    def units(self, settings: Any) -> Units:
        """Its pipeline's: by its scaling and shift factors, and its latents' mean and deviation where it has these."""
        channels = int(getattr(settings, self.channels))
        scale = float(getattr(settings, "scaling_factor", None) or 1.0)
        mean = getattr(settings, "latents_mean", None) or [getattr(settings, "shift_factor", None) or 0.0] * channels
        std = getattr(settings, "latents_std", None) or [1.0] * channels
        return Units(tuple(map(float, mean)), tuple(scale / float(each) for each in std))


def _patch(settings: Any) -> int:
    """The side of the squares that become channels before the first layer."""
    return int(getattr(settings, "patch_size", None) or 1)


def _gaussian(found: Any) -> tuple[Tensor, Tensor]:
    return found.latent_dist.mean, found.latent_dist.std


def _certain(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Of an autoencoder that gives one latent for an image."""
    return latents, torch.zeros_like(latents)


KINDS: dict[str, AutoencoderKind] = {
    "AutoencoderKL": AutoencoderKind(_gaussian),
    "AutoencoderDC": AutoencoderKind(lambda found: _certain(found.latent), "encoder_block_out_channels"),
    "AutoencoderTiny": AutoencoderKind(lambda found: _certain(found.latents), "encoder_block_out_channels"),
    "AutoencoderKLWan": AutoencoderKind(_gaussian, "dim_mult", "z_dim", of_video=True),
}
"""By their classes."""
KNOWN = listed(tuple(KINDS))
