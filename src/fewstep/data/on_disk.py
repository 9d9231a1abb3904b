"""Images that stay where they lie and are decoded whenever they are fetched: any number of them, in little memory.

What must be known of all of them is found out once and kept (fewstep.data.kept): which are grey, which are no images,
their mean, deviation and fingerprint.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import final

import PIL
import torch
from torch import Tensor

from fewstep.data.base import Dataset, SampleSet, chunk_moments, chunk_size, luma, mirrored
from fewstep.data.folder import Pixels, batches_of, quiet_bombs, read_ahead, report_unreadable, with_bar
from fewstep.data.kept import Kept, keep, place, read_kept
from fewstep.data.labels import held_out, present_classes
from fewstep.data.pictures import Pictures
from fewstep.utils.errors import ConfigError, DataError


@dataclass(frozen=True)
class Measures:
    """What a pass over all images finds out: of the training part mean and deviation, and the data's fingerprint."""

    mean: float
    deviation: float
    fingerprint: str


@final
@dataclass(frozen=True, eq=False)
class PictureSamples(SampleSet):
    """Those pictures whose numbers are `rows` (N,), cut to squares of `side` pixels; labels: (N,) int64, or None.

    channels: 1 or 3. What is fetched is what the same images would be in memory (`load_folder`, `load_pictures`), to
    the bit. measures: of these as the training part beside `partner`, under `class_names`; None until they are known.
    """

    pictures: Pictures
    rows: Tensor
    side: int
    channels: int
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    partner: "PictureSamples | None" = None
    measures: Measures | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.channels, self.side, self.side

    def fetch(self, indices: Tensor, mirror: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As of any samples; raises DataError naming an image that cannot be read."""
        indices = indices.cpu()
        with quiet_bombs():
            found = [self._pixels(number, self._decoded(number)) for number in self.rows[indices].tolist()]
        labels = None if self.labels is None else self.labels[indices]
        return mirrored(torch.stack(found), None if mirror is None else mirror.cpu()), labels

    def _decoded(self, number: int) -> Pixels | str:
        return self.pictures.read(number, self.side)

    def _pixels(self, number: int, found: Pixels | str) -> Tensor:
        """(C, H, W) uint8 of what picture `number` was decoded to."""
        if isinstance(found, str):
            name, where = self.pictures.name(number), self.pictures.place
            raise DataError(f"'{name}' in '{where}' cannot be read ({found}): mend or remove it")
        grey = found.ndim == 2
        pixels = torch.from_numpy(found)[None] if grey else torch.from_numpy(found).permute(2, 0, 1)
        if self.channels == 3:
            return pixels.expand(3, -1, -1)
        return pixels if grey else luma(pixels[None])[0]

    def _chunks(self) -> Iterator[Tensor]:
        """All images as uint8 (n, C, H, W), in portions of the size that those in memory are measured in."""
        size, numbers = chunk_size(self.shape), self.rows.tolist()
        results = chain.from_iterable(read_ahead(self._decoded, batches_of(numbers)))
        waiting: list[Tensor] = []
        with quiet_bombs():
            for number, found in zip(numbers, with_bar(results, "measuring images", len(numbers)), strict=True):
                waiting.append(self._pixels(number, found))
                if len(waiting) == size:
                    yield torch.stack(waiting)
                    waiting = []
        if waiting:
            yield torch.stack(waiting)

    def fed(self, digest: "hashlib.blake2b") -> Iterator[Tensor]:
        """All images in portions, each as a digest has been fed with it; at their end with the labels."""
        digest.update(f"{torch.uint8}{(len(self), *self.shape)}".encode())
        for chunk in self._chunks():
            digest.update(chunk.contiguous().numpy().data)
            yield chunk
        if self.labels is not None:
            digest.update(f"{self.labels.dtype}{tuple(self.labels.shape)}".encode())
            digest.update(self.labels.contiguous().numpy().data)

    def moments(self) -> tuple[float, float]:
        """As they are known; decodes all images where they are not."""
        if self.measures is None:
            return chunk_moments(self._chunks())
        return self.measures.mean, self.measures.deviation

    def known_fingerprint(self, class_names: tuple[str, ...], heldout: SampleSet) -> str:
        as_measured = heldout is self.partner and class_names == self.class_names
        return self.measures.fingerprint if self.measures is not None and as_measured else ""

    @property
    def data_range(self) -> tuple[float, float] | None:
        return (-1.0, 1.0)

    @property
    def has_mirrors(self) -> bool:
        return True

    def update(self, digest: "hashlib.blake2b") -> None:
        """As the same images in memory do; decodes all of them."""
        for _ in self.fed(digest):
            pass


def load_on_disk(
    pictures: Pictures,
    name: str,
    size: tuple[int, int],
    split: tuple[float, int],
    labelled: bool,
    skip_unreadable: bool,
) -> Dataset:
    """Pictures as in memory, left where they lie; their headers are read, and all are measured, once.

    size: side in pixels, and 1 or 3 channels or 0 for what they have. split: the share held out and its seed. Raises
    ConfigError without a side in pixels, DataError for what is no image, which it names; with skip_unreadable it is
    left out.
    """
    (side, channels), (heldout, seed) = size, split
    if side < 1:
        raise ConfigError("images that stay on disk are cut to one size: give it with --data.image-size")
    identity = pictures.identity()
    grey, failures = _heads(pictures, identity)
    left_out = [*pictures.left_out]
    if failures:
        named = [(pictures.name(number), why) for number, why in failures.items()]
        report_unreadable(named, pictures.place, len(pictures), skip_unreadable)
        left_out.append(f"{len(failures)} unreadable")
    readable = torch.ones(len(pictures), dtype=torch.bool)
    readable[list(failures)] = False
    kept = readable.nonzero()[:, 0]
    found = None if pictures.labels is None else torch.tensor(pictures.labels)[kept]
    names, (labels,) = present_classes(pictures.place, pictures.class_names, [found])
    held = held_out(len(kept), labels, heldout, seed)
    labels, names = (labels, names) if labelled else (None, ())
    own = channels or (1 if bool(grey[kept].all()) else 3)
    rows = (~held).nonzero()[:, 0], held.nonzero()[:, 0]
    classes = [None if labels is None else labels[part] for part in rows]
    other = PictureSamples(pictures, kept[rows[1]], side, own, classes[1])
    train = PictureSamples(pictures, kept[rows[0]], side, own, classes[0], names, other)
    train = replace(train, measures=_measures(train, other, identity, (heldout, seed, sorted(failures))))
    advice = "train anew with --data.heldout"
    return Dataset(name, train, other, len(names), names, left_out=tuple(left_out), split_by=advice)


def _heads(pictures: Pictures, identity: str) -> tuple[Tensor, dict[int, str]]:
    """Which are grey, (N,) bool, and by their numbers why others are no images; as kept where they were read once."""
    file = place("heads", identity, PIL.__version__)
    if identity and (kept := read_kept(file)):
        return kept.tensors["grey"], {int(number): why for number, why in kept.note["failures"].items()}
    with quiet_bombs():
        numbers = range(len(pictures))
        results = chain.from_iterable(read_ahead(pictures.grey, batches_of(numbers)))
        heads = list(with_bar(results, "reading headers", len(numbers)))
    grey = torch.tensor([head is True for head in heads])
    failures = {number: head for number, head in enumerate(heads) if isinstance(head, str)}
    if identity:
        keep(file, Kept({"grey": grey}, {"failures": failures}))
    return grey, failures


def _measures(train: PictureSamples, other: PictureSamples, identity: str, split: tuple[object, ...]) -> Measures:
    """As kept where they were taken once; by one pass over all images."""
    settings = (train.side, train.channels, train.class_names, split)
    file = place("measures", identity, PIL.__version__, *settings)
    if identity and (kept := read_kept(file)):
        return Measures(**kept.note)
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr(train.class_names).encode())
    mean, deviation = chunk_moments(train.fed(digest))
    other.update(digest)
    found = Measures(mean, deviation, digest.hexdigest())
    if identity:
        keep(file, Kept({}, vars(found)))
    return found
