"""What the tests of latents share: a folder of pictures, and an autoencoder of the smallest size."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SIDE = 16
"""Of the images that the tests encode; their latents are half as wide."""


def save_autoencoder(folder: Path, seed: int = 0, channels: int = 3, latents: int = 4) -> "AutoencoderKL":
    """Two levels, so that latents are half as wide as images; random weights of that seed, saved and returned."""
    from diffusers import AutoencoderKL  # seconds, which a worker that collects these tests alone need not spend

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=latents,
            sample_size=SIDE,
            mid_block_add_attention=False,
        )
    model.save_pretrained(folder)
    return model.eval()


def save_pictures(folder: Path, classes: dict[str, int]) -> Path:
    """Random coloured images of differing sizes, as many as said for every class, in subfolders named after it."""
    generator = np.random.default_rng(0)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            shade = generator.integers(0, 200, 3)
            pixels = shade + generator.integers(0, 56, (18, 20 + index % 3, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index:02d}.png")
    return folder
