"""Images that stay in their files and are decoded whenever they are fetched: any number of them, in little memory."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from fewstep.data.base import Dataset, SampleSet, chunk_moments, chunk_size, luma, mirrored
from fewstep.data.folder import (
    Pixels,
    decode_or_reason,
    grey_or_reason,
    list_images,
    quiet_bombs,
    read_ahead,
    report_unreadable,
)
from fewstep.data.labels import held_out, present_classes
from fewstep.utils.errors import ConfigError, DataError

_BATCH = 256


@final
@dataclass(frozen=True, eq=False)
class PictureFiles(SampleSet):
    """Files below `root`, cut to squares of `side` pixels; channels: 1 or 3; labels: (N,) int64, or None.

    What is fetched is what the same images would be in memory (`load_folder`), to the bit.
    """

    root: Path
    files: tuple[str, ...]
    side: int
    channels: int
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.channels, self.side, self.side

    def fetch(self, indices: Tensor, mirror: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As of any samples; raises DataError naming a file that cannot be read."""
        indices = indices.cpu()
        with quiet_bombs():
            found = [
                self._pixels(number, decode_or_reason(self._place(number), self.side)) for number in indices.tolist()
            ]
        labels = None if self.labels is None else self.labels[indices]
        return mirrored(torch.stack(found), None if mirror is None else mirror.cpu()), labels

    def _place(self, number: int) -> Path:
        return self.root / self.files[number]

    def _pixels(self, number: int, found: Pixels | str) -> Tensor:
        """(C, H, W) uint8 of what a file was decoded to."""
        if isinstance(found, str):
            raise DataError(f"'{self._place(number)}' cannot be read ({found}): mend or remove it")
        grey = found.ndim == 2
        pixels = torch.from_numpy(found)[None] if grey else torch.from_numpy(found).permute(2, 0, 1)
        if self.channels == 3:
            return pixels.expand(3, -1, -1)
        return pixels if grey else luma(pixels[None])[0]

    def _chunks(self) -> Iterator[Tensor]:
        """All images as uint8 (n, C, H, W), in portions of the size that those in memory are measured in."""
        size = chunk_size(self.shape)
        numbers = range(len(self))
        batches = (numbers[start : start + _BATCH] for start in range(0, len(numbers), _BATCH))
        read = partial(_decoded, self)
        waiting: list[Tensor] = []
        with quiet_bombs():
            for number, found in enumerate(chain.from_iterable(read_ahead(read, batches))):
                waiting.append(self._pixels(number, found))
                if len(waiting) == size:
                    yield torch.stack(waiting)
                    waiting = []
        if waiting:
            yield torch.stack(waiting)

    @cached_property
    def _moments(self) -> tuple[float, float]:
        return chunk_moments(self._chunks())

    def moments(self) -> tuple[float, float]:
        """Decodes all images once."""
        return self._moments

    @property
    def data_range(self) -> tuple[float, float] | None:
        return (-1.0, 1.0)

    @property
    def has_mirrors(self) -> bool:
        return True

    def update(self, digest: hashlib.blake2b) -> None:
        """As the same images in memory do; decodes all of them."""
        digest.update(f"{torch.uint8}{(len(self), *self.shape)}".encode())
        for chunk in self._chunks():
            digest.update(chunk.contiguous().numpy().data)
        if self.labels is not None:
            digest.update(f"{self.labels.dtype}{tuple(self.labels.shape)}".encode())
            digest.update(self.labels.contiguous().numpy().data)


def _decoded(pictures: PictureFiles, number: int) -> Pixels | str:
    return decode_or_reason(pictures._place(number), pictures.side)


def load_files(
    root: str, size: tuple[int, int], split: tuple[float, int], labelled: bool, skip_unreadable: bool
) -> Dataset:
    """The images of a folder as in memory (`load_folder`), left in their files; their headers are read.

    size: side in pixels, and 1 or 3 channels or 0 for what they have. split: the share held out and its seed. Raises
    ConfigError without a side in pixels, DataError for a folder that does not serve and for files that are no images,
    which it names; with skip_unreadable these are left out.
    """
    (side, channels), (heldout, seed) = size, split
    if side < 1:
        raise ConfigError("images that stay on disk are cut to one size: give it with --data.image-size")
    listing = list_images(root)
    numbers = range(len(listing.files))
    batches = (listing.files[start : start + _BATCH] for start in range(0, len(numbers), _BATCH))
    with quiet_bombs():
        heads = list(chain.from_iterable(read_ahead(grey_or_reason, batches)))
    left_out, failures = [*listing.left_out], [number for number in numbers if isinstance(heads[number], str)]
    if failures:
        named = [(str(listing.files[number].relative_to(listing.root)), str(heads[number])) for number in failures]
        report_unreadable(named, str(listing.root), len(listing.files), skip_unreadable)
        left_out.append(f"{len(failures)} unreadable")
    kept = [number for number in numbers if not isinstance(heads[number], str)]
    found = None if listing.labels is None else torch.tensor(listing.labels)[kept]
    names, (labels,) = present_classes(root, listing.class_names, [found])
    held = held_out(len(kept), labels, heldout, seed)
    own = channels or (1 if all(heads[number] for number in kept) else 3)
    parts: list[PictureFiles] = []
    for rows in ((~held).nonzero()[:, 0], held.nonzero()[:, 0]):
        files = tuple(str(listing.files[kept[row]].relative_to(listing.root)) for row in rows.tolist())
        parts.append(
            PictureFiles(listing.root, files, side, own, labels[rows] if labelled and labels is not None else None)
        )
    names, name, advice = names if labelled else (), listing.root.name, "train anew with --data.heldout"
    train, other = parts
    return Dataset(name, train, other, len(names), names, left_out=tuple(left_out), split_by=advice)
