"""From a folder of images to latents in shards (fewstep.data.latents.shards): streamed, and resumable to the byte.

A shard is written whole or not at all, and knows the images it was made of; the manifest, written last, is measured on
the shards as they are stored. So a command that was stopped and repeated ends with the files of one that was not.
"""

import hashlib
import json
import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from fewstep.data.folder import Pixels, decode_or_reason, quiet_bombs, read_ahead, report_unreadable
from fewstep.data.labels import held_out
from fewstep.data.latents.autoencoder_kinds import Units
from fewstep.data.latents.autoencoders import Autoencoder, AutoencoderIdentity, load_autoencoder
from fewstep.data.latents.moments import ChannelMoments
from fewstep.data.latents.prompts import EMPTY_FILE, CaptionEncoder, PromptRecord
from fewstep.data.latents.shards import (
    HEADER,
    MANIFEST_FILE,
    VERSION,
    EncodingSettings,
    Manifest,
    Shard,
    fingerprint,
    map_shard,
    read_manifest,
)
from fewstep.data.latents.target import TeacherSettings
from fewstep.data.pictures import Pictures, find_pictures
from fewstep.data.rows import Columns
from fewstep.teachers.text import TextSpec, prompt_bytes
from fewstep.utils.errors import CheckpointError, ConfigError, DataError
from fewstep.utils.files import LOCK_FILE, Lock, guarded, parse_json, reading, write_atomically
from fewstep.utils.random import Draws
from fewstep.utils.serialization import differences, to_json
from fewstep.utils.tensors import check_memory
from fewstep.utils.text import listed

RECORD_FILE = "encoding.json"
_POSTERIOR_STREAM = 60
_PLAIN, _MIRRORED = 0, 1
_MEASURED_AT_ONCE = 256
_DTYPES = {"float16": torch.float16, "float32": torch.float32}

Failure = tuple[str, str]


@dataclass(frozen=True)
class EncodingWork:
    """How the work is done; decides no more than the last bits of the latents."""

    batch_size: int = 16
    """Images that pass the autoencoder at once."""
    skip_unreadable: bool = False
    """Warn about unreadable images instead of failing."""
    cpu: bool = False
    """Stay on the CPU even where a GPU is present."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batches of {self.batch_size} images: give at least 1")


ORDINARY, FOR_NOBODY, USUAL_COLUMNS = EncodingWork(), TeacherSettings(), Columns()


def encode_folder(
    images: Path,
    autoencoder: Path | None,
    out: Path,
    settings: EncodingSettings,
    scale: float = 1.0,
    work: EncodingWork = ORDINARY,
    target: TeacherSettings = FOR_NOBODY,
    columns: Columns = USUAL_COLUMNS,
) -> Manifest:
    """Encode images (fewstep.data.pictures) into `out`, or go on where it was stopped.

    scale: the standard deviation that the latents' channels are given when they are read; it may be changed by encoding
    again, which keeps the shards. target: the teacher that reads them in its own units instead, and embeds their
    captions. columns: of a Hugging Face dataset. Raises DataError for images and captions that cannot be found or read,
    CheckpointError for an autoencoder or text encoders that cannot be read, or for a folder that cannot be written or
    holds other latents.
    """
    if not 0 < scale < math.inf:
        raise ConfigError(f"the latents' standard deviation is {scale}; it must be positive and finite")
    if scale != 1.0 and target.teacher:
        raise ConfigError("a teacher reads latents in its own units: leave out --std")
    pictures = find_pictures(images, columns)
    device = torch.device("cuda" if torch.cuda.is_available() and not work.cpu else "cpu")
    captions = target.caption_encoder(pictures, _DTYPES[settings.dtype], device)
    model = load_autoencoder(target.autoencoder(autoencoder), device)
    _check_sizes(model, settings)
    if captions is not None:
        size = min(settings.shard_size, len(pictures)) * prompt_bytes(captions.encoders.spec, settings.bytes)
        check_memory(size, "a shard's prompts", "give a smaller --shard-size, or fewer --tokens")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file, not a folder: give another folder with --out")
    lock = Lock(out, f"{out} is being encoded into by another process: wait for it, or give another folder with --out")
    try:
        _check_folder(out, model.identity, settings, None if captions is None else captions.encoders.spec)
        if captions is not None and not (out / EMPTY_FILE).is_file():
            write_atomically(out / EMPTY_FILE, captions.empty_file())
        units = model.units if target.teacher else None
        encoder = Encoder(pictures, model, out, settings, work, captions, units)
        with quiet_bombs():
            fresh = encoder.write_shards()
        manifest = encoder.measure(scale, fresh)
        write_atomically(out / MANIFEST_FILE, json.dumps(to_json(manifest), indent=2) + "\n")
    finally:
        lock.discard()  # a folder of latents is data to hand on: it keeps no lock
    return manifest


def _check_sizes(model: Autoencoder, settings: EncodingSettings) -> None:
    if settings.image_size % model.factor:
        raise ConfigError(
            f"images of side {settings.image_size} do not divide by {model.factor}, as this autoencoder needs: choose "
            f"another --image-size, such as {max(1, settings.image_size // model.factor) * model.factor}"
        )
    if model.image_channels not in (1, 3):
        raise CheckpointError(f"the autoencoder takes images of {model.image_channels} channels, not of 1 or 3")


def _check_folder(
    out: Path, autoencoder: AutoencoderIdentity, settings: EncodingSettings, text: TextSpec | None
) -> None:
    """Start the folder, or raise CheckpointError showing every difference to what it holds already."""
    file = out / RECORD_FILE
    record: dict[str, Any] = {"version": VERSION, "autoencoder": to_json(autoencoder), "settings": to_json(settings)}
    record |= {} if text is None else {"text": to_json(text, terse=True)}
    if not file.is_file():
        if any(path.name != LOCK_FILE and not path.name.startswith(f".{RECORD_FILE}.") for path in out.iterdir()):
            raise CheckpointError(f"{out} is not empty and holds no latents: give another folder with --out")
        write_atomically(file, json.dumps(record, indent=2) + "\n")
    with reading(file, "delete its folder and encode anew"):
        records = (parse_json(file.read_bytes()), record)
        # where the encoders lie may change between starts
        models = ["autoencoder", *(["text"] if all("text" in each for each in records) else [])]
        old, new = (each | {key: {**each[key], "path": ""} for key in models} for each in records)
    if lines := differences(old, new):
        raise CheckpointError(
            f"{out} holds latents that were encoded otherwise ({'; '.join(lines[:8])}): repeat the command that began "
            "them, or give another folder with --out"
        )
    for pattern in (f".{RECORD_FILE}.*", f".{MANIFEST_FILE}.*", ".latents-*", f".{EMPTY_FILE}.*"):
        for leftover in out.glob(pattern):
            with guarded(leftover):
                leftover.unlink()


@dataclass(frozen=True)
class Encoder:
    """The work on one folder of latents."""

    pictures: Pictures
    model: Autoencoder
    out: Path
    settings: EncodingSettings
    work: EncodingWork
    captions: CaptionEncoder | None = None
    units: Units | None = None

    @cached_property
    def _labels(self) -> tuple[int, ...] | None:
        return self.pictures.labels

    def write_shards(self) -> set[str]:
        """Write the shards that are missing; the names of those written. Raises as `encode_folder` does."""
        fresh: set[str] = set()
        failures: list[Failure] = []
        count, size = len(self.pictures), self.settings.shard_size
        with self._bar(count, "encoding") as bar:
            for number, start in enumerate(range(0, count, size)):
                positions = range(start, min(start + size, count))
                file = self.out / f"latents-{number:05d}.safetensors"
                if file.is_file():
                    failures += self._check_shard(file, positions)
                    bar.update(len(positions))
                    continue
                content, unreadable = self._encode_shard(positions, bar)
                write_atomically(file, content)
                failures += unreadable
                fresh.add(file.name)
        surplus = sorted(self.out.glob("latents-*.safetensors"))[-(-count // size) :]
        if surplus:
            raise CheckpointError(f"{surplus[0]} is of images that are gone: give another folder with --out")
        if failures:
            report_unreadable(failures, self.pictures.place, count, skip=True)
        return fresh

    def measure(self, scale: float, fresh: set[str]) -> Manifest:
        """What the shards hold, by one pass over them; those not `fresh` must be as an earlier manifest says."""
        files = sorted(self.out.glob("latents-*.safetensors"))
        kept = [map_shard(file) for file in files]
        counts = [len(tensors["indices"]) for tensors in kept]
        labels = torch.cat([tensors["labels"] for tensors in kept]) if self.pictures.class_names else None
        if sum(counts) == 0:
            raise DataError(f"none of the {len(self.pictures)} images in '{self.pictures.place}' could be read")
        training = ~held_out(sum(counts), labels, self.settings.heldout, self.settings.seed)
        earlier: dict[str, Shard] = {}
        with suppress(DataError):  # there may be no manifest yet
            earlier = {shard.file: shard for shard in read_manifest(self.out).shards}
        moments, shards = ChannelMoments(), []
        with self._bar(sum(counts), "measuring") as bar:
            for file, tensors, rows in zip(files, kept, training.split(counts), strict=True):
                for part, chosen in zip(*(x.split(_MEASURED_AT_ONCE) for x in (tensors["latents"], rows)), strict=True):
                    moments.add(part[chosen])
                    bar.update(len(part))
                shards.append(Shard(file.name, len(rows), file.stat().st_size, fingerprint(file)))
                if file.name not in fresh and earlier.get(file.name, shards[-1]) != shards[-1]:
                    raise DataError(f"'{file}' is damaged: delete it and run the same command again")
        mean, std = moments.result()
        weights = torch.tensor(counts, dtype=torch.float64)[:, None] / sum(counts)
        variance = (torch.stack([tensors["posterior_variance"] for tensors in kept]) * weights).sum(0)
        side, (_, *shape) = self.settings.image_size, kept[0]["latents"].shape
        return Manifest(
            version=VERSION,
            autoencoder=self.model.identity,
            settings=self.settings,
            scale=scale,
            shape=tuple(shape),
            image_shape=(self.model.image_channels, side, side),
            count=sum(counts),
            class_names=self.pictures.class_names,
            mean=mean,
            std=std,
            posterior_std=tuple(variance.sqrt().tolist()),
            shards=tuple(shards),
            units=self.units,
            prompts=self._prompt_record(),
        )

    def _prompt_record(self) -> PromptRecord | None:
        if self.captions is None:
            return None
        return PromptRecord(self.captions.encoders.spec, fingerprint(self.out / EMPTY_FILE))

    def _check_shard(self, file: Path, positions: range) -> list[Failure]:
        """Raise CheckpointError unless a shard is of these images; the unreadable ones among them."""
        try:
            with safe_open(file, framework="pt") as handle:
                header = parse_json(handle.metadata()[HEADER])
            made_of, failures = header["images"], header["failures"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged ({error}): delete it and run the same command again") from error
        name = self.pictures.name
        if made_of != self._content(positions):
            raise CheckpointError(
                f"{file} is of other images than {name(positions[0])} to {name(positions[-1])} are now: "
                "bring the images back as they were, or give another folder with --out"
            )
        return [(str(image), str(why)) for image, why in failures]

    def _content(self, positions: range) -> str:
        """Sixteen hex digits of the images' names, sizes in bytes, classes and captions; other pixels in as many bytes
        pass."""
        digest, pictures = hashlib.blake2b(digest_size=8), self.pictures
        for position in positions:
            label = None if self._labels is None else self._labels[position]
            digest.update(f"{pictures.name(position)}\0{pictures.size(position)}\0{label}\0".encode())
            if self.captions is not None:
                digest.update(f"{self.captions.captions[position]}\0".encode())
        return digest.hexdigest()

    def _encode_shard(self, positions: range, bar: "tqdm[Any]") -> tuple[bytes, list[Failure]]:
        """The shard of these images, and the unreadable ones; raises DataError for them unless they may be skipped."""
        images, skip = self._content(positions), self.work.skip_unreadable
        parts: list[dict[str, Tensor]] = []
        failures: list[Failure] = []
        batches = [positions[i : i + self.work.batch_size] for i in range(0, len(positions), self.work.batch_size)]
        for batch, found in zip(batches, read_ahead(self._read, batches), strict=True):
            failures += [
                (self.pictures.name(i), why) for i, why in zip(batch, found, strict=True) if isinstance(why, str)
            ]
            kept = [(i, pixels) for i, pixels in zip(batch, found, strict=True) if isinstance(pixels, Tensor)]
            if kept and (skip or not failures):
                parts.append(self._encode([i for i, _ in kept], torch.stack([pixels for _, pixels in kept])))
            bar.update(len(batch))
        if failures and not skip:
            report_unreadable(failures, self.pictures.place, len(self.pictures), skip=False)
        header, tensors = {"images": images, "failures": failures}, self._joined(parts)
        if self.captions is not None:
            header["captions"] = [self.captions.captions[number] for number in tensors["indices"].tolist()]
        return safetensors.torch.save(tensors, {HEADER: json.dumps(header)}), failures

    def _read(self, position: int) -> Tensor | str:
        pixels = self.pictures.read(position, self.settings.image_size)
        return pixels if isinstance(pixels, str) else _in_channels(pixels, self.model.image_channels)

    def _joined(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Batches as one shard, perhaps of no image at all; the posterior's variance is averaged over images."""
        if not parts:
            side = self.settings.image_size
            blank = self._encode([0], torch.zeros(1, self.model.image_channels, side, side, dtype=torch.uint8))
            parts = [{key: value[:0] for key, value in blank.items()}]
        tensors = {key: torch.cat([part[key] for part in parts]).contiguous() for key in parts[0]}
        if self._labels is not None:
            tensors["labels"] = torch.tensor(self._labels)[tensors["indices"]]
        count = max(len(tensors["indices"]), 1)
        tensors["posterior_variance"] = tensors["posterior_variance"].sum(0) / count
        return tensors

    def _encode(self, numbers: list[int], pixels: Tensor) -> dict[str, Tensor]:
        """What is stored of images (n, C, H, W), uint8, with these numbers in the listing."""
        indices = torch.tensor(numbers)
        images = pixels.to(self.model.device).float() / 127.5 - 1.0
        mean, std = self.model.encode(images)
        stored = {"indices": indices, "latents": self._drawn(mean, std, indices, _PLAIN)}
        stored["posterior_variance"] = std.double().square().mean(tuple(range(2, std.ndim))).cpu()
        if self.settings.flip:
            stored["mirrored"] = self._drawn(*self.model.encode(images.flip(-1)), indices, _MIRRORED)
        return stored if self.captions is None else stored | self.captions.tensors(numbers)

    def _drawn(self, mean: Tensor, std: Tensor, indices: Tensor, side: int) -> Tensor:
        """The posterior's mean, or one draw from it, as stored; the draw is a function of seed, image and side."""
        latents = mean
        if self.settings.posterior == "sample":
            draws = Draws(self.settings.seed, side, indices)
            latents = mean + std * draws.normal(_POSTERIOR_STREAM, tuple(mean.shape[1:])).to(mean)
        stored = latents.to(_DTYPES[self.settings.dtype]).cpu()
        wrong = (~stored.isfinite()).flatten(1).any(1)
        if bool(wrong.any()):
            name = self.pictures.name(int(indices[wrong][0]))
            raise DataError(f"the latents of '{name}' are not finite as {self.settings.dtype}: try --dtype float32")
        return stored

    def _bar(self, count: int, what: str) -> "tqdm[Any]":
        return tqdm(total=count, desc=what, unit=" images", disable=self.work.quiet, file=sys.stderr)


def summary(manifest: Manifest) -> str:
    """What a folder of latents holds, in one line."""
    heldout = int(held_out(manifest.count, None, manifest.settings.heldout, 0).sum())
    megabytes = sum(shard.size for shard in manifest.shards) / 1e6
    share = max(a / b for a, b in zip(manifest.posterior_std, manifest.std, strict=True) if b)
    spread = f"; the posterior's standard deviation is at most {100 * share:.3g} % of a channel's" if share else ""
    constant = manifest.spec.constant
    never = f"; channel {listed([str(i) for i in constant])} never varies" if constant else ""
    text = None if manifest.prompts is None else manifest.prompts.text
    prompts = "" if text is None else f" and prompts of {text.length} x {text.width}"
    return (
        f"{manifest.count:,} images ({heldout:,} held out{', mirrored too' if manifest.settings.flip else ''}) in "
        f"{len(manifest.shards)} shards of {'x'.join(map(str, manifest.shape))} latents{prompts}, {megabytes:,.1f} MB"
        f"{spread}{never}"
    )


def read_image(file: Path, image_size: int, channels: int) -> Tensor | str:
    """Pixels (channels, image_size, image_size), uint8, of an image file, grey or in colour; or why there are none."""
    pixels = decode_or_reason(file, image_size)
    return pixels if isinstance(pixels, str) else _in_channels(pixels, channels)


def _in_channels(pixels: Pixels, channels: int) -> Tensor:
    """Pixels (H, W) or (H, W, 3), uint8, in one channel or three, (channels, H, W)."""
    converted = np.array(Image.fromarray(pixels).convert("RGB" if channels == 3 else "L"))
    return torch.from_numpy(converted).reshape(*converted.shape[:2], channels).permute(2, 0, 1).contiguous()
