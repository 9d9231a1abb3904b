"""Images to be encoded, by their numbers: of a folder, or rows of a Hugging Face dataset."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import final

from fewstep.data.captions import read_captions
from fewstep.data.folder import Listing, Pixels, decode_or_reason, list_images
from fewstep.data.rows import Columns, ImageRows, holds_rows, read_rows
from fewstep.utils.errors import ConfigError


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
    def read(self, number: int, image_size: int) -> Pixels | str:
        """Its pixels, as `fewstep.data.folder.decode` gives them; or why there are none."""

    @abstractmethod
    def captions(self, file: Path | None) -> tuple[str, ...]:
        """What is said of each; file: where, if elsewhere. Raises DataError for images without, ConfigError for a file
        that cannot be meant."""


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

    def read(self, number: int, image_size: int) -> Pixels | str:
        return decode_or_reason(self.listing.files[number], image_size)

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

    def read(self, number: int, image_size: int) -> Pixels | str:
        return self.rows.decode(number, image_size)

    def captions(self, file: Path | None) -> tuple[str, ...]:
        if file is not None:
            raise ConfigError(
                f"{self.rows.place} has captions in a column: leave out --captions, name it --caption-column"
            )
        return self.rows.captions()


def find_pictures(source: Path, columns: Columns) -> Pictures:
    """The images of a folder; else rows of parquet there, or of a dataset of the Hugging Face Hub.

    Raises DataError where there are none, ConfigError for columns of a folder of images.
    """
    if holds_rows(source):
        return RowPictures(read_rows(source, columns))
    if columns != Columns():
        raise ConfigError(f"{source} is a folder of images, which has no columns and splits: leave these options out")
    return FolderPictures(list_images(str(source)))
