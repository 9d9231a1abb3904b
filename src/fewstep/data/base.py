"""What every data source becomes: tensors, their labels, and what is measured of them."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.demonstrations.normaliser import PolicySpec
from fewstep.data.latents.autoencoders import LatentSpec
from fewstep.networks.condition import Condition, Prompts
from fewstep.teachers.text import TextSpec
from fewstep.utils.errors import DataError
from fewstep.utils.tensors import expand
from fewstep.utils.text import by, listed

_CHUNK_ELEMENTS = 1 << 22
# ITU-R BT.601 luma in 16-bit fixed point, as Pillow's mode L.
_LUMA = (19595, 38470, 7471)


@dataclass(frozen=True)
class Context:
    """What samples come with besides a label.

    observation: (n, To, Do) float32, normalised, what they are conditioned on. loss_mask: (n, ...) bool, over their
    numbers or broadcasting to them: which of them a loss may count; None for all. prompts: n, embedded.
    """

    observation: Tensor | None = None
    loss_mask: Tensor | None = None
    prompts: Prompts | None = None


def source_path(root: Path | str) -> Path:
    """Where a data source lies, ~ expanded; raises DataError for what can be no place, such as an unknown user's ~."""
    try:
        path = Path(root).expanduser()
        path.is_dir()
    except (OSError, RuntimeError) as error:  # RuntimeError: no such user, or none at all
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"'{str(root)[:100]}' is no place to read data from ({reason}): give another root") from error
    return path


class SampleSet(ABC):
    """Samples of one shape, fetched by their numbers. Subclasses are final frozen dataclasses."""

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64; None unless a subclass has them."""
        return None

    @abstractmethod
    def __len__(self) -> int:
        """N."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (C, H, W) for images and latents, (C, T, H, W) for videos, (steps, Da) for actions."""

    @abstractmethod
    def fetch(self, indices: Tensor, mirror: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The samples at `indices` (n,) int64: float32 (n, *shape), images in [-1, 1], and labels (n,) or None.

        mirror: (n,) bool, which of them to give as mirror images, left to right. Raises DataError where there are none.
        """

    def context(self, indices: Tensor) -> Context:
        """What the samples at `indices` (n,) come with; nothing unless a subclass says so."""
        return Context()

    def conditioned(self, indices: Tensor) -> tuple[Tensor, Condition]:
        """The samples at `indices` (n,), and what they are conditioned on."""
        values, labels = self.fetch(indices)
        context = self.context(indices)
        return values, Condition(labels, observation=context.observation, prompts=context.prompts)

    def captions(self, indices: Tensor) -> list[str]:
        """What is said of the samples at `indices` (n,); none unless a subclass says so."""
        return []

    @abstractmethod
    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of all elements, as fetched, about that one mean."""

    @property
    def data_range(self) -> tuple[float, float] | None:
        """(-1, 1) for images, as bytes or as floats within it; None for values without such a range (latents)."""
        return None

    @property
    def has_mirrors(self) -> bool:
        """Whether mirror images can be fetched."""
        return False

    @property
    def constant(self) -> tuple[int, ...]:
        """Which channels, of chunks which actions, have one value in all samples, as far as that is known."""
        return ()

    def known_fingerprint(self, class_names: tuple[str, ...], heldout: "SampleSet") -> str:
        """Of a data set whose training part they are, where it was taken earlier; "" where it was not."""
        return ""

    @abstractmethod
    def update(self, digest: hashlib.blake2b) -> None:
        """Feed whatever the samples are to a digest."""


@dataclass(frozen=True, eq=False)
class Samples(SampleSet):
    """Samples in memory, kept as they are stored and turned into float32 only when fetched.

    values: (N, C, H, W), of videos (N, C, T, H, W); uint8 for images (0..255 stands for [-1, 1]) or float32 for
    anything else. labels: (N,) int64, or None. Raises DataError for other shapes or types.
    """

    values: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        usable = self.values.ndim in (4, 5) and 0 not in self.values.shape[1:]
        if not usable or self.values.dtype not in (torch.uint8, torch.float32):
            raise DataError(
                f"samples are {self.values.dtype} of shape {tuple(self.values.shape)}: "
                "give uint8 or float32 of shape (N, C, H, W), of videos (N, C, T, H, W)"
            )
        if self.labels is None:
            return
        if self.labels.shape != self.values.shape[:1] or self.labels.dtype != torch.int64:
            raise DataError(
                f"labels are {self.labels.dtype} of shape {tuple(self.labels.shape)}: "
                f"give int64 of shape ({len(self.values)},), one per sample"
            )

    def __repr__(self) -> str:
        labels = "without labels" if self.labels is None else "labelled"
        return f"Samples({len(self):,} of {by(self.shape)}, {self.values.dtype}, {labels})"

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

    def fetch(self, indices: Tensor, mirror: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        indices = indices.to(self.values.device)
        labels = None if self.labels is None else self.labels[indices]
        return mirrored(self.values[indices], mirror), labels

    def moments(self) -> tuple[float, float]:
        return chunk_moments(chunks(self.values))

    @cached_property
    def data_range(self) -> tuple[float, float] | None:
        bounded = not self.values.is_floating_point() or float(self.values.abs().max()) <= 1.0
        return (-1.0, 1.0) if bounded else None

    @property
    def has_mirrors(self) -> bool:
        return True

    @property
    def constant(self) -> tuple[int, ...]:
        others = (0, *range(2, self.values.ndim))
        least, greatest = self.values.amin(others), self.values.amax(others)
        return tuple((least == greatest).nonzero()[:, 0].tolist())

    def update(self, digest: hashlib.blake2b) -> None:
        _update(digest, self.values)
        if self.labels is not None:
            _update(digest, self.labels)

    def select(self, indices: Tensor) -> "Samples":
        """The samples at `indices` (n,) int64, stored as here."""
        return Samples(self.values[indices], None if self.labels is None else self.labels[indices])


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and held-out samples of one shape, with what is measured of the training part.

    num_classes: 0 when there are no labels; otherwise labels lie in [0, num_classes) and class_names has one name each.
    mean, sigma_data: mean and standard deviation of all training elements, as fetched, about that one mean;
    of chunks of actions, of each action once.
    latents: how samples become images, where they are latents. policy: how they are acted on, where they are chunks
    of actions. text: which encoders made the prompts that come with them. left_out, doubt: as of what was loaded; no
    run begins in doubt. split_by: what decides how much is held out, empty where the data bring their own split. Raises
    DataError when the parts do not fit each other, or when the training values are not finite or all equal.
    """

    name: str
    train: SampleSet
    heldout: SampleSet
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    latents: LatentSpec | None = None
    policy: PolicySpec | None = None
    left_out: tuple[str, ...] = ()
    doubt: str = ""
    split_by: str = ""
    text: TextSpec | None = None
    mean: float = field(init=False)
    sigma_data: float = field(init=False)

    def __post_init__(self) -> None:
        if not len(self.train) or not len(self.heldout):
            raise DataError(
                f"'{self.name}' has {len(self.train)} training and {len(self.heldout)} held-out samples: "
                "give at least one of each"
            )
        if self.train.shape != self.heldout.shape:
            raise DataError(
                f"'{self.name}' has training samples of shape {self.train.shape} but held-out samples of shape "
                f"{self.heldout.shape}: bring both to one shape"
            )
        if len(self.class_names) != self.num_classes:
            raise DataError(f"'{self.name}' has {self.num_classes} classes but {len(self.class_names)} class names")
        self._check_labels(self.train, "training")
        self._check_labels(self.heldout, "held-out")
        mean, sigma_data = self.train.moments()
        if not math.isfinite(sigma_data) or sigma_data == 0.0:
            raise DataError(
                f"the training values of '{self.name}' have standard deviation {sigma_data}: "
                "give finite values that are not all equal"
            )
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "sigma_data", sigma_data)

    def __repr__(self) -> str:
        parts = f"{len(self.train):,} to train on, {len(self.heldout):,} held out"
        return f"Dataset({self.name!r}, samples of {by(self.shape)}: {parts}, {self.num_classes} classes)"

    def _check_labels(self, samples: SampleSet, part: str) -> None:
        labels = samples.labels
        if (labels is None) != (self.num_classes == 0):
            has = "no labels" if labels is None else "labels"
            raise DataError(f"'{self.name}' has {self.num_classes} classes but {has} for its {part} samples")
        if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise DataError(
                f"'{self.name}' has {part} labels from {int(labels.min())} to {int(labels.max())}: "
                f"give labels from 0 to {self.num_classes - 1}"
            )

    @property
    def conditional(self) -> bool:
        """Whether samples come with classes or prompts."""
        return self.num_classes > 0 or self.text is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """A sample's shape, (C, H, W) for images."""
        return self.train.shape

    @property
    def of_videos(self) -> bool:
        """Whether samples are videos (C, T, H, W); latents of one frame are an image's."""
        return len(self.shape) == 4 and (self.latents is None or self.shape[1] > 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W); raises DataError where samples are no images."""
        if len(self.shape) != 3:
            raise DataError(f"the samples of '{self.name}' have shape {self.shape}: they are no images")
        channels, height, width = self.shape
        return channels, height, width

    @property
    def data_range(self) -> tuple[float, float] | None:
        """The range of the training samples, None when they have none."""
        return self.train.data_range

    @property
    def summary(self) -> str:
        """What there is, in which classes, how much of it is held out, and what was left out, in one line."""
        pixels = "videos" if self.of_videos else "images"
        kind = "chunks of actions" if self.policy else "latents" if self.latents else pixels
        names, part = self.class_names, "action" if self.policy else "channel"
        if names != tuple(map(str, range(len(names)))) and any(name.isdecimal() for name in names):
            names = tuple(f"{i} = {name}" for i, name in enumerate(names))
        classes = f" in {len(names)} classes ({listed(names)})" if names else ""
        shape, count = "x".join(map(str, self.shape)), len(self.train) + len(self.heldout)
        remarks = [f"{self.name}: {count:,} {kind} of {shape}{classes}, {len(self.heldout):,} of them held out"]
        remarks += [f"with prompts of {self.text.length} x {self.text.width}"] if self.text else []
        remarks += [f"{part} {listed([str(i) for i in self.train.constant])} never varies"] * bool(self.train.constant)
        untrained = set(range(len(names))).difference(() if self.train.labels is None else self.train.labels.tolist())
        remarks += [f"{len(untrained)} classes without a sample to train on"] * bool(untrained)
        remarks += [f"left out: {listed(self.left_out)}"] * bool(self.left_out)
        return "; ".join(remarks)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any value, label, class name, or with the split; not with the name."""
        if known := self.train.known_fingerprint(self.class_names, self.heldout):
            return known
        digest = hashlib.blake2b(digest_size=8)
        digest.update(repr(self.class_names).encode())
        for samples in (self.train, self.heldout):
            samples.update(digest)
        return digest.hexdigest()


@dataclass(frozen=True)
class Loaded:
    """What a source brings: `heldout` is None when it has no split of its own; no class names means no labels.

    left_out: what lies beside the samples and is not read, in words. doubt: how else they may be meant, and the option
    that says so.
    """

    name: str
    train: Samples
    heldout: Samples | None
    class_names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    doubt: str = ""


def chunks(values: Tensor) -> Iterator[Tensor]:
    """Consecutive slices of `values` (N, ...), each of a few million elements."""
    yield from torch.split(values, chunk_size(values.shape[1:]))


def chunk_size(shape: Sequence[int]) -> int:
    """How many samples of a shape a chunk has."""
    return max(1, _CHUNK_ELEMENTS // max(1, math.prod(shape)))


def mirrored(values: Tensor, mirror: Tensor | None) -> Tensor:
    """Stored values (n, ..., W) as float32, images in [-1, 1]; left to right where `mirror` (n,) bool says so."""
    found = _as_floats(values, torch.float32)
    return found if mirror is None else torch.where(expand(mirror.to(found.device), found), found.flip(-1), found)


def luma(colours: Tensor) -> Tensor:
    """Brightness (n, 1, ..., H, W) of red, green and blue (n, 3, ..., H, W), in the same type."""
    weights = torch.tensor(_LUMA, dtype=torch.int32).reshape(3, *[1] * (colours.ndim - 2))
    if colours.dtype == torch.uint8:
        return (((colours.int() * weights).sum(1, keepdim=True) + (1 << 15)) >> 16).to(torch.uint8)
    return (colours * (weights / 65536.0)).sum(1, keepdim=True)


def _as_floats(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype) / 127.5 - 1.0 if values.dtype == torch.uint8 else values.to(dtype)


def chunk_moments(values: Iterable[Tensor]) -> tuple[float, float]:
    """Mean and standard deviation of all elements, in float64, by Chan, Golub and LeVeque's merge of chunks (1979)."""
    count, mean, squares = 0, 0.0, 0.0
    for chunk in values:
        part = _as_floats(chunk, torch.float64)
        size, part_mean = part.numel(), float(part.mean())
        shift, total = part_mean - mean, count + size
        squares += float((part - part_mean).square().sum()) + shift * shift * count * size / total
        mean += shift * size / total
        count = total
    return mean, math.sqrt(squares / count)


def _update(digest: hashlib.blake2b, values: Tensor) -> None:
    digest.update(f"{values.dtype}{tuple(values.shape)}".encode())
    for chunk in chunks(values):
        digest.update(chunk.cpu().contiguous().numpy().data)
