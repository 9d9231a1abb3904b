"""What a user's data are, seen without reading all of them: how many, how large, how many classes, which options."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from fewstep.data.base import source_path
from fewstep.data.demonstrations.episodes import load_demonstrations
from fewstep.data.folder import list_images, quiet_bombs
from fewstep.data.labels import present_classes
from fewstep.data.latents.shards import MANIFEST_FILE
from fewstep.data.npz import read_arrays
from fewstep.data.pictures import FolderPictures, Pictures, RowPictures, ShardPictures
from fewstep.data.rows import Columns, holds_rows, read_rows
from fewstep.data.sources import DataConfig, DataSource, load_dataset
from fewstep.data.tars import holds_tars, read_shards
from fewstep.utils.errors import DataError
from fewstep.utils.parts import kind, kind_name

BUILT_IN = {"digits": "digits", "mixture": "mixture", "fashion-mnist": "idx"}
"""Data that are there without a file, and their source."""

_LOOKED_AT = 48
_GREY = {"1", "L", "LA", "I;16"}


@dataclass(frozen=True)
class Look:
    """Data as they are found.

    source: its kind. shape: of a sample; of image files (C, shortest side, longest side). count: samples, of
    demonstrations steps. words: the options of `fewstep train` that name them, none where the recipe's own are meant.
    """

    name: str
    source: str
    count: int
    shape: tuple[int, ...]
    classes: int = 0
    words: tuple[str, ...] = ()
    episodes: int = 0
    prompts: bool = False

    @property
    def of_files(self) -> bool:
        """Whether samples are image files, of any size: in a folder, in tars or in rows."""
        return self.source in ("images", "webdataset", "hugging-face")

    def __str__(self) -> str:
        if self.episodes:
            seen, done = self.shape
            return f"{self.name}: {self.episodes} episodes, {self.count:,} steps, {seen} numbers seen and {done} moved"
        sizes = "x".join(map(str, self.shape))
        if self.of_files:
            channels, low, high = self.shape
            sides = f"{low}" if low == high else f"{low} to {high}"
            sizes = f"{'grey' if channels == 1 else 'colour'}, sides of {sides} pixels"
        classes = f"{self.classes} classes" if self.classes else "no classes"
        return f"{self.name}: {self.count:,} samples, {sizes}, {classes}" + ", with prompts" * self.prompts


def look(data: str) -> Look:
    """What data are: the name of built-in ones, a folder of images, of latents, or in MNIST's layout, tars of images,
    a Hugging Face dataset, an .npz archive of images or demonstrations, or a .safetensors file of demonstrations.

    Raises DataError for what is none of these, or what its loader refuses.
    """
    path = source_path(data)
    if path.is_dir():
        return _folder(data, path)
    if path.suffix == ".safetensors" or (path.suffix == ".npz" and path.is_file() and _is_demonstrations(path)):
        return _demonstrations(data, path)
    if path.suffix == ".npz":
        return _loaded(data, DataConfig(kind(DataSource, "npz"), root=data))
    if data in BUILT_IN:
        return _loaded(data, DataConfig(kind(DataSource, BUILT_IN[data])))
    if holds_tars(path) or holds_rows(path):
        return _pictures(data, path)
    raise DataError(
        f"{data} is no data: give {', '.join(BUILT_IN)}, a folder of images or latents, tars, parquet or a cached "
        "OWNER/NAME, an .npz archive, or demonstrations (.npz or .safetensors)"
    )


def _folder(data: str, path: Path) -> Look:
    if (path / MANIFEST_FILE).is_file():
        return _latents(data, path)
    if any(path.glob("train-images-idx3-ubyte*")):
        return _loaded(data, DataConfig(kind(DataSource, "idx"), root=data))
    return _pictures(data, path)


def _pictures(data: str, path: Path) -> Look:
    source, pictures = _source_of(data, path)
    with quiet_bombs():
        seen = list(_headers(pictures))
    if not seen:
        raise DataError(f"{data}: none of the images that were looked at can be read: give another place")
    sides = [side for width, height, _ in seen for side in (width, height)]
    channels = 1 if all(grey for _, _, grey in seen) else 3
    labels = None if pictures.labels is None else torch.tensor(pictures.labels)
    classes = len(present_classes(pictures.place, pictures.class_names, [labels])[0])
    words = ("--data.source", source, "--data.root", data)
    shape = (channels, min(sides), max(sides))
    return Look(path.resolve().name, source, len(pictures), shape, classes, words)


def _source_of(data: str, path: Path) -> tuple[str, Pictures]:
    """The kind of source that reads them in training, and what it reads."""
    if holds_tars(path):
        return "webdataset", ShardPictures(read_shards(data))
    if holds_rows(path):
        return "hugging-face", RowPictures(read_rows(path, Columns(), "--data.source.", local=True))
    return "images", FolderPictures(list_images(data))


def _headers(pictures: Pictures) -> Iterator[tuple[int, int, bool]]:
    """(width, height, whether grey) of some of them, evenly spaced; unreadable ones are passed over."""
    looked_at = min(_LOOKED_AT, len(pictures))
    for number in range(looked_at):
        try:
            with Image.open(pictures.file(number * len(pictures) // looked_at)) as file:
                yield *file.size, file.mode in _GREY
        except (OSError, ValueError, SyntaxError):
            continue


def _latents(data: str, path: Path) -> Look:
    dataset = load_dataset(DataConfig(kind(DataSource, "latents"), root=data))
    count, words = len(dataset.train) + len(dataset.heldout), ("--data.source", "latents", "--data.root", data)
    return Look(
        path.name, "latents", count, tuple(dataset.shape), dataset.num_classes, words, prompts=dataset.text is not None
    )


def _is_demonstrations(path: Path) -> bool:
    return bool({"observations", "actions", "episode_ends"} & set(read_arrays(path, ("task",))))


def _demonstrations(data: str, path: Path) -> Look:
    found = load_demonstrations(path)
    shape = found.observations.shape[1], found.actions.shape[1]
    return Look(
        found.task or path.stem, "demonstrations", len(found.actions), shape, words=("--data.root", data),
        episodes=len(found),
    )  # fmt: skip


def _loaded(data: str, config: DataConfig) -> Look:
    dataset, name = load_dataset(config), kind_name(type(config.source))
    words = ("--data.source", name, "--data.root", data) if config.root else ()
    count = len(dataset.train) + len(dataset.heldout)
    return Look(dataset.name, name, count, tuple(dataset.shape), dataset.num_classes, words)
