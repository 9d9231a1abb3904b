"""`fewstep encode FOLDER`: images into latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fewstep.data.latents.shards import EncodingSettings, Posterior, StoredType

_ENCODING = EncodingSettings()


@dataclass(frozen=True)
class Options:
    """Encode a folder of images into latents, in shards, or go on where it was stopped: the same files come out.

    Repeat the same command to go on; batch size, device and where the autoencoder lies may change.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of PNG, JPEG or WebP images; its first-level subfolders, if it has any, are the classes."""
    autoencoder: Path
    """Folder of a diffusers AutoencoderKL (config.json and safetensors); nothing is downloaded."""
    out: Path
    """Folder for the latents, which `fewstep train RECIPE --data.source latents --data.root OUT` reads."""
    image_size: int = _ENCODING.image_size
    """Side of the square that images are resized and cut to."""
    flip: bool = _ENCODING.flip
    """Store the latent of every mirrored image too, for training with flips: latents cannot be mirrored exactly."""
    posterior: Posterior = _ENCODING.posterior
    """sample: one draw from each image's posterior, decided by the seed and the image's number; mean: its mean."""
    dtype: StoredType = _ENCODING.dtype
    """Number format of the stored latents."""
    shard_size: int = _ENCODING.shard_size
    """Images in a shard: what is lost at most when the command is stopped."""
    heldout: float = _ENCODING.heldout
    """Fraction held out of training, evenly over classes."""
    seed: int = _ENCODING.seed
    """Of the posterior's draws and of the split."""
    std: float = 1.0
    """Standard deviation that each channel is given when it is read; may be changed later by the same command."""
    batch_size: int = 16
    """Images that pass the autoencoder at once."""
    skip_unreadable: bool = False
    """Warn about unreadable images instead of failing."""
    cpu: bool = False
    """Stay on the CPU even where a GPU is present."""
    quiet: bool = False
    """No progress bar."""


def run(options: Options) -> None:
    """Run the command; raises what it calls raises."""
    from fewstep.data.latents.encode import EncodingWork, encode_folder, summary

    settings = EncodingSettings(
        image_size=options.image_size,
        flip=options.flip,
        posterior=options.posterior,
        dtype=options.dtype,
        shard_size=options.shard_size,
        heldout=options.heldout,
        seed=options.seed,
    )
    work = EncodingWork(options.batch_size, options.skip_unreadable, options.cpu, options.quiet)
    manifest = encode_folder(options.folder, options.autoencoder, options.out, settings, options.std, work)
    print(f"{options.out}: {summary(manifest)}")
    print(f"Next: fewstep train RECIPE --data.source latents --data.root {options.out}")
