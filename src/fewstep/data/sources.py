"""Where data comes from: one configuration for every source, and one function that loads it."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, final

import torch

from fewstep.data.base import Dataset, Loaded, Samples, chunks, luma, source_path
from fewstep.data.demonstrations.chunks import load_chunks
from fewstep.data.demonstrations.normaliser import ChunkConfig
from fewstep.data.drawn_prompts import EmbeddedPrompts, PromptedSamples
from fewstep.data.folder import load_folder
from fewstep.data.generated import FOLDER, DrawSettings, load_set, read_set
from fewstep.data.idx import load_idx
from fewstep.data.labels import held_out, split
from fewstep.data.latents.shards import load_latents
from fewstep.data.listing import kept_listing
from fewstep.data.npz import Layout, load_npz
from fewstep.data.on_disk import load_on_disk
from fewstep.data.pictures import FolderPictures, Pictures, RowPictures, ShardPictures, load_pictures
from fewstep.data.rows import Columns, read_rows
from fewstep.data.tars import read_shards
from fewstep.data.toys import load_mixture
from fewstep.utils.errors import ConfigError, DataError, MissingExtraError
from fewstep.utils.extras import installing
from fewstep.utils.parts import kind_name, take_kinds
from fewstep.utils.random import Draws
from fewstep.utils.serialization import later
from fewstep.utils.text import counted

# Streams of their own: the order of an epoch is drawn from stream 0 of the same seeds.
_VALUES, _LABELS = 52, 53
_DRAWN_AT_ONCE = 256


_READS_NOTHING = frozenset({"root", "image_size", "value_range"})


class DataSource(ABC):
    """Where samples come from; subclasses are final frozen dataclasses, with settings of their own or none.

    reads_root: whether it reads the folder or file that the data's settings name. ignores: the settings of DataConfig
    that change nothing for it. of_actions: whether its samples are a robot's actions.
    """

    reads_root: ClassVar[bool] = True
    ignores: ClassVar[frozenset[str]] = frozenset()
    of_actions: ClassVar[bool] = False

    @property
    def unit(self) -> str:
        """What one sample is called."""
        return "chunk" if self.of_actions else "image"

    @property
    def of_teacher(self) -> DrawSettings | None:
        """How the run's teacher is sampled for it, before it can be read; None for any other."""
        return None

    @abstractmethod
    def dataset(self, settings: "DataConfig") -> Dataset:
        """The data set; raises DataError for data that are missing or do not fit."""


class ImageSource(DataSource):
    """Images (C, H, W) or videos (C, T, H, W) whose channels are converted, and which are split unless they bring a
    held-out part."""

    @abstractmethod
    def load(self, settings: "DataConfig") -> Loaded:
        """The samples as they are."""

    def dataset(self, settings: "DataConfig") -> Dataset:
        loaded = self.load(settings)
        train, heldout = loaded.train, loaded.heldout
        split_by = "" if heldout is not None else "train anew with --data.heldout"
        if heldout is None:
            if len(train) < 2:
                where = settings.root or loaded.name
                raise DataError(
                    f"'{where}' has {counted(len(train), 'sample')}: at least 2 are needed, to train and to hold out"
                )
            train, heldout = split(train, settings.heldout, settings.seed)
        train, heldout = (_convert(loaded.name, part, settings) for part in (train, heldout))
        names = loaded.class_names
        if not settings.labels:
            names, train, heldout = (), Samples(train.values), Samples(heldout.values)
        left_out, doubt = loaded.left_out, loaded.doubt
        return Dataset(
            loaded.name, train, heldout, len(names), names, left_out=left_out, doubt=doubt, split_by=split_by
        )


@final
@dataclass(frozen=True)
class DigitsSource(ImageSource):
    """scikit-learn's 8x8 digits."""

    reads_root: ClassVar[bool] = False
    ignores: ClassVar[frozenset[str]] = _READS_NOTHING

    def load(self, settings: "DataConfig") -> Loaded:
        """1,797 digits (1, 8, 8) with values 0..16 brought to [-1, 1]."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise MissingExtraError(f"source 'digits' needs scikit-learn: {installing('digits')}") from error
        digits = load_digits()
        values = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
        labels = torch.tensor(digits.target, dtype=torch.int64)
        return Loaded("digits", Samples(values, labels), None, tuple(map(str, digits.target_names)))


@final
@dataclass(frozen=True)
class IdxSource(ImageSource):
    """MNIST's files."""

    ignores: ClassVar[frozenset[str]] = frozenset({"image_size"})

    def load(self, settings: "DataConfig") -> Loaded:
        return load_idx(settings.root, settings.value_range)


@final
@dataclass(frozen=True)
class ImagesSource(ImageSource):
    """A folder of image files."""

    ignores: ClassVar[frozenset[str]] = frozenset({"value_range"})
    on_disk: bool = later(bool)
    """Leave the images in their files and decode them as they are needed, for more than memory holds; see
    --runtime.workers."""

    def dataset(self, settings: "DataConfig") -> Dataset:
        if not self.on_disk:
            return super().dataset(settings)
        return _left_there(FolderPictures(kept_listing(settings.root)), settings)

    def load(self, settings: "DataConfig") -> Loaded:
        return load_folder(settings.root, settings.image_size, settings.skip_unreadable)


def _left_there(pictures: Pictures, settings: "DataConfig") -> Dataset:
    """Pictures that stay where they lie."""
    size, part = (settings.image_size, settings.channels), (settings.heldout, settings.seed)
    name = source_path(settings.root).resolve().name
    return load_on_disk(pictures, name, size, part, settings.labels, settings.skip_unreadable)


def _taken_over(pictures: Pictures, settings: "DataConfig") -> Loaded:
    """Pictures in memory."""
    name = source_path(settings.root).resolve().name
    return load_pictures(pictures, name, settings.image_size, settings.skip_unreadable)


@final
@dataclass(frozen=True)
class HuggingFaceSource(ImageSource):
    """A Hugging Face dataset: parquet, a folder that save_to_disk wrote, or OWNER/NAME as the cache has it."""

    ignores: ClassVar[frozenset[str]] = frozenset({"value_range"})
    split: str = "train"
    """Its split; some of it is held out."""
    image_column: str = ""
    """The column of images; empty for the only one that has any."""
    label_column: str = ""
    """The column of classes, of numbers or of words; empty for label or labels where it has names of classes."""
    on_disk: bool = False
    """Leave the images in the dataset's files and decode them as they are needed; see --runtime.workers."""

    def _pictures(self, settings: "DataConfig") -> Pictures:
        if not settings.root:
            raise DataError(
                "source 'hugging-face' needs root: a parquet file, a folder of those or of save_to_disk, or OWNER/NAME"
            )
        columns, options = Columns(self.image_column, split=self.split), "--data.source."
        return RowPictures(read_rows(source_path(settings.root), columns, options, True, self.label_column))

    def dataset(self, settings: "DataConfig") -> Dataset:
        return _left_there(self._pictures(settings), settings) if self.on_disk else super().dataset(settings)

    def load(self, settings: "DataConfig") -> Loaded:
        return _taken_over(self._pictures(settings), settings)


@final
@dataclass(frozen=True)
class WebdatasetSource(ImageSource):
    """Tar files as WebDataset writes them: a .tar, a folder of those, or a pattern such as train-{000..099}.tar."""

    ignores: ClassVar[frozenset[str]] = frozenset({"value_range"})
    on_disk: bool = False
    """Leave the images in their tars and decode them as they are needed; see --runtime.workers."""

    def dataset(self, settings: "DataConfig") -> Dataset:
        if not self.on_disk:
            return super().dataset(settings)
        return _left_there(ShardPictures(read_shards(settings.root)), settings)

    def load(self, settings: "DataConfig") -> Loaded:
        return _taken_over(ShardPictures(read_shards(settings.root)), settings)


@final
@dataclass(frozen=True)
class LatentsSource(DataSource):
    """A folder that `fewstep encode` wrote, split as it says."""

    ignores: ClassVar[frozenset[str]] = frozenset({"image_size", "value_range", "heldout"})

    def dataset(self, settings: "DataConfig") -> Dataset:
        if settings.image_size or settings.channels:
            raise ConfigError(
                "latents keep the size and channels they were encoded to: leave image_size and channels at 0"
            )
        return load_latents(settings.root, settings.labels, settings.prompts)


@final
@dataclass(frozen=True)
class DemonstrationsSource(DataSource):
    """A robot's episodes in a file that `fewstep demos` wrote, held out by whole episodes."""

    of_actions: ClassVar[bool] = True
    ignores: ClassVar[frozenset[str]] = frozenset({"image_size", "value_range"})

    def dataset(self, settings: "DataConfig") -> Dataset:
        if settings.image_size or settings.channels:
            raise ConfigError("demonstrations are no images: leave image_size and channels at 0")
        return load_chunks(settings.root, settings.chunks, settings.heldout, settings.seed)


@final
@dataclass(frozen=True)
class MixtureSource(ImageSource):
    """A mixture of Gaussians with a closed-form denoiser (fewstep.data.toys)."""

    reads_root: ClassVar[bool] = False
    ignores: ClassVar[frozenset[str]] = _READS_NOTHING

    def load(self, settings: "DataConfig") -> Loaded:
        return load_mixture(settings.seed)


@final
@dataclass(frozen=True)
class NpzSource(ImageSource):
    """A NumPy archive."""

    def load(self, settings: "DataConfig") -> Loaded:
        return load_npz(settings.root, settings.npz_layout, settings.value_range)


@final
@dataclass(frozen=True)
class RandomSource(ImageSource):
    """Standard-normal latents with uniform labels, to build large configurations without their data."""

    reads_root: ClassVar[bool] = False
    ignores: ClassVar[frozenset[str]] = _READS_NOTHING

    def load(self, settings: "DataConfig") -> Loaded:
        indices = torch.arange(settings.random_count)
        parts = torch.split(indices, _DRAWN_AT_ONCE)
        values = torch.cat([Draws(settings.seed, 0, part).normal(_VALUES, settings.random_shape) for part in parts])
        if not settings.random_classes:
            return Loaded("random", Samples(values), None)
        labels = Draws(settings.seed, 0, indices).integers(_LABELS, settings.random_classes)
        return Loaded("random", Samples(values, labels), None, tuple(map(str, range(settings.random_classes))))


@final
@dataclass(frozen=True)
class TeacherSamplesSource(ImageSource):
    """Samples that the run's teacher draws before training: no data are needed, and some of them are held out."""

    draw: DrawSettings = DrawSettings()

    @property
    def of_teacher(self) -> DrawSettings:
        return self.draw

    def load(self, settings: "DataConfig") -> Loaded:
        return load_set(settings.root)[0]

    def dataset(self, settings: "DataConfig") -> Dataset:
        """With the prompts that they were drawn of, unless these are left out."""
        found, folder = super().dataset(settings), source_path(settings.root)
        made = read_set(folder)
        assert made is not None  # it has just been read
        found = replace(found, latents=made.latents)
        if not made.captions or not settings.prompts:
            return found
        prompts = EmbeddedPrompts(folder, made.captions, made.embedded)
        train, heldout = found.train, found.heldout
        assert isinstance(train, Samples)
        assert isinstance(heldout, Samples)
        held = held_out(len(train) + len(heldout), None, settings.heldout, settings.seed)
        rows = [part.nonzero()[:, 0] for part in (~held, held)]
        parts = [PromptedSamples(part, own, prompts) for part, own in zip((train, heldout), rows, strict=True)]
        return replace(found, train=parts[0], heldout=parts[1], text=made.text)


@dataclass(frozen=True)
class DataConfig:
    """A data source and how to read it."""

    source: DataSource = field(default_factory=DigitsSource)
    """Where the samples come from."""
    root: str = ""
    """The folder or file; empty for digits, mixture, random, Debian's Fashion-MNIST (idx) and teacher-samples, which
    then lie in the run."""
    image_size: int = 0
    """Side in pixels of the square that images are cut to; 0 keeps sizes. Other sources must already have it."""
    heldout: float = 0.33
    """Fraction in (0, 1) held out, evenly over classes, when the source brings no split of its own."""
    labels: bool = True
    """Whether to keep the classes; without them models are unconditional."""
    channels: Literal[0, 1, 3] = 0
    """1 or 3 to convert between grey and colour; 0 keeps what the data has."""
    seed: int = 0
    """Decides the split, and the values of mixture and random."""
    skip_unreadable: bool = False
    """Warn about unreadable image files instead of failing."""
    npz_layout: Layout = "auto"
    """Order of an archive's axes, chw or hwc, or rgba, hwc to be laid over white; auto where its shape tells."""
    random_shape: tuple[int, int, int] = (4, 32, 32)
    """Shape (C, H, W) of a sample of random."""
    random_classes: int = 1000
    """Number of classes of random; 0 means no labels."""
    random_count: int = 1024
    """Number of samples of random, at least 2, the held-out ones among them."""
    chunks: ChunkConfig = later(ChunkConfig)
    value_range: tuple[float, float] | None = later(lambda: None)
    """Values of npz and idx that stand for black and white, such as 0 1; None: 0 255 in bytes, -1 1 in floats."""

    prompts: bool = later(lambda: True)
    """Whether to keep the prompts of latents that were encoded with captions, and of a teacher's samples."""

    def __post_init__(self) -> None:
        """Take a source by its name too; raise ConfigError for values outside these ranges."""
        take_kinds(self)
        if not 0.0 < self.heldout < 1.0:
            raise ConfigError(f"heldout is {self.heldout}: give a fraction between 0 and 1, ends excluded")
        if self.image_size < 0:
            raise ConfigError(f"image_size is {self.image_size}: give a side in pixels, or 0 to keep sizes")
        if self.channels not in (0, 1, 3):
            raise ConfigError(f"channels is {self.channels}: give 1 or 3, or 0 to keep what the data has")
        if self.value_range is not None and not -math.inf < self.value_range[0] < self.value_range[1] < math.inf:
            raise ConfigError(
                f"value_range is {self.value_range}: give the values of black and white, black below white"
            )
        if min(self.random_shape) < 1 or self.random_classes < 0 or self.random_count < 2:
            raise ConfigError(
                f"random data of shape {self.random_shape}, {self.random_classes} classes and {self.random_count} "
                "samples: give positive sizes, classes from 0 and at least 2 samples"
            )


def placed_in(run: Path, config: DataConfig) -> DataConfig:
    """The same where a run's teacher draws the samples and no root is given: they lie in the run's folder."""
    own = config.source.of_teacher is not None and not config.root
    return replace(config, root=str(run / FOLDER)) if own else config


def load_dataset(config: DataConfig) -> Dataset:
    """Read the source, convert its channels, and split it unless it brings a held-out part.

    Equal configurations and files give equal data sets. Raises DataError for data that are missing, corrupt, too few
    or of another shape than asked for, and MissingExtraError when a source needs a package that is absent.
    """
    if config.root and not config.source.reads_root:
        raise ConfigError(
            f"the data source {kind_name(type(config.source))!r} is built in and reads nothing from {config.root!r}: "
            "name the kind of data with --data.source (images, hugging-face, webdataset, idx, npz, latents, "
            "demonstrations), or leave --data.root out"
        )
    return config.source.dataset(config)


def _convert(name: str, samples: Samples, config: DataConfig) -> Samples:
    channels, *frames, height, width = samples.shape
    if config.image_size and (height, width) != (config.image_size, config.image_size):
        raise DataError(
            f"'{name}' has samples of {width}x{height}, not image_size {config.image_size}: "
            "only source 'images' is resized; set image_size to 0"
        )
    if config.channels in (0, channels):
        return samples
    if channels == 1:
        return Samples(samples.values.expand(-1, 3, *frames, -1, -1).contiguous(), samples.labels)
    if channels == 3:
        return Samples(torch.cat([luma(chunk) for chunk in chunks(samples.values)]), samples.labels)
    raise DataError(f"'{name}' has {channels} channels, which are no colours: set channels to 0")
