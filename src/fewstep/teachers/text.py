"""Text encoders of a pipeline of diffusers: prompts become the embeddings that its network was trained with.

Each pipeline has its own way: which encoders, which of their layers, padded how far, masked or not; the table
`PIPELINES` has them. Everything is read from local folders, weights from safetensors alone; no code of theirs is run.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import pad

from fewstep.networks.condition import Prompts
from fewstep.utils.errors import CheckpointError, ConfigError, MissingExtraError
from fewstep.utils.extras import installing
from fewstep.utils.files import read_record
from fewstep.utils.serialization import later_value
from fewstep.utils.weights import digest_of_settings, digest_of_tensors

INDEX_FILE = "model_index.json"
_ADVICE = "bring back a copy of it"
_MODELS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "UMT5EncoderModel", "Gemma2Model")
_TOKENIZERS = ("CLIPTokenizer", "T5Tokenizer", "GemmaTokenizer")
_UNREADABLE = (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)

Index = dict[str, Any]


@dataclass(frozen=True)
class EncoderIdentity:
    """Which text encoder: its folder in the pipeline, its class, and sixteen hex digits each of its configuration, its
    weights and its tokenizer's vocabulary."""

    name: str
    kind: str
    config: str
    weights: str
    vocabulary: str


@dataclass(frozen=True)
class TextSpec:
    """Which text encoders made embeddings, and of which shape these are.

    pipeline: its class. tokens: the longest prompt, in tokens; 0 for the pipeline's own. length, width: of the
    embeddings of tokens; pooled: the width of a prompt's one, 0 for none. path: where the pipeline lay, a hint.
    instruction: sixteen hex digits of what the pipeline puts before each prompt; empty where that is nothing.
    """

    pipeline: str
    encoders: tuple[EncoderIdentity, ...]
    tokens: int
    length: int
    width: int
    pooled: int
    path: str
    instruction: str = later_value("")

    def same_as(self, other: "TextSpec") -> bool:
        """Whether both are made by the same encoders in the same way, wherever these lie."""
        return self == replace(other, path=self.path)

    @property
    def widths(self) -> tuple[int, int]:
        """Of the embeddings of tokens and of a whole prompt, as `Network.prompt_widths`."""
        return self.width, self.pooled


class Encoder:
    """A text encoder with its tokenizer."""

    def __init__(self, name: str, model: Any, tokenizer: Any, identity: EncoderIdentity) -> None:
        self.name, self.model, self.tokenizer, self.identity = name, model, tokenizer, identity

    @property
    def device(self) -> torch.device:
        found: torch.device = self.model.device
        return found

    def tokens(self, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Token ids and which of them are of the prompt, (B, length) each; longer prompts are cut."""
        found = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return found.input_ids.to(self.device), found.attention_mask.to(self.device)

    def longest(self, most: int) -> int:
        """The longest prompt: what the tokenizer says, `most` at most."""
        return min(int(self.tokenizer.model_max_length), most)


@dataclass(frozen=True)
class Parts:
    """What a way of encoding may use: the encoders by their folders, the longest prompt of long ones, and the index.

    text_width: of the network, for encoders that a pipeline may lack. instruction: what is put before a prompt.
    """

    encoders: dict[str, Encoder]
    index: Index
    tokens: int
    text_width: int
    instruction: str = ""

    def __getitem__(self, name: str) -> Encoder:
        return self.encoders[name]


def _clip_last(parts: Parts, prompts: Sequence[str]) -> Prompts:
    """Stable Diffusion 1 and 2: the last hidden state of one CLIP."""
    encoder = parts["text_encoder"]
    ids, mask = encoder.tokens(prompts, encoder.longest(parts.tokens))
    masked = mask if getattr(encoder.model.config, "use_attention_mask", False) else None
    return Prompts(encoder.model(ids, attention_mask=masked)[0])


def _clip_penultimate(encoder: Encoder, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """The hidden state before the last, (B, L, D), and the first output: the projected embedding, (B, P)."""
    found = encoder.model(encoder.tokens(prompts, length)[0], output_hidden_states=True)
    return found.hidden_states[-2], found[0]


def _two_clips(parts: Parts, prompts: Sequence[str]) -> Prompts:
    """SDXL: the penultimate states of its CLIPs side by side, and the pooled embedding of the last one."""
    names = [name for name in ("text_encoder", "text_encoder_2") if name in parts.encoders]
    found = [_clip_penultimate(parts[name], prompts, parts[name].longest(parts.tokens)) for name in names]
    return Prompts(torch.cat([hidden for hidden, _ in found], dim=-1), pooled=found[-1][1])


def _clips_and_t5(parts: Parts, prompts: Sequence[str]) -> Prompts:
    """Stable Diffusion 3: two CLIPs side by side, padded to T5's width, with T5's tokens after them; both pooled."""
    length = parts["text_encoder"].longest(77)
    found = [_clip_penultimate(parts[name], prompts, length) for name in ("text_encoder", "text_encoder_2")]
    clips, pooled = (torch.cat(each, dim=-1) for each in zip(*found, strict=True))
    if "text_encoder_3" in parts.encoders:
        encoder = parts["text_encoder_3"]
        t5: Tensor = encoder.model(encoder.tokens(prompts, parts.tokens)[0])[0]
    else:
        t5 = clips.new_zeros(len(prompts), parts.tokens, parts.text_width)
    return Prompts(torch.cat([pad(clips, (0, t5.shape[-1] - clips.shape[-1])), t5], dim=1), pooled=pooled)


def _t5_and_pooled_clip(parts: Parts, prompts: Sequence[str]) -> Prompts:
    """Flux: T5's last state without a mask, and CLIP's pooled embedding."""
    clip, t5 = parts["text_encoder"], parts["text_encoder_2"]
    pooled = clip.model(clip.tokens(prompts, clip.longest(77))[0]).pooler_output
    return Prompts(t5.model(t5.tokens(prompts, parts.tokens)[0])[0], pooled=pooled)


def _masked(parts: Parts, prompts: Sequence[str]) -> Prompts:
    """PixArt and Sana: the last state of T5 or Gemma with its mask, prompts in lower case.

    Behind an instruction of n tokens, n + L - 2 are embedded; the first and the last L - 1 are kept.
    """
    encoder, length = parts["text_encoder"], parts.tokens
    encoder.tokenizer.padding_side = "right"
    before = parts.instruction
    most = length + len(encoder.tokenizer.encode(before)) - 2 if before else length
    ids, mask = encoder.tokens([before + prompt.lower().strip() for prompt in prompts], most)
    kept = [0, *range(most - length + 1, most)]
    return Prompts(encoder.model(ids, attention_mask=mask)[0][:, kept], mask[:, kept].bool())


def _zero_padded(parts: Parts, prompts: Sequence[str]) -> Prompts:
    """Wan: UMT5's last state, zero where there is no token of the prompt; white space brought together."""
    encoder = parts["text_encoder"]
    ids, mask = encoder.tokens([" ".join(prompt.split()) for prompt in prompts], parts.tokens)
    return Prompts(encoder.model(ids, attention_mask=mask)[0] * mask[:, :, None])


@dataclass(frozen=True)
class Way:
    """How a pipeline's prompts are encoded. encoders: folders that it has; optional: folders that it may lack.

    tokens: the longest prompt of its longest encoder.
    """

    encode: Callable[[Parts, Sequence[str]], Prompts]
    encoders: tuple[str, ...]
    tokens: int
    optional: tuple[str, ...] = ()


PIPELINES: dict[str, Way] = {
    "StableDiffusionPipeline": Way(_clip_last, ("text_encoder",), 77),
    "StableDiffusionXLPipeline": Way(_two_clips, ("text_encoder_2",), 77, optional=("text_encoder",)),
    "StableDiffusion3Pipeline": Way(_clips_and_t5, ("text_encoder", "text_encoder_2"), 256, ("text_encoder_3",)),
    "FluxPipeline": Way(_t5_and_pooled_clip, ("text_encoder", "text_encoder_2"), 512),
    "PixArtAlphaPipeline": Way(_masked, ("text_encoder",), 120),
    "PixArtSigmaPipeline": Way(_masked, ("text_encoder",), 300),
    "SanaPipeline": Way(_masked, ("text_encoder",), 300),
    "WanPipeline": Way(_zero_padded, ("text_encoder",), 512),
}
"""By the class that a pipeline's model_index.json names."""


def instruction_of(pipeline: str) -> str:
    """What a pipeline puts before each prompt: its call's own default for `complex_human_instruction`; "" for none."""
    try:
        import diffusers

        call = getattr(diffusers, pipeline).__call__
    except (ImportError, RuntimeError, AttributeError) as error:
        raise MissingExtraError(f"a {pipeline} needs diffusers: pip install 'fewstep[diffusers]' ({error})") from error
    lines = inspect.signature(call).parameters.get("complex_human_instruction")
    return "" if lines is None else "\n".join(lines.default or ())


class TextEncoders:
    """The text encoders of a pipeline, in float32 on a device."""

    def __init__(self, way: Way, parts: Parts, pipeline: str, tokens: int, path: str) -> None:
        self._way, self._parts = way, parts
        identities = tuple(encoder.identity for encoder in parts.encoders.values())
        _, length, width = self.null.text.shape
        pooled = 0 if self.null.pooled is None else self.null.pooled.shape[1]
        instruction = digest_of_settings({"instruction": parts.instruction}) if parts.instruction else ""
        self.spec = TextSpec(pipeline, identities, tokens, length, width, pooled, path, instruction)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Prompts:
        """Embeddings of the prompts, with those of the empty one for guidance; on the encoders' device."""
        return replace(self._way.encode(self._parts, prompts), null=self.null)

    @cached_property
    def null(self) -> Prompts:
        """The empty prompt's, of one row, without an instruction; zeros where the pipeline says so."""
        with torch.no_grad():
            found = self._way.encode(replace(self._parts, instruction=""), [""])
        if self._way.encode is _two_clips and self._parts.index.get("force_zeros_for_empty_prompt", True):
            assert found.pooled is not None
            return Prompts(torch.zeros_like(found.text), pooled=torch.zeros_like(found.pooled))
        return found


def has_text_encoders(folder: Path) -> bool:
    """Whether a folder holds a pipeline with a text encoder."""
    file = folder / INDEX_FILE
    index = read_record(file, _ADVICE) if file.is_file() else {}
    return any(name.startswith("text_encoder") and _is_there(entry) for name, entry in index.items())


def _is_there(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)


def load_text_encoders(folder: Path, device: torch.device, tokens: int = 0, instructed: bool = True) -> TextEncoders:
    """The text encoders of a pipeline's folder; nothing is downloaded or unpickled.

    tokens: the longest prompt, 0 for the pipeline's own. instructed: whether a prompt follows the instruction that its
    pipeline puts before it, as Sana's does; older embeddings have none. Raises CheckpointError where the folder is no
    pipeline, or what it names is missing, damaged or of another class than is known; ConfigError for pipelines whose
    way of encoding is not known, and for prompts of less than one token or more than the encoders take;
    MissingExtraError without transformers.
    """
    file = folder / INDEX_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {INDEX_FILE}: give the folder of a pipeline, whose text encoders it has"
        )
    index = read_record(file, _ADVICE)
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        raise ConfigError(f"{file}: how a {pipeline} encodes prompts is not known; known are {', '.join(PIPELINES)}")
    way = PIPELINES[pipeline]
    if not 0 <= tokens <= way.tokens:
        raise ConfigError(f"prompts of {tokens} tokens: a {pipeline} takes from 1 to {way.tokens}; 0 takes the most")
    names = sorted([*way.encoders, *(name for name in way.optional if _is_there(index.get(name)))])
    encoders = {name: _load_encoder(folder, name, index, device) for name in names}
    instruction = instruction_of(pipeline) if instructed and way.encode is _masked else ""
    parts = Parts(encoders, index, tokens or way.tokens, _text_width(folder), instruction)
    return TextEncoders(way, parts, pipeline, tokens, str(folder.resolve()))


def _text_width(folder: Path) -> int:
    file = folder / "transformer" / "config.json"
    return int(read_record(file, _ADVICE).get("joint_attention_dim", 0)) if file.is_file() else 0


def _load_encoder(folder: Path, name: str, index: Index, device: torch.device) -> Encoder:
    tokenizer_name = name.replace("text_encoder", "tokenizer")
    kinds = []
    for part, known in ((name, _MODELS), (tokenizer_name, _TOKENIZERS)):
        entry = index.get(part)
        kind = str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else ""
        if kind.removesuffix("Fast") not in known:
            raise CheckpointError(
                f"{folder / INDEX_FILE} names no {part} that is known but {entry}: known are {', '.join(known)}"
            )
        kinds.append(kind)
    settings = read_record(folder / name / "config.json", _ADVICE)
    try:
        import transformers

        classes = [getattr(transformers, kind, getattr(transformers, kind.removesuffix("Fast"))) for kind in kinds]
    except (ImportError, AttributeError) as error:
        raise MissingExtraError(f"text encoders need transformers: {installing('diffusers')} ({error})") from error
    bars: Any = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model, info = classes[0].from_pretrained(
            folder / name, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = classes[1].from_pretrained(folder / tokenizer_name, local_files_only=True)
    except _UNREADABLE as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError(
            f"{folder / name} and {tokenizer_name} hold no {kinds[0]} with its tokenizer that can be read from "
            f"safetensors: {reason}"
        ) from error
    finally:
        if shown:
            bars.enable_progress_bar()
    if info["missing_keys"]:
        raise CheckpointError(
            f"{folder / name} lacks {len(info['missing_keys'])} of its weights, such as {min(info['missing_keys'])}"
        )
    weights = digest_of_tensors(model.state_dict())
    vocabulary = digest_of_settings({"vocabulary": tokenizer.get_vocab()})
    identity = EncoderIdentity(name, kinds[0], digest_of_settings(settings), weights, vocabulary)
    return Encoder(name, model.to(device).eval().requires_grad_(False), tokenizer, identity)


def check_prompt_widths(spec: TextSpec, widths: tuple[int, int], network: str) -> None:
    """Raise ConfigError, with both shapes, where embeddings do not fit a network that takes those of such widths."""
    if spec.widths != widths:
        own, theirs = (f"{text} wide and {pooled or 'no'} pooled" for text, pooled in (spec.widths, widths))
        raise ConfigError(
            f"the data's prompts are {own}, embedded by a {spec.pipeline}, but {network} takes prompts {theirs}: "
            "encode with its own text encoders"
        )


def prompt_bytes(spec: TextSpec, size: int) -> int:
    """Of one prompt's embeddings in numbers of `size` bytes."""
    return size * math.prod((spec.length, spec.width)) + size * spec.pooled
