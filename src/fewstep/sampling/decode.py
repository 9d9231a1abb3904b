"""How samples are looked at and written: as they are, or decoded where they are latents."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, avg_pool3d

from fewstep.data.latents.autoencoders import Decoder, LatentSpec
from fewstep.sampling.images import (
    Range,
    film_strips,
    fitting_columns,
    save_animation,
    save_each,
    save_grid,
    save_npz,
    to_uint8,
)
from fewstep.utils.errors import ConfigError
from fewstep.utils.files import guarded

DRAWN_FILE = ".drawn.json"
_DECODED_AT_ONCE = 64
_THUMBNAIL = 128
_LONGEST_NAME = 60


@dataclass(frozen=True)
class Viewer:
    """decoder: for latents. data_range: the values of an image that black and white stand for, None for its own."""

    decoder: Decoder | None
    data_range: Range | None

    def images(self, samples: Tensor) -> Tensor:
        """Samples (n, ...) as images (n, C, H, W) or videos (n, C, T, H, W), as they are where nothing is decoded."""
        return samples if self.decoder is None else self.decoder.images(samples)

    def thumbnails(self, samples: Tensor) -> Tensor:
        """Images of samples; large decoded ones shrunk by a whole factor, to sides of 128 to 255.

        Of videos the frames, one beside another.
        """
        images = self.images(samples)
        factor = max(images.shape[-2:]) // _THUMBNAIL if self.decoder is not None else 1
        if factor > 1:
            images = avg_pool2d(images, factor) if images.ndim == 4 else avg_pool3d(images, (1, factor, factor))
        return film_strips(images)

    def write(
        self, samples: Tensor, labels: Tensor | None, out: Path, columns: int, class_names: tuple[str, ...] = ()
    ) -> None:
        """A grid to FILE.png; `images` and `labels` to FILE.npz, decoded ones as bytes, others cut to the range; else a
        PNG each to a folder, named by number and class, in place of those that an earlier draw wrote there.

        Of videos a grid has the frames one beside another, FILE.gif moves, and so do the PNGs of a folder. Raises
        CheckpointError where it cannot write, ConfigError for a GIF of images.
        """
        if out.suffix == ".png":
            images = self.images(samples)
            columns = fitting_columns(images, columns)
            save_grid(film_strips(images), out, columns=columns, data_range=self.data_range)
        elif out.suffix == ".gif":
            images = self.images(samples)
            if images.ndim != 5:
                raise ConfigError(f"{out}: a GIF is for videos, and these are images: give FILE.png")
            save_animation(images, out, columns=columns, data_range=self.data_range)
        elif out.suffix == ".npz":
            if self.decoder is not None:
                samples = torch.cat([to_uint8(part, self.data_range) for part in self._parts(samples)])
            elif self.data_range is not None:
                samples = samples.clamp(*self.data_range)
            save_npz(samples, labels, out)
        else:
            names = [""] * len(samples) if labels is None else [_named(k, class_names) for k in labels.tolist()]
            written: set[Path] = set()
            for part in self._parts(samples):
                first = len(written)
                written.update(save_each(part, out, self.data_range, first, names[first : first + len(part)]))
            replace_draw(out, {file.name for file in written})

    def _parts(self, samples: Tensor) -> Iterator[Tensor]:
        for part in torch.split(samples, _DECODED_AT_ONCE):
            yield self.images(part)


def replace_draw(folder: Path, names: set[str]) -> None:
    """Delete what an earlier draw wrote to the folder and this one did not; .drawn.json lists a draw's files.

    Nothing else is touched. Raises CheckpointError where it cannot write.
    """
    record = folder / DRAWN_FILE
    with guarded(folder):
        try:
            earlier = json.loads(record.read_text()) if record.is_file() else []
        except ValueError:
            earlier = []
        for name in earlier if isinstance(earlier, list) else []:
            if isinstance(name, str) and Path(name).name == name and name.endswith(".png") and name not in names:
                (folder / name).unlink(missing_ok=True)
        record.write_text(json.dumps(sorted(names)) + "\n")


def _named(label: int, class_names: tuple[str, ...]) -> str:
    """-CLASS, as part of a file's name; nothing where a sample has no class."""
    if label < 0:
        return ""
    name = class_names[label] if label < len(class_names) else str(label)
    return "-" + re.sub(r"[^\w.-]+", "_", name)[:_LONGEST_NAME]


def save_latents(latents: LatentSpec | None, samples: Tensor, labels: Tensor | None, file: Path) -> Path:
    """Write samples in their autoencoder's own units to the arrays `latents` and `labels` of an .npz file.

    Raises ConfigError for samples that are no latents, CheckpointError where it cannot write.
    """
    if latents is None:
        raise ConfigError("this model's samples are no latents: leave out --latents")
    return save_npz(latents.latents(samples), labels, file, name="latents")
