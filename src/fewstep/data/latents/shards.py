"""Latents of images, encoded once (fewstep.data.latents.encode) and read from shards: they need not fit into memory.

DIR/latents.json            the manifest: autoencoder, settings, shapes, classes, what was measured, the shards
DIR/latents-N.safetensors   `latents` (n, c, h, w), `mirrored` likewise where flips are stored, `labels` (n,) where
                            there are classes, `indices` (n,): each image's number in the folder's listing; the prompts
                            of their captions (fewstep.data.latents.prompts)
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.data.base import Context, Dataset, SampleSet, source_path
from fewstep.data.labels import held_out, present_classes
from fewstep.data.latents.autoencoder_kinds import Units
from fewstep.data.latents.autoencoders import AutoencoderIdentity, LatentSpec
from fewstep.data.latents.moments import varies
from fewstep.data.latents.prompts import EMPTY_FILE, PromptRecord, prompt_keys, prompts_of, read_empty
from fewstep.networks.condition import Prompts
from fewstep.utils.errors import ConfigError, DataError
from fewstep.utils.files import parse_json, reading
from fewstep.utils.serialization import from_json, later

VERSION = 1
MANIFEST_FILE = "latents.json"
_LOOKED_AT = 256
HEADER = "fewstep_latents"
Posterior = Literal["sample", "mean"]
StoredType = Literal["float16", "float32"]


@dataclass(frozen=True)
class EncodingSettings:
    """What, with the images and the autoencoder, decides the latents that are stored.

    Raises ConfigError for values out of range.
    """

    image_size: int = 256
    """Side of the square that images are resized and cut to."""
    flip: bool = True
    """Store the latent of every mirrored image too, for training with flips: latents cannot be mirrored exactly."""
    posterior: Posterior = "sample"
    """sample: one draw from each image's posterior, decided by the seed and the image's number; mean: its mean."""
    dtype: StoredType = "float16"
    """Number format of the stored latents."""
    shard_size: int = 4096
    """Images in a shard: what is lost at most when the command is stopped."""
    heldout: float = 0.05
    """Fraction held out of training, evenly over classes."""
    seed: int = 0
    """Of the posterior's draws and of the split."""

    @property
    def bytes(self) -> int:
        """Of a stored number."""
        return 2 if self.dtype == "float16" else 4

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.shard_size < 1 or not 0 < self.heldout < 1 or not 0 <= self.seed < 2**63:
            raise ConfigError(
                f"latents of images of side {self.image_size} in shards of {self.shard_size}, {self.heldout} held out, "
                f"seed {self.seed}: give sizes from 1, a fraction between 0 and 1, ends excluded, and a seed from 0"
            )


@dataclass(frozen=True)
class Shard:
    """A file of latents: its name, images, size in bytes, and sixteen hex digits of its content."""

    file: str
    count: int
    size: int
    fingerprint: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of latents holds; raises ConfigError where its numbers do not fit each other.

    shape: of a latent, (c, h, w); image_shape: of an image, (C, H, W). count: images. mean, std: of the training part's
    latents by channel, unmirrored, as stored; std 0 for a channel that never varies. posterior_std: root mean square by
    channel of all posteriors' standard deviations: what a fresh draw would change. scale: the standard deviation that a
    channel is given when read. units: those of a pipeline, in which latents are read instead. prompts: of the images'
    captions, if there are any.
    """

    version: int
    autoencoder: AutoencoderIdentity
    settings: EncodingSettings
    scale: float
    shape: tuple[int, ...]
    image_shape: tuple[int, int, int]
    count: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    posterior_std: tuple[float, ...]
    shards: tuple[Shard, ...]
    units: Units | None = later(lambda: None)
    prompts: PromptRecord | None = later(lambda: None)

    def __post_init__(self) -> None:
        counts, foreign = [shard.count for shard in self.shards], [shard.file for shard in self.shards]
        channels = {len(self.mean), len(self.spec.mean), len(self.spec.std)}
        if len(self.shape) not in (3, 4) or channels != {self.shape[0]} or min(self.shape) < 1:
            raise ConfigError(f"latents of shape {self.shape} have no {len(self.mean)} channels")
        if min(counts, default=0) < 0 or self.count != sum(counts):
            raise ConfigError(f"count is {self.count}, but the shards have {sum(counts)} images")
        foreign = [name for name in foreign if not re.fullmatch(r"latents-\d+\.safetensors", name)]
        if foreign:
            raise ConfigError(f"{foreign[0]!r} is no name of a shard, such as latents-00000.safetensors")

    @property
    def spec(self) -> LatentSpec:
        """How samples read from the folder become images."""
        if self.units is None:
            return LatentSpec(self.autoencoder, self.mean, self.std, self.scale, self.image_shape)
        std = tuple(1.0 / factor for factor in self.units.factor)
        return LatentSpec(self.autoencoder, self.units.shift, std, 1.0, self.image_shape)

    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of all numbers of the training part, as they are read."""
        if self.units is None:  # each channel was brought to these
            return 0.0, self.scale
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.mean, self.std))
        shift, factor = (torch.tensor(values, dtype=torch.float64) for values in (self.units.shift, self.units.factor))
        mean, std = (mean - shift) * factor, std * factor
        return float(mean.mean()), float((std.square().mean() + mean.var(correction=0)).sqrt())

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any latent, label or statistic; not with where the autoencoder lies."""
        parts: tuple[object, ...] = (self.scale, self.mean, self.std, self.class_names)
        parts += (tuple(shard.fingerprint for shard in self.shards),)
        if self.units is not None or self.prompts is not None:  # older folders keep the digits that runs know
            parts += (self.units, self.prompts and self.prompts.empty)
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of latents; raises DataError when it is missing, damaged, or of another version."""
    file = folder / MANIFEST_FILE
    if not file.is_file():
        begun = any(folder.glob("latents-*.safetensors"))
        advice = "its encoding was stopped, run the same fewstep encode again" if begun else "make it by fewstep encode"
        raise DataError(f"'{folder}' has no {MANIFEST_FILE}: {advice}")
    with reading(f"'{file}'", "run the same fewstep encode again to write it anew", DataError):
        stored = parse_json(file.read_bytes())
        version = stored["version"]
    if version != VERSION:
        raise DataError(f"'{file}' is of version {version}, not {VERSION}, which this program reads: encode anew")
    try:
        return from_json(Manifest, stored, str(file))
    except ConfigError as error:
        raise DataError(f"{error}: run the same fewstep encode again to write it anew") from error


def load_latents(root: str, with_labels: bool = True, with_prompts: bool = True) -> Dataset:
    """The latents of a folder, each channel brought to mean 0 and the manifest's standard deviation.

    In a pipeline's units instead where they were encoded for it, and with the prompts of their captions.

    Split as they were when encoded. Shards are mapped, not read: their content is checked when first used, their
    names, sizes and labels here. Raises DataError for a folder without manifest, and shards missing or damaged.
    """
    folder = source_path(root)
    if not root or not folder.is_dir():
        raise DataError(f"source 'latents' needs root, a folder that fewstep encode wrote: '{root}' is no folder")
    manifest = read_manifest(folder)
    shards = LatentShards(folder, manifest)
    labels = shards.labels()
    names, (labels,) = present_classes(str(folder), manifest.class_names, [labels])
    held = held_out(manifest.count, labels, manifest.settings.heldout, manifest.settings.seed)
    kept = labels if with_labels else None
    text = manifest.prompts.text if manifest.prompts is not None and with_prompts else None
    train, heldout = (
        LatentSamples(shards, rows, None if kept is None else kept[rows], text is not None)
        for rows in ((~held).nonzero()[:, 0], held.nonzero()[:, 0])
    )
    names = () if kept is None else names
    train.check_constant()
    name, advice = folder.resolve().name, "encode anew with --heldout"
    return Dataset(name, train, heldout, len(names), names, manifest.spec, split_by=advice, text=text)


@dataclass(frozen=True, eq=False)
class LatentSamples(SampleSet):
    """Some rows of the latents in a folder: rows (N,) and labels (N,) int64, or None; prompted: with prompts."""

    shards: "LatentShards"
    rows: Tensor
    labels: Tensor | None = None
    prompted: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shards.manifest.shape

    def fetch(self, indices: Tensor, mirror: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        indices = indices.cpu()
        latents = self.shards.read(self.rows[indices], None if mirror is None else mirror.cpu())
        labels = None if self.labels is None else self.labels[indices]
        return self.shards.manifest.spec.samples(latents), labels

    @property
    def constant(self) -> tuple[int, ...]:
        return self.shards.manifest.spec.constant

    def context(self, indices: Tensor) -> Context:
        """Prompts, and that a channel that never varies counts in no loss."""
        prompts = self.shards.prompts(self.rows[indices.cpu()]) if self.prompted else None
        if not self.constant:
            return Context(prompts=prompts)
        varies = torch.tensor([std > 0 for std in self.shards.manifest.std])
        sides = [1] * (len(self.shape) - 1)
        return Context(None, varies.reshape(-1, *sides).expand(len(indices), -1, *sides), prompts)

    def captions(self, indices: Tensor) -> list[str]:
        return self.shards.captions(self.rows[indices.cpu()]) if self.prompted else []

    def check_constant(self) -> None:
        """Raise DataError where the first samples vary in a channel that the manifest says never does."""
        manifest = self.shards.manifest
        if self.constant:
            channels = self.shards.read(self.rows[:_LOOKED_AT])[:, list(self.constant)].transpose(0, 1).flatten(1)
            low, high = channels.amin(1), channels.amax(1)
            moving = varies(low, high, getattr(torch, manifest.settings.dtype))
            for channel in (channel for channel, each in zip(self.constant, moving.tolist(), strict=True) if each):
                raise DataError(
                    f"'{self.shards.folder / MANIFEST_FILE}' is damaged: channel {channel} has a standard deviation of "
                    "0, but varies: run the same fewstep encode again to write it anew"
                )

    def moments(self) -> tuple[float, float]:
        """Of the training part, as measured when it was encoded."""
        return self.shards.manifest.moments()

    @property
    def has_mirrors(self) -> bool:
        return self.shards.manifest.settings.flip

    def update(self, digest: hashlib.blake2b) -> None:
        digest.update(self.shards.manifest.fingerprint.encode())
        digest.update(self.rows.numpy().data)
        if self.labels is not None:
            digest.update(self.labels.numpy().data)
        if self.shards.manifest.prompts is not None and not self.prompted:
            digest.update(b"without prompts")


class LatentShards:
    """The shards of a folder, mapped into memory as they are used."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        counts = torch.tensor([shard.count for shard in manifest.shards])
        self._ends = counts.cumsum(0)
        self._starts = self._ends - counts
        self._mapped: dict[int, dict[str, Tensor]] = {}
        self._null: Prompts | None = None
        if manifest.prompts is not None:
            self._null = read_empty(folder, manifest.prompts.text)
            if fingerprint(folder / EMPTY_FILE) != manifest.prompts.empty:
                raise DataError(f"'{folder / EMPTY_FILE}' is damaged: delete it and run the same fewstep encode again")
        for shard in manifest.shards:
            file = checked_place(folder / shard.file)
            size = file.stat().st_size if file.is_file() else None
            if size != shard.size:
                found = "is missing" if size is None else f"has {size} bytes instead of {shard.size}"
                raise DataError(f"'{file}' {found}: delete what is left of it and run the same fewstep encode again")

    def __getstate__(self) -> dict[str, object]:
        """A process that they are sent to maps the files itself."""
        return {**vars(self), "_mapped": {}}

    def labels(self) -> Tensor | None:
        """The class of every image, (count,) int64; None without classes. Raises DataError where they do not fit."""
        if not self.manifest.class_names:
            return None
        parts, classes = [], len(self.manifest.class_names)
        for shard in self.manifest.shards:
            file = self.folder / shard.file
            labels = map_shard(file).get("labels", torch.empty(0))
            if labels.dtype != torch.int64 or labels.shape != (shard.count,) or not _within(labels, classes):
                raise DataError(f"'{file}' has no labels of {shard.count} images in {classes} classes: encode anew")
            parts.append(labels.clone())
        return torch.cat(parts)

    def read(self, rows: Tensor, mirror: Tensor | None = None) -> Tensor:
        """Stored latents as float32 (n, c, h, w) of rows (n,) int64; mirror (n,) bool: of the mirrored image.

        Raises DataError when no mirrored images were encoded.
        """
        if mirror is not None and not self.manifest.settings.flip:
            raise DataError(f"'{self.folder}' holds no latents of mirrored images: encode with --flip")
        found = torch.empty(len(rows), *self.manifest.shape)
        flipped = [False] * len(rows) if mirror is None else mirror.tolist()
        for i, ((number, place), flip) in enumerate(zip(self._places(rows), flipped, strict=True)):
            found[i] = self._tensors(number)["mirrored" if flip else "latents"][place]
        return found

    def prompts(self, rows: Tensor) -> Prompts:
        """Stored prompts of rows (n,) int64 in float32, with the empty one."""
        places = [(self._tensors(number), place) for number, place in self._places(rows)]
        keys = [key for key in ("text", "text_mask", "pooled") if key in self._tensors(0)]
        return prompts_of({key: torch.stack([each[key][at] for each, at in places]) for key in keys}, self._null)

    def captions(self, rows: Tensor) -> list[str]:
        """What was said of the images of rows (n,) int64."""
        headers: dict[int, list[str]] = {}
        for number, _ in (places := self._places(rows)):
            if number not in headers:
                headers[number] = shard_captions(self.folder / self.manifest.shards[number].file)
        return [headers[number][place] for number, place in places]

    def _places(self, rows: Tensor) -> list[tuple[int, int]]:
        """Each row's shard and its number there."""
        numbers = torch.bucketize(rows, self._ends, right=True)
        return list(zip(numbers.tolist(), (rows - self._starts[numbers]).tolist(), strict=True))

    def _tensors(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard, its content checked when it is first used."""
        if number not in self._mapped:
            shard = self.manifest.shards[number]
            file = self.folder / shard.file
            tensors = map_shard(file)
            keys = ("latents", "mirrored") if self.manifest.settings.flip else ("latents",)
            shapes: dict[str, tuple[int, ...]] = dict.fromkeys(keys, self.manifest.shape)
            if self.manifest.prompts is not None and self._null is not None:
                shapes |= prompt_keys(self.manifest.prompts.text, self._null.mask is not None)
            fits = all(
                key in tensors and tuple(tensors[key].shape) == (shard.count, *shape) for key, shape in shapes.items()
            )
            if not fits or fingerprint(file) != shard.fingerprint:
                raise DataError(f"'{file}' is damaged: delete it and run the same fewstep encode again")
            for key in shapes:
                if not all(bool(part.isfinite().all()) for part in tensors[key].split(256)):
                    raise DataError(f"'{file}' has {key} that are not finite: delete it and run fewstep encode again")
            self._mapped[number] = tensors
        return self._mapped[number]


def _within(labels: Tensor, classes: int) -> bool:
    return not len(labels) or 0 <= int(labels.min()) <= int(labels.max()) < classes


def checked_place(file: Path) -> Path:
    """The file itself; raises DataError for a link, which may lead anywhere."""
    if file.is_symlink():
        raise DataError(f"'{file}' is a link: put the file itself there")
    return file


def map_shard(file: Path) -> dict[str, Tensor]:
    """The tensors of a shard, mapped from the file rather than read; raises DataError when it is damaged."""
    try:
        with safe_open(checked_place(file), framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise DataError(f"'{file}' is damaged ({error}): delete it and run the same fewstep encode again") from error


def shard_captions(file: Path) -> list[str]:
    """The captions in a shard's header; raises DataError where it has none that can be read."""
    with reading(f"'{file}'", "delete it and run the same fewstep encode again", DataError):
        with safe_open(checked_place(file), framework="pt") as handle:
            found = parse_json(handle.metadata()[HEADER].encode())["captions"]
        return [str(caption) for caption in found]


def fingerprint(file: Path) -> str:
    """Sixteen hex digits of a file's content."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
