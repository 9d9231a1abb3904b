"""Images and captions in a Hugging Face dataset: parquet on this disk, or one of the Hub, read by `datasets`."""

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fewstep.data.folder import Pixels, decode_or_reason, list_images
from fewstep.utils.errors import DataError, MissingExtraError
from fewstep.utils.text import listed

_CAPTIONS = ("text", "caption", "prompt")
_LABELS = ("label", "labels")
_NAMED, _AT_ONCE = 5, 1000
_NO_FILE = re.compile(r"<_io\.BytesIO[^>]*>")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """Where a Hugging Face dataset has its images and captions."""

    image_column: str = ""
    """The column of images of a dataset; not given: the only one that has any."""
    caption_column: str = ""
    """The column of captions of a dataset; not given: text, caption or prompt."""
    split: str = "train"
    """The split of a dataset."""


@dataclass(frozen=True)
class ImageRows:
    """Rows that each have an image, and perhaps a caption and a class.

    place: of the data, for messages. rows: by their numbers, images as {"bytes", "path"}. texts: the captions' column,
    "" for none. names: of all columns. folders: where files that a row names may lie; no other file is opened.
    """

    place: str
    rows: Sequence[Row]
    image: str
    texts: str
    label: str
    names: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Columns that are not read."""
        read = (self.image, self.texts, self.label)
        return tuple(f"column {name}" for name in self.names if name not in read)

    def labels(self) -> tuple[int, ...] | None:
        """The class of each row; None where there are none. Raises DataError for rows without."""
        if not self.class_names:
            return None
        found = list(self._column(self.label))
        known = range(len(self.class_names))
        self._refuse([k for k, each in enumerate(found) if each not in known], "no class for")
        return tuple(found)

    def content(self, number: int) -> bytes:
        """The image's file; empty where there is none."""
        found = self.rows[number][self.image]
        held = found.get("bytes") if isinstance(found, Mapping) else None
        if held is None and isinstance(found, Mapping) and found.get("path"):
            place = Path(found["path"]).resolve()
            inside = any(place.is_relative_to(folder.resolve()) for folder in self.folders)
            return place.read_bytes() if inside and place.is_file() else b""
        return held if isinstance(held, bytes) else b""

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Of each image's file in bytes, 0 where there is none; read off the table's offsets where rows are a table."""
        found = self._stored_sizes()
        return tuple(size or len(self.content(k)) for k, size in enumerate(found or [0] * len(self)))

    def _stored_sizes(self) -> list[int]:
        """Of what lies in the column itself; none for rows that are no table of Arrow."""
        if not hasattr(self.rows, "select_columns"):
            return []
        import pyarrow.compute as pc

        parts = self.rows.select_columns([self.image]).with_format("arrow").iter(_AT_ONCE)
        columns = (pc.struct_field(part.column(self.image), "bytes") for part in parts)
        return [size or 0 for column in columns for size in pc.binary_length(column).to_pylist()]

    def decode(self, number: int, image_size: int) -> Pixels | str:
        """As `fewstep.data.folder.decode`, or why there is nothing."""
        content = self.content(number)
        found = decode_or_reason(io.BytesIO(content), image_size) if content else "there is no image"
        return _NO_FILE.sub("what the row holds", found) if isinstance(found, str) else found

    def captions(self) -> tuple[str, ...]:
        """Of every row, in order.

        Raises DataError, naming some, for rows without one, without a word, or without an image; and where no column
        has captions.
        """
        if not self.texts:
            raise DataError(
                f"{self.place} has no column of captions among its columns ({listed(self.names)}): name it with "
                "--caption-column"
            )
        found = list(self._column(self.texts))
        self._refuse([k for k, each in enumerate(found) if not isinstance(each, str)], "no caption, in words, for")
        self._refuse([k for k, each in enumerate(found) if not each.strip()], "captions without a word for")
        self._refuse([k for k, size in enumerate(self.sizes) if not size], "captions without image for")
        return tuple(each.strip() for each in found)

    def _column(self, name: str) -> Iterable[Any]:
        column = getattr(self.rows, "select_columns", None)  # of datasets, which need not read images for it
        rows = self.rows if column is None else column([name])
        return (row[name] for row in rows)

    def _refuse(self, numbers: list[int], what: str) -> None:
        if numbers:
            more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
            rows = ", ".join(f"row {number}" for number in numbers[:_NAMED])
            raise DataError(f"{self.place} has {what} {rows}{more}: mend or remove these rows")


def holds_rows(source: Path) -> bool:
    """Whether a place is a parquet file, a folder of parquet without images, or else may name a dataset of the Hub."""
    if source.is_dir():
        if next(_parquet(source), None) is None:
            return False
        try:
            list_images(str(source))
        except DataError:
            return True
        return False
    named = len(source.parts) == 2 and not source.is_absolute() and source.parts[0] not in (".", "..", "~")
    return source.suffix == ".parquet" or (named and not source.exists() and not source.parent.exists())


def _parquet(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*.parquet") if not any(part.startswith(".") for part in file.parts[1:]))


def read_rows(source: Path, columns: Columns) -> ImageRows:
    """The rows of a parquet file, of a folder of those by their splits, or of OWNER/NAME of the Hub.

    Nothing of the data is run. Raises MissingExtraError without `datasets`, DataError for what cannot be read and for
    columns that are not there.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"'{source}' is no folder of images, and parquet and datasets of the Hub need the library datasets: "
            f"pip install 'fewstep[data]' ({error})"
        ) from error
    shown, said = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it raises says as much
    place = f"'{source}'"
    try:
        if source.suffix == ".parquet":
            found = datasets.load_dataset("parquet", data_files=str(source), split=columns.split)
        else:
            found = datasets.load_dataset(str(source), split=columns.split)
        name = find_image_column(place, {key: type(each).__name__ for key, each in found.features.items()}, columns)
        found = found.cast_column(name, datasets.Image(decode=False))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{place} holds no dataset that can be read: {type(error).__name__}: {reason}") from error
    finally:
        datasets.logging.set_verbosity(said)
        if shown:
            datasets.enable_progress_bars()
    label, names = _classes(found.features)
    texts = find_caption_column(place, tuple(found.features), columns)
    own = source.parent if source.suffix == ".parquet" else source
    folders = (*([own] if own.is_dir() else []), Path(datasets.config.HF_CACHE_HOME))
    return ImageRows(place, found, name, texts, label, tuple(found.features), names, folders)


def find_image_column(place: str, kinds: Mapping[str, str], columns: Columns) -> str:
    """The column of images; kinds: of each column, by the class of its feature.

    Raises DataError where there is none of that name, none at all, or more than one to choose from.
    """
    if columns.image_column:
        return _named(place, columns.image_column, tuple(kinds), "--image-column")
    found = [name for name, kind in kinds.items() if kind == "Image"] or [name for name in kinds if name == "image"]
    if len(found) != 1:
        which = f"several columns of images ({listed(found)})" if found else "no column of images"
        among = "" if found else f" among its columns ({listed(tuple(kinds))})"
        raise DataError(f"{place} has {which}{among}: name one with --image-column")
    return found[0]


def find_caption_column(place: str, names: Sequence[str], columns: Columns) -> str:
    """The column of captions; "" where none is named and none is called as such are."""
    if columns.caption_column:
        return _named(place, columns.caption_column, names, "--caption-column")
    return next((name for name in _CAPTIONS if name in names), "")


def _named(place: str, name: str, names: Sequence[str], option: str) -> str:
    if name not in names:
        raise DataError(
            f"{place} has no column {name!r}; its columns are {listed(names)}: name one of them by {option}"
        )
    return name


def _classes(features: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The column of classes and their names; nothing where no column of that name has any."""
    for name in _LABELS:
        found = getattr(features.get(name), "names", None)
        if found:
            return name, tuple(map(str, found))
    return "", ()
