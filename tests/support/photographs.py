"""What the tests of latents share: a folder of pictures, and an autoencoder of the smallest size."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def make_autoencoder(kind: str) -> Any:
    """The smallest of another kind: two levels, four channels of latents, random weights that are always the same."""
    import diffusers

    pairs = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (4, 8))
    blocks = {f"{part}_block_types": ("ResBlock", "EfficientViTBlock") for part in ("encoder", "decoder")}
    blocks |= {f"{part}_layers_per_block": (1, 1) for part in ("encoder", "decoder")}
    blocks |= {f"{part}_qkv_multiscales": ((), (5,)) for part in ("encoder", "decoder")}
    settings: dict[str, dict[str, Any]] = {
        "AutoencoderDC": {
            **pairs, **blocks, "latent_channels": 4, "attention_head_dim": 2, "scaling_factor": 0.4,
            "encoder_out_shortcut": False,
        },
        "AutoencoderTiny": {
            name: (8, 8) if "channels" in name else (1, 1)
            for name in (*pairs, "num_encoder_blocks", "num_decoder_blocks")
        },
        "AutoencoderKLWan": {
            "base_dim": 4, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True],
            "latents_mean": [0.1, 0.2, -0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 4.0],
        },
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(diffusers, kind)(**settings[kind]).eval()


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
