"""Embedded prompts beside latents: made while images are encoded, and read from the same shards.

DIR/empty-prompt.safetensors  the empty prompt's `text` (1, L, D), `text_mask` (1, L), `pooled` (1, P)
DIR/latents-N.safetensors     `text` (n, L, D), and `text_mask` and `pooled` where the encoders give any
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fewstep.networks.condition import Prompts
from fewstep.teachers.text import TextEncoders, TextSpec
from fewstep.utils.errors import CheckpointError, DataError
from fewstep.utils.weights import read_weights

EMPTY_FILE = "empty-prompt.safetensors"
_KEYS = {"text": "text", "text_mask": "mask", "pooled": "pooled"}
_CAPTIONS = "captions"


@dataclass(frozen=True)
class PromptRecord:
    """What a folder of latents says of its prompts: which encoders made them, and sixteen hex digits of the empty one's
    file."""

    text: TextSpec
    empty: str


def tensors_of(prompts: Prompts, dtype: torch.dtype) -> dict[str, Tensor]:
    """Prompts as they are stored, on the CPU: numbers in `dtype`, masks as they are."""
    found = {key: getattr(prompts, name) for key, name in _KEYS.items()}
    return {
        key: (value if value.dtype == torch.bool else value.to(dtype)).cpu().contiguous()
        for key, value in found.items()
        if value is not None
    }


def prompts_of(tensors: Mapping[str, Tensor], null: Prompts | None = None) -> Prompts:
    """Stored prompts in float32; null: the empty one's."""
    mask, pooled = tensors.get("text_mask"), tensors.get("pooled")
    return Prompts(tensors["text"].float(), mask, None if pooled is None else pooled.float(), null)


def prompt_keys(spec: TextSpec, masked: bool) -> dict[str, tuple[int, ...]]:
    """The stored tensors of one prompt and their shapes."""
    shapes: dict[str, tuple[int, ...]] = {"text": (spec.length, spec.width)}
    shapes |= {"text_mask": (spec.length,)} if masked else {}
    return shapes | ({"pooled": (spec.pooled,)} if spec.pooled else {})


@dataclass(frozen=True)
class CaptionEncoder:
    """Captions of the images of a listing, by their numbers, and what embeds them."""

    encoders: TextEncoders
    captions: Sequence[str]
    dtype: torch.dtype

    def tensors(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """What is stored of the captions of these images; raises DataError for embeddings that are not finite."""
        found = tensors_of(self.encoders.encode([self.captions[number] for number in numbers]), self.dtype)
        for value in found.values():
            wrong = (~value.isfinite()).flatten(1).any(1)
            if bool(wrong.any()):
                caption = self.captions[numbers[int(wrong.nonzero()[0])]]
                raise DataError(
                    f"the embedding of '{caption[:60]}' is not finite as {str(self.dtype).removeprefix('torch.')}: try "
                    "--dtype float32"
                )
        return found

    def empty_file(self) -> bytes:
        """The content of the empty prompt's file."""
        return safetensors.torch.save(tensors_of(self.encoders.null, self.dtype))

    def header(self, numbers: Sequence[int]) -> dict[str, str]:
        """The captions, for the header of a shard."""
        return {_CAPTIONS: json.dumps([self.captions[number] for number in numbers])}


def captions_of(metadata: Mapping[str, str]) -> list[str]:
    """The captions in a shard's header; none where it has none."""
    found = json.loads(metadata.get(_CAPTIONS, "[]"))
    return [str(caption) for caption in found]


def read_empty(folder: Path, spec: TextSpec) -> Prompts:
    """The empty prompt's embeddings; raises DataError where they are missing, damaged or of another shape."""
    file = folder / EMPTY_FILE
    try:
        tensors = read_weights(file)
    except CheckpointError as error:
        raise DataError(f"{error}: run the same fewstep encode again") from error
    shapes = {key: (1, *shape) for key, shape in prompt_keys(spec, "text_mask" in tensors).items()}
    if {key: tuple(value.shape) for key, value in tensors.items()} != shapes:
        raise DataError(f"'{file}' is damaged: delete it and run the same fewstep encode again")
    return prompts_of(tensors)
