"""Embedded prompts beside latents: made while images are encoded, and read from the same shards.

DIR/empty-prompt.safetensors  the empty prompt's `text` (1, L, D), `text_mask` (1, L), `pooled` (1, P)
DIR/latents-N.safetensors     `text` (n, L, D), and `text_mask` and `pooled` where the encoders give any
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fewstep.networks.condition import Prompts
from fewstep.teachers.text import TextEncoders, TextSpec, load_text_encoders
from fewstep.utils.errors import CheckpointError, ConfigError, DataError
from fewstep.utils.weights import check_finite, read_weights, save_weights

EMPTY_FILE = "empty-prompt.safetensors"
_KEYS = {"text": "text", "text_mask": "mask", "pooled": "pooled"}
_MOST = 6e4  # of half precision


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


def encode_prompts(spec: TextSpec, prompts: Sequence[str], place: Path | None, device: torch.device) -> Prompts:
    """Embed prompts by the encoders of `spec`; raises what `find_encoders` raises."""
    return find_encoders(spec, place, device).encode(prompts)


def find_encoders(spec: TextSpec, place: Path | None, device: torch.device) -> TextEncoders:
    """The encoders of `spec`, in the pipeline at `place`, or where they lay.

    Raises CheckpointError where they are missing, damaged or others.
    """
    folder = Path(spec.path) if place is None else place
    try:
        encoders = load_text_encoders(folder, device, spec.tokens, bool(spec.instruction))
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(
            f"the text encoders of this model cannot be read: {error}; give where their pipeline lies now with "
            "--text-encoders, or embedded prompts with --prompts"
        ) from error
    if not encoders.spec.same_as(spec):
        raise CheckpointError(
            f"{folder} holds other text encoders than the prompts were embedded by: give those with --text-encoders"
        )
    return encoders


def save_prompts(prompts: Prompts, file: Path) -> None:
    """Write prompts, and the empty one's under names with `null_`; in half precision where that holds them."""
    tensors = tensors_of(prompts, torch.float32)
    if prompts.null is not None:
        tensors |= {f"null_{key}": value for key, value in tensors_of(prompts.null, torch.float32).items()}
    half = all(float(value.abs().max()) < _MOST for value in tensors.values() if value.dtype != torch.bool)
    stored = {key: value.half() if half and value.is_floating_point() else value for key, value in tensors.items()}
    save_weights(stored, file)


def read_prompts(file: Path) -> Prompts:
    """What `save_prompts` wrote, in float32; raises CheckpointError where it is missing, damaged or no such file."""
    tensors = read_weights(file)
    check_finite({key: value for key, value in tensors.items() if value.is_floating_point()}, str(file))
    own = {key: value for key, value in tensors.items() if not key.startswith("null_")}
    null = {key.removeprefix("null_"): value for key, value in tensors.items() if key.startswith("null_")}
    text = own.get("text", torch.empty(0))
    sound = text.ndim == 3 and len(text) > 0 and own.keys() <= _KEYS.keys()
    sound = sound and all(len(value) == len(text) for value in own.values())
    if not sound or (null and (null.keys() != own.keys() or any(len(value) != 1 for value in null.values()))):
        raise CheckpointError(
            f"{file} holds no embedded prompts: text (n, L, D), text_mask (n, L) and pooled (n, P) if there are any, "
            "and the empty one's as null_text and so on"
        )
    return prompts_of(own, prompts_of(null) if null else None)


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
