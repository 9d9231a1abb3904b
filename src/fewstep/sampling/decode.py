"""How samples are looked at and written: as they are, or decoded where they are latents."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fewstep.data.latents.autoencoders import Decoder, LatentSpec
from fewstep.sampling.images import Range, save_each, save_grid, save_npz, to_uint8
from fewstep.utils.errors import ConfigError

_DECODED_AT_ONCE = 64
_THUMBNAIL = 128


@dataclass(frozen=True)
class Viewer:
    """decoder: for latents. data_range: the values of an image that black and white stand for, None for its own."""

    decoder: Decoder | None
    data_range: Range | None

    def images(self, samples: Tensor) -> Tensor:
        """Samples (n, ...) as images (n, C, H, W), as they are where there is nothing to decode."""
        return samples if self.decoder is None else self.decoder.images(samples)

    def thumbnails(self, samples: Tensor) -> Tensor:
        """Images of samples; large decoded ones shrunk by a whole factor, to sides of 128 to 255."""
        images = self.images(samples)
        factor = max(images.shape[-2:]) // _THUMBNAIL if self.decoder is not None else 1
        return avg_pool2d(images, factor) if factor > 1 else images

    def write(self, samples: Tensor, labels: Tensor | None, out: Path, columns: int) -> None:
        """A grid to FILE.png; `images` and `labels` to FILE.npz, decoded ones as bytes; else a PNG each to a folder.

        Raises CheckpointError where it cannot write.
        """
        if out.suffix == ".png":
            save_grid(self.images(samples), out, columns=columns, data_range=self.data_range)
        elif out.suffix == ".npz":
            if self.decoder is not None:
                samples = torch.cat([to_uint8(part, self.data_range) for part in self._parts(samples)])
            save_npz(samples, labels, out)
        else:
            first = 0
            for part in self._parts(samples):
                save_each(part, out, self.data_range, first)
                first += len(part)

    def _parts(self, samples: Tensor) -> Iterator[Tensor]:
        for part in torch.split(samples, _DECODED_AT_ONCE):
            yield self.images(part)


def save_latents(latents: LatentSpec | None, samples: Tensor, labels: Tensor | None, file: Path) -> Path:
    """Write samples in their autoencoder's own units to the arrays `latents` and `labels` of an .npz file.

    Raises ConfigError for samples that are no latents, CheckpointError where it cannot write.
    """
    if latents is None:
        raise ConfigError("this model's samples are no latents: leave out --latents")
    return save_npz(latents.latents(samples), labels, file, name="latents")
