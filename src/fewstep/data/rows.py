"""Images and captions in a Hugging Face dataset: on this disk, or one of the Hub, read by `datasets`."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fewstep.data.folder import Pixels, decode_or_reason, list_images, without_address
from fewstep.data.labels import natural_order
from fewstep.utils.errors import DataError, MissingExtraError
from fewstep.utils.hub import cached_copy
from fewstep.utils.text import listed

_CAPTIONS = ("text", "caption", "prompt")
_LABELS = ("label", "labels")
_NAMED, _AT_ONCE = 5, 1000
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
    "" for none. names: of all columns. folders: where files that a row names may lie; no other file is opened. files,
    state: the tables' files and what the library says of their rows, where rows are tables of Arrow.
    """

    place: str
    rows: Sequence[Row]
    image: str
    texts: str
    label: str
    names: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    files: tuple[Path, ...] = ()
    state: str = ""

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
        found = self._column(self.label)
        known = range(len(self.class_names))
        self._refuse([k for k, each in enumerate(found) if each not in known], "no class for")
        return tuple(found)

    @cached_property
    def _images(self) -> Sequence[Row]:
        """Rows of the one column, so that no other is read along."""
        column = getattr(self.rows, "select_columns", None)
        return self.rows if column is None else column([self.image])

    def content(self, number: int) -> bytes:
        """The image's file; empty where there is none."""
        found = self._images[number][self.image]
        held = found.get("bytes") if isinstance(found, Mapping) else None
        if held is None and isinstance(found, Mapping) and found.get("path"):
            place = Path(found["path"]).resolve()
            inside = any(place.is_relative_to(folder.resolve()) for folder in self.folders)
            return place.read_bytes() if inside and place.is_file() else b""
        return held if isinstance(held, bytes) else b""

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Of each image's file in bytes, 0 where there is none; read off the table's offsets where rows are a table."""
        found = self.stored_sizes()
        return tuple(size or len(self.content(k)) for k, size in enumerate(found or [0] * len(self)))

    def stored_sizes(self) -> list[int]:
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
        return without_address(found) if isinstance(found, str) else found

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
        found = self._column(self.texts)
        self._refuse([k for k, each in enumerate(found) if not isinstance(each, str)], "no caption, in words, for")
        self._refuse([k for k, each in enumerate(found) if not each.strip()], "captions without a word for")
        self._refuse([k for k, size in enumerate(self.sizes) if not size], "captions without image for")
        return tuple(each.strip() for each in found)

    def _column(self, name: str) -> list[Any]:
        column = getattr(self.rows, "select_columns", None)  # of datasets, which need not read images for it
        return [row[name] for row in self.rows] if column is None else list(column([name])[:][name])

    def _refuse(self, numbers: list[int], what: str) -> None:
        if numbers:
            more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
            rows = ", ".join(f"row {number}" for number in numbers[:_NAMED])
            raise DataError(f"{self.place} has {what} {rows}{more}: mend or remove these rows")


def holds_rows(source: Path) -> bool:
    """Whether a place is a parquet file, a folder of parquet without images or one that `save_to_disk` wrote, or else
    may name a dataset of the Hub."""
    if source.is_dir():
        if _saved(source):
            return True
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


def _saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder: a dataset, or one of several splits."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_rows(source: Path, columns: Columns, options: str = "--", local: bool = False, label: str = "") -> ImageRows:
    """The rows of a parquet file, of a folder of those by their splits, of what `save_to_disk` wrote, or of OWNER/NAME
    of the Hub.

    options: how the command's options begin, for messages. local: of the Hub only what is in its cache here. label: the
    column of classes, found by its name where it is not given. Nothing of the data is run. Raises MissingExtraError
    without `datasets`, DataError for what cannot be read and for columns that are not there.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"'{source}' is no folder of images, and parquet and datasets of the Hub need the library datasets: "
            f"pip install 'fewstep[data]' ({error})"
        ) from error
    place = f"'{source}'"
    with _quietly(datasets):
        try:
            found = _opened(datasets, source, columns.split, local)
            kinds = {key: type(each).__name__ for key, each in found.features.items()}
            name = find_image_column(place, kinds, columns, options)
            found = found.with_format(None).cast_column(name, datasets.Image(decode=False))
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"{place} holds no dataset that can be read: {type(error).__name__}: {reason}") from error
    if label:
        found = _with_classes(
            datasets, place, found, _named(place, label, tuple(found.features), f"{options}label-column")
        )
    label, names = _classes(found.features, label)
    texts = find_caption_column(place, tuple(found.features), columns, options)
    own = source.parent if source.suffix == ".parquet" else source
    folders = (*([own] if own.is_dir() else []), Path(datasets.config.HF_CACHE_HOME))
    files = tuple(Path(each["filename"]) for each in found.cache_files)
    return ImageRows(
        place, found, name, texts, label, tuple(found.features), names, folders, files, str(found._fingerprint)
    )


@contextmanager
def _quietly(datasets: Any) -> Iterator[None]:
    """Inside, the library shows nothing."""
    shown, said = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it raises says as much
    try:
        yield
    finally:
        datasets.logging.set_verbosity(said)
        if shown:
            datasets.enable_progress_bars()


def _opened(datasets: Any, source: Path, split: str, local: bool) -> Any:
    """The table of a split."""
    if source.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=str(source), split=split)
    if source.is_dir() and _saved(source):
        found = datasets.load_from_disk(str(source))
        parts = found if isinstance(found, dict) else {str(found.split or split): found}
        if split not in parts:
            raise ValueError(f"it has no split {split!r}, but {listed(tuple(parts))}")
        return parts[split]
    if source.is_dir() or not local:
        return datasets.load_dataset(str(source), split=split)
    return _cached(datasets, str(source), split)


def _cached(datasets: Any, name: str, split: str) -> Any:
    """A dataset of the Hub as `datasets` or the Hub's own client has kept it on this machine."""
    config = datasets.config
    offline, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        return datasets.load_dataset(name, split=split)
    except (OSError, datasets.exceptions.DatasetsError):
        copy = cached_copy(name, "dataset")
        if copy is None:
            raise FileNotFoundError(
                f"{name} is neither a place nor in the cache of the Hugging Face Hub, and nothing is fetched while "
                f"training: fetch it with hf download --repo-type dataset {name}"
            ) from None
        return datasets.load_dataset(str(copy), split=split)
    finally:
        config.HF_HUB_OFFLINE = offline


def _with_classes(datasets: Any, place: str, found: Any, label: str) -> Any:
    """The table with a column of numbers or words as one of classes."""
    if getattr(found.features[label], "names", None):
        return found
    values = found.select_columns([label])[:][label]
    kinds = {type(each) for each in values}
    if kinds == {int} and min(values) >= 0:
        names = [str(number) for number in range(max(values) + 1)]
    elif kinds == {str}:
        names = sorted(set(values), key=natural_order)
    else:
        raise DataError(f"{place} has no numbers from 0 or words in every row of column {label!r}: name another")
    return found.cast_column(label, datasets.ClassLabel(names=names))


def find_image_column(place: str, kinds: Mapping[str, str], columns: Columns, options: str = "--") -> str:
    """The column of images; kinds: of each column, by the class of its feature.

    Raises DataError where there is none of that name, none at all, or more than one to choose from.
    """
    if columns.image_column:
        return _named(place, columns.image_column, tuple(kinds), f"{options}image-column")
    found = [name for name, kind in kinds.items() if kind == "Image"] or [name for name in kinds if name == "image"]
    if len(found) != 1:
        which = f"several columns of images ({listed(found)})" if found else "no column of images"
        among = "" if found else f" among its columns ({listed(tuple(kinds))})"
        raise DataError(f"{place} has {which}{among}: name one with {options}image-column")
    return found[0]


def find_caption_column(place: str, names: Sequence[str], columns: Columns, options: str = "--") -> str:
    """The column of captions; "" where none is named and none is called as such are."""
    if columns.caption_column:
        return _named(place, columns.caption_column, names, f"{options}caption-column")
    return next((name for name in _CAPTIONS if name in names), "")


def _named(place: str, name: str, names: Sequence[str], option: str) -> str:
    if name not in names:
        raise DataError(
            f"{place} has no column {name!r}; its columns are {listed(names)}: name one of them by {option}"
        )
    return name


def _classes(features: Mapping[str, Any], label: str = "") -> tuple[str, tuple[str, ...]]:
    """The column of classes and their names; nothing where no column of that name has any."""
    for name in (label,) if label else _LABELS:
        found = getattr(features.get(name), "names", None)
        if found:
            return name, tuple(map(str, found))
    return "", ()
