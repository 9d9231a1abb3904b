"""Images by their numbers, wherever they lie: files of a folder, rows of a Hugging Face dataset, members of tars."""

import hashlib
import io
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import final

import torch

from fewstep.data.base import Loaded, Samples
from fewstep.data.captions import read_captions
from fewstep.data.folder import (
    Listing,
    Pixels,
    batches_of,
    decode_all,
    decode_or_reason,
    grey_or_reason,
    list_images,
    quiet_bombs,
    read_ahead,
    report_unreadable,
    without_address,
)
from fewstep.data.labels import present_classes
from fewstep.data.names import Files
from fewstep.data.rows import Columns, ImageRows, holds_rows, read_rows
from fewstep.data.tars import Shards, holds_tars, read_shards
from fewstep.utils.errors import ConfigError

_AT_ONCE = 4096


class Pictures(ABC):
    """Images in an order, perhaps with classes and captions. Subclasses are final frozen dataclasses."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Where they are, for messages."""

    @property
    @abstractmethod
    def labels(self) -> tuple[int, ...] | None:
        """The class of each; None where there are none."""

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Of the labels."""

    @property
    @abstractmethod
    def left_out(self) -> tuple[str, ...]:
        """What lies beside them and is not read, in words."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def name(self, number: int) -> str:
        """What an image is called, for messages and for what a shard is made of."""

    @abstractmethod
    def size(self, number: int) -> int:
        """Of its file, in bytes."""

    @abstractmethod
    def file(self, number: int) -> Path | io.BytesIO:
        """What Pillow opens; raises DataError where it lies in a file that has been changed."""

    @abstractmethod
    def read(self, number: int, image_size: int) -> Pixels | str:
        """Its pixels, as `fewstep.data.folder.decode` gives them; or why there are none."""

    @abstractmethod
    def grey(self, number: int) -> bool | str:
        """Whether it is grey, by its header alone; or why it is no image."""

    @abstractmethod
    def identity(self) -> str:
        """Changes with where the images lie, with sizes and times of files; "" where they cannot be told so."""

    @abstractmethod
    def captions(self, file: Path | None) -> tuple[str, ...]:
        """What is said of each; file: where, if elsewhere. Raises DataError for images without, ConfigError for a file
        that cannot be meant."""


def _states(files: list[str]) -> torch.Tensor:
    """Sizes and times (n, 2) int64 of files; -1 of one that is gone, whose decoding will say so."""
    found = []
    for file in files:
        try:
            state = os.stat(file)
            found.append((state.st_size, state.st_mtime_ns))
        except OSError:
            found.append((-1, -1))
    return torch.tensor(found, dtype=torch.int64)


def digest_of(*values: object) -> str:
    """Thirty-two hex digits of what is said of files."""
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        digest.update(value.numpy().data if isinstance(value, torch.Tensor) else os.fsencode(f"{value}\0"))
    return digest.hexdigest()


@final
@dataclass(frozen=True)
class FolderPictures(Pictures):
    """Image files of a folder."""

    listing: Listing

    @property
    def place(self) -> str:
        return str(self.listing.root)

    @property
    def labels(self) -> tuple[int, ...] | None:
        return self.listing.labels

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.listing.class_names

    @property
    def left_out(self) -> tuple[str, ...]:
        return self.listing.left_out

    def __len__(self) -> int:
        return len(self.listing.files)

    def name(self, number: int) -> str:
        return str(self.listing.files[number].relative_to(self.listing.root))

    def size(self, number: int) -> int:
        return self.listing.files[number].stat().st_size

    def file(self, number: int) -> Path | io.BytesIO:
        return self.listing.files[number]

    def read(self, number: int, image_size: int) -> Pixels | str:
        return decode_or_reason(self.file(number), image_size)

    def grey(self, number: int) -> bool | str:
        return grey_or_reason(self.file(number))

    def identity(self) -> str:
        files = self.listing.files
        names = files.paths() if isinstance(files, Files) else [str(file) for file in files]
        parts = [names[first : first + _AT_ONCE] for first in range(0, len(names), _AT_ONCE)]
        states = chain.from_iterable(read_ahead(_states, batches_of(parts)))
        return digest_of(*names, *states)

    def captions(self, file: Path | None) -> tuple[str, ...]:
        return read_captions(self.listing, file)


@final
@dataclass(frozen=True)
class RowPictures(Pictures):
    """Rows of a Hugging Face dataset."""

    rows: ImageRows

    @property
    def place(self) -> str:
        return self.rows.place.strip("'")

    @property
    def labels(self) -> tuple[int, ...] | None:
        return self.rows.labels()

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.rows.class_names

    @property
    def left_out(self) -> tuple[str, ...]:
        return self.rows.left_out

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, number: int) -> str:
        return f"row {number}"

    def size(self, number: int) -> int:
        return self.rows.sizes[number]

    def file(self, number: int) -> Path | io.BytesIO:
        return io.BytesIO(self.rows.content(number))

    def read(self, number: int, image_size: int) -> Pixels | str:
        return self.rows.decode(number, image_size)

    def grey(self, number: int) -> bool | str:
        content = self.rows.content(number)
        return grey_or_reason(io.BytesIO(content)) if content else "there is no image"

    def identity(self) -> str:
        files = self.rows.files if all(self.rows.stored_sizes()) else ()
        states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return digest_of(self.rows.image, self.rows.label, self.rows.state, *states) if states else ""

    def captions(self, file: Path | None) -> tuple[str, ...]:
        if file is not None:
            raise ConfigError(
                f"{self.rows.place} has captions in a column: leave out --captions, name it --caption-column"
            )
        return self.rows.captions()


@final
@dataclass(frozen=True)
class ShardPictures(Pictures):
    """Members of tar files."""

    shards: Shards

    @property
    def place(self) -> str:
        return self.shards.place

    @property
    def labels(self) -> tuple[int, ...] | None:
        return self.shards.labels

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.shards.class_names

    @property
    def left_out(self) -> tuple[str, ...]:
        return self.shards.left_out

    def __len__(self) -> int:
        return len(self.shards)

    def name(self, number: int) -> str:
        return self.shards.name(number)

    def size(self, number: int) -> int:
        return int(self.shards.images[number, 1])

    def file(self, number: int) -> Path | io.BytesIO:
        return io.BytesIO(self.shards.image(number))

    def read(self, number: int, image_size: int) -> Pixels | str:
        found = decode_or_reason(self.file(number), image_size)
        return without_address(found) if isinstance(found, str) else found

    def grey(self, number: int) -> bool | str:
        found = grey_or_reason(self.file(number))
        return without_address(found) if isinstance(found, str) else found

    def identity(self) -> str:
        return digest_of(*self.shards.files, self.shards.sizes, self.shards.times)

    def captions(self, file: Path | None) -> tuple[str, ...]:
        if file is not None:
            raise ConfigError(f"'{self.place}' has captions in members KEY.txt: leave out --captions")
        return self.shards.captions()


def find_pictures(source: Path, columns: Columns) -> Pictures:
    """The images of tars or of a folder; else rows of parquet there, or of a dataset of the Hugging Face Hub.

    Raises DataError where there are none, ConfigError for columns of images that have none.
    """
    if not holds_tars(source) and holds_rows(source):
        return RowPictures(read_rows(source, columns))
    if columns != Columns():
        raise ConfigError(f"{source} is a folder of images, which has no columns and splits: leave these options out")
    return ShardPictures(read_shards(str(source))) if holds_tars(source) else FolderPictures(list_images(str(source)))


def load_pictures(pictures: Pictures, name: str, image_size: int, skip_unreadable: bool) -> Loaded:
    """All of them in memory, as `load_folder` does with those of a folder, and with its errors."""
    with quiet_bombs():
        read = partial(_read, pictures, image_size)
        pixels, kept, failures = decode_all(range(len(pictures)), read, pictures.name)
    left_out = [*pictures.left_out]
    if failures:
        named = [(pictures.name(number), why) for number, why in failures]
        report_unreadable(named, pictures.place, len(pictures), skip_unreadable)
        left_out.append(f"{len(failures)} unreadable")
    labels = None if pictures.labels is None else torch.tensor(pictures.labels)[kept]
    names, (labels,) = present_classes(pictures.place, pictures.class_names, [labels])
    return Loaded(name, Samples(torch.from_numpy(pixels), labels), None, names, tuple(left_out))


def _read(pictures: Pictures, image_size: int, number: int) -> Pixels | str:
    return pictures.read(number, image_size)
