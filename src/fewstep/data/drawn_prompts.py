"""Prompts that a teacher's own samples are of: listed in a file, or captions of encoded images; embedded once.

DIR/prompts.safetensors  `text` (n, L, D), `text_mask` and `pooled` of each prompt; the empty one's as `null_text`...
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.base import Context, Samples, SampleSet, source_path
from fewstep.data.latents.prompts import prompts_of, save_prompts
from fewstep.data.latents.shards import fingerprint, map_shard, read_manifest, shard_captions
from fewstep.networks.condition import Prompts
from fewstep.teachers.text import TextEncoders
from fewstep.utils.errors import DataError
from fewstep.utils.random import permutation
from fewstep.utils.tensors import check_memory

PROMPTS_FILE = "prompts.safetensors"
_AT_ONCE = 16
_ORDER = 0


def list_prompts(place: str, seed: int) -> tuple[str, ...]:
    """The lines of a text file, or the captions of a folder that `fewstep encode` wrote, in an order drawn by the seed.

    Raises DataError where there are none, or they cannot be read.
    """
    path = source_path(place)
    if path.is_dir():
        shards = read_manifest(path)
        if shards.prompts is None:
            raise DataError(f"'{place}' was encoded without captions: give a folder encoded with them, or FILE.txt")
        found = [caption for shard in shards.shards for caption in shard_captions(path / shard.file)]
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"prompts '{place}' cannot be read as UTF-8 ({error}): give FILE.txt, one a line"
            ) from error
        found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise DataError(f"'{place}' has no prompt: give one a line")
    return tuple(found[k] for k in permutation(seed, _ORDER, len(found)).tolist())


def embed(captions: Sequence[str], encoders: TextEncoders, folder: Path) -> str:
    """Write the embeddings of the prompts, each once, into a folder; sixteen hex digits of the file."""
    distinct = tuple(dict.fromkeys(captions))
    spec = encoders.spec
    size = 4 * len(distinct) * (spec.length * spec.width + spec.pooled)
    check_memory(size, f"{len(distinct):,} embedded prompts", "list fewer of them")
    found = [encoders.encode(distinct[i : i + _AT_ONCE]).to("cpu") for i in range(0, len(distinct), _AT_ONCE)]
    text, mask, pooled = (_joined([getattr(each, name) for each in found]) for name in ("text", "mask", "pooled"))
    assert text is not None
    save_prompts(Prompts(text, mask, pooled, found[0].null), folder / PROMPTS_FILE)
    return fingerprint(folder / PROMPTS_FILE)


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    kept = [each for each in parts if each is not None]
    return torch.cat(kept) if kept else None


class EmbeddedPrompts:
    """Prompts by the numbers of the samples that they are of, mapped from their file: sample k is of prompt k mod n.

    captions: n, in that order, any of them more than once. Raises DataError for a file that is missing or damaged.
    """

    def __init__(self, folder: Path, captions: Sequence[str], content: str = "") -> None:
        file = folder / PROMPTS_FILE
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        if not file.is_file() or (content and fingerprint(file) != content):
            raise DataError(f"'{file}' is missing or damaged: delete its folder, and train again to draw it anew")
        tensors = map_shard(file)
        self._own = {key: value for key, value in tensors.items() if not key.startswith("null_")}
        null = {key.removeprefix("null_"): value for key, value in tensors.items() if key.startswith("null_")}
        if any(len(value) != len(numbers) for value in self._own.values()) or "text" not in self._own:
            raise DataError(f"'{file}' is not of {len(numbers)} prompts: delete its folder, and train again")
        self._null = prompts_of(null) if null else None
        self.captions = tuple(captions)
        self._rows = torch.tensor([numbers[caption] for caption in captions])

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: Tensor) -> Prompts:
        rows = self._rows[index.cpu() % len(self)]
        return prompts_of({key: value[rows] for key, value in self._own.items()}, self._null)


@dataclass(frozen=True, eq=False)
class PromptedSamples(SampleSet):
    """Samples in memory with their prompts; numbers: (N,) int64, of the samples in the whole set."""

    samples: Samples
    numbers: Tensor
    prompts: EmbeddedPrompts

    @property
    def labels(self) -> Tensor | None:
        return self.samples.labels

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.samples.shape

    def fetch(self, indices: Tensor, mirror: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.samples.fetch(indices, mirror)

    def context(self, indices: Tensor) -> Context:
        return Context(prompts=self.prompts[self.numbers[indices.cpu()]])

    def captions(self, indices: Tensor) -> list[str]:
        numbers = self.numbers[indices.cpu()] % len(self.prompts)
        return [self.prompts.captions[number] for number in numbers.tolist()]

    def moments(self) -> tuple[float, float]:
        return self.samples.moments()

    @property
    def data_range(self) -> tuple[float, float] | None:
        return self.samples.data_range

    @property
    def constant(self) -> tuple[int, ...]:
        return self.samples.constant

    def update(self, digest: "hashlib.blake2b") -> None:
        self.samples.update(digest)
        digest.update(repr(self.prompts.captions).encode())
        digest.update(self.numbers.numpy().data)
