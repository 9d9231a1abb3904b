"""Samples that a teacher drew, for training without data: a folder of shards and what they are (math.md section 4).

DIR/samples.json             the manifest: the teacher, how it was sampled, the shards; without it the set is not whole
DIR/samples-N.safetensors    `samples` (n, ...) float32, `labels` (n,) int64 where there are classes
DIR/prompts.safetensors      of a teacher of text, what its samples are of (fewstep.data.drawn_prompts)
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, final

import torch
from safetensors.torch import save
from torch import Tensor

from fewstep.data.base import Loaded, Samples, source_path
from fewstep.data.latents.autoencoders import LatentSpec
from fewstep.data.latents.shards import Shard, fingerprint, map_shard
from fewstep.teachers.text import TextSpec
from fewstep.utils.errors import ConfigError, DataError
from fewstep.utils.files import read_record, write_atomically
from fewstep.utils.serialization import from_json, later, later_value, to_json
from fewstep.utils.tensors import check_least, check_positive

MANIFEST_FILE = "samples.json"
FOLDER = "teacher-samples"
"""Where they lie in a run that has a set of its own."""
_ADVICE = "delete it, and train again to draw it anew"


@final
@dataclass(frozen=True)
class DrawSettings:
    """How a teacher is sampled for a set of its own."""

    count: int = 10_000
    """Samples in all, the held-out ones among them; at least 2."""
    steps: int = 18
    """Steps of the solver from noise to data."""
    solver: Literal["euler", "heun"] = "heun"
    """euler calls the teacher once a step, heun twice."""
    guidance_scale: float = 1.0
    """Guidance of the teacher; 1 is none."""
    shares: tuple[float, ...] = ()
    """Shares of the classes, one number for each; equal when not given."""
    prompts: str = later_value("")
    """What the samples of a teacher of text are of: FILE.txt, a prompt a line, or a folder that fewstep encode wrote,
    for its captions. In turn, in an order that data.seed draws; the teacher's own text encoders embed them."""

    def __post_init__(self) -> None:
        check_least(2, count=self.count)
        check_least(1, steps=self.steps)
        check_positive(guidance_scale=self.guidance_scale)
        if self.shares and not (min(self.shares) >= 0 and 0 < sum(self.shares) < float("inf")):
            raise ConfigError(f"shares of classes are {self.shares}: give numbers from 0 on, one of them above 0")


@final
@dataclass(frozen=True)
class GeneratedSet:
    """What a folder of drawn samples holds.

    teacher: its name; weights: its fingerprint. seed: of the noise and of drawn classes. latents: how samples become
    images, where they are latents. captions: of a teacher of text, sample k is of caption k mod their number; text:
    what embedded them; embedded: sixteen hex digits of their file.
    """

    teacher: str
    weights: str
    settings: DrawSettings
    seed: int
    shape: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    latents: LatentSpec | None = None
    shards: tuple[Shard, ...] = ()
    captions: tuple[str, ...] = later(tuple)
    text: TextSpec | None = later(lambda: None)
    embedded: str = later_value("")

    def differs(self, other: "GeneratedSet") -> list[str]:
        """The names of what decides the samples and is not the same."""
        own, others = (replace(each, settings=replace(each.settings, prompts="")) for each in (self, other))
        names = {"weights": "weights", "settings": "settings", "seed": "seed", "shape": "shape", "captions": "prompts"}
        return [said for name, said in names.items() if getattr(own, name) != getattr(others, name)]


def read_set(folder: Path) -> GeneratedSet | None:
    """What a folder holds; None where there is no whole set. Raises DataError for a damaged manifest."""
    file = folder / MANIFEST_FILE
    if not file.is_file():
        return None
    record = read_record(file, _ADVICE, DataError)
    try:
        found = from_json(GeneratedSet, record, str(file))
    except ConfigError as error:
        raise DataError(f"{error}: {_ADVICE}") from error
    strange = [shard.file for shard in found.shards if not re.fullmatch(r"samples-\d+\.safetensors", shard.file)]
    if strange:
        raise DataError(f"{file}: {strange[0]!r} is no name of a shard, such as samples-00000.safetensors: {_ADVICE}")
    return found


def write_set(folder: Path, made: GeneratedSet) -> None:
    """Write the manifest, after which the set is whole."""
    write_atomically(folder / MANIFEST_FILE, json.dumps(to_json(made), indent=2) + "\n")


def write_shard(file: Path, samples: Tensor, labels: Tensor | None, key: str) -> None:
    """Write a shard aside and rename it into place; key: what the samples are, which `holds` asks for."""
    tensors = {"samples": samples.float().contiguous()} | ({} if labels is None else {"labels": labels})
    write_atomically(file, save(tensors, metadata={"key": key}))


def shard_of(file: Path, count: int) -> Shard:
    """What a manifest says of a shard."""
    return Shard(file.name, count, file.stat().st_size, fingerprint(file))


def load_set(root: str) -> tuple[Loaded, LatentSpec | None]:
    """The samples of a folder, not split yet; raises DataError where there is no whole set, or it is damaged."""
    folder = source_path(root)
    found = read_set(folder) if root else None
    if found is None:
        raise DataError(
            f"'{root}' holds no whole set of a teacher's samples: fewstep train with --data.source teacher-samples and "
            "--teacher draws it, and goes on where it was stopped"
        )
    parts = [_read_shard(folder / shard.file, shard, found) for shard in found.shards]
    values = torch.cat([part["samples"] for part in parts])
    labels = torch.cat([part["labels"] for part in parts]) if found.class_names else None
    name = f"samples of {Path(found.teacher).name or found.teacher}"
    return Loaded(name, Samples(values, labels), None, found.class_names), found.latents


def _read_shard(file: Path, shard: Shard, made: GeneratedSet) -> dict[str, Tensor]:
    if not file.is_file() or fingerprint(file) != shard.fingerprint:
        raise DataError(f"'{file}' is missing or damaged: {_ADVICE}, with {MANIFEST_FILE}")
    tensors = map_shard(file)
    labels = tensors.get("labels", torch.zeros(0))
    fits = tuple(tensors["samples"].shape) == (shard.count, *made.shape)
    if not fits or (made.class_names and labels.shape != (shard.count,)):
        raise DataError(f"'{file}' does not hold {shard.count} samples of shape {made.shape}: {_ADVICE}")
    return {key: value.clone() for key, value in tensors.items()}
