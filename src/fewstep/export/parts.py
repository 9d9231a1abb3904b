"""What goes along with a student: its teacher's autoencoder, text encoders and tokenizers, copied as they are.

Only data are copied: JSON, vocabularies, safetensors. Every copy is a file of its own, never a link.
"""

import inspect
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.data.latents.autoencoders import load_decoder
from fewstep.sampling.pipeline import Pipeline
from fewstep.teachers.text import PIPELINES
from fewstep.utils.errors import CheckpointError, ConfigError
from fewstep.utils.files import guarded, read_record
from fewstep.utils.hub import cached_copy, local_copy

Which = Literal["all", "vae", "none"]
_ADVICE = "bring back a copy of it"
_DATA = (".json", ".txt", ".safetensors", ".model")
_VARIANTS = (".fp16.", ".bf16.", "non_ema")  # of weights that are there without them
_WEIGHTS = ("diffusion_pytorch_model", "model")
_ENCODERS = tuple(f"{part}{number}" for number in ("", "_2", "_3") for part in ("text_encoder", "tokenizer"))
_RETURNS: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": ("text",),
    "StableDiffusionXLPipeline": ("text", "", "pooled"),
    "StableDiffusion3Pipeline": ("text", "", "pooled"),
    "FluxPipeline": ("text", "pooled"),
    "PixArtAlphaPipeline": ("text", "mask"),
    "PixArtSigmaPipeline": ("text", "mask"),
    "SanaPipeline": ("text", "mask"),
    "WanPipeline": ("text",),
}
"""What `encode_prompt` of a pipeline of diffusers returns, in order; "" for what is not taken."""
_CLIPS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")  # pad as far as their tokenizers say
_OPTIONS: dict[str, dict[str, Any]] = {"StableDiffusionPipeline": {"requires_safety_checker": False}}


@dataclass(frozen=True)
class Parts:
    """Where what goes along lies: teacher, a pipeline's folder; autoencoder, that of latents where it was moved."""

    teacher: Path | None = None
    autoencoder: Path | None = None
    which: Which = "all"


NO_PARTS = Parts()


@dataclass(frozen=True)
class Found:
    """components: name -> (library, class) as an index has them, and the folder of each. encoder: how prompts are
    embedded. latents: mean and deviation of each channel, so that z = mean + std x is the autoencoder's own.
    """

    components: dict[str, tuple[str, str]]
    folders: dict[str, Path]
    encoder: dict[str, Any] | None = None
    latents: dict[str, list[float]] | None = None

    def copy(self, out: Path) -> None:
        """Write each component's data to OUT/NAME; raises CheckpointError for weights that are no safetensors."""
        for name, folder in self.folders.items():
            _copy(folder, out / name, weights=not name.startswith("tokenizer"))


def teachers_folder(name: str, pipeline: Pipeline, needed: bool) -> Path | None:
    """Where the teacher's files are; None for a model without one, or one that is a class of a file.

    name: its place now; as the run names it where not given. needed: whether it must be there.
    Raises ConfigError where it has moved and is needed, HubError where the Hub does not give it.
    """
    provenance = pipeline.provenance
    name = name or ("" if provenance is None else provenance.teacher)
    if not name or ".py:" in name:
        return None
    found = local_copy(name) if needed else cached_copy(name)
    if needed and found is not None and not found.exists():
        raise ConfigError(
            f"the teacher {name} is not there: say where it lies now with --teacher, or leave out its parts with "
            "--parts none"
        )
    return found


def find_parts(pipeline: Pipeline, parts: Parts) -> Found:
    """What goes along with a student.

    Raises CheckpointError for files that are missing, damaged or, of an autoencoder, other than in training.
    """
    index = {} if parts.which == "none" else _index(parts.teacher)
    wanted = {"all": ("vae", *_ENCODERS), "vae": ("vae",), "none": ()}[parts.which]
    components, folders = {}, {}
    for name in wanted:
        place = index.get(name)
        if isinstance(place, list) and place[0] in ("diffusers", "transformers") and parts.teacher is not None:
            components[name], folders[name] = (str(place[0]), str(place[1])), parts.teacher / name
    latents = None
    if "vae" in wanted and pipeline.config.latents is not None:
        latents, folders["vae"] = _own_latents(pipeline, parts, folders.get("vae"))
        components.setdefault("vae", ("diffusers", pipeline.config.latents.autoencoder.kind))
    elif "vae" in components:
        latents = teachers_latents(components["vae"][1], folders["vae"])
    for name, folder in folders.items():
        if not folder.is_dir():
            raise CheckpointError(f"the teacher's {name} is not there: {folder}; leave it out with --parts none")
    return Found(components, folders, _encoder(index, components, pipeline), latents)


def _index(teacher: Path | None) -> dict[str, Any]:
    file = None if teacher is None else teacher / "model_index.json"
    return read_record(file, _ADVICE) if file is not None and file.is_file() else {}


def _encoder(index: dict[str, Any], components: dict[str, Any], pipeline: Pipeline) -> dict[str, Any] | None:
    """How the teacher's pipeline embeds prompts; None for those that are not known, or without encoders."""
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in _RETURNS or "text_encoder" not in components:
        return None
    own = 0 if pipeline.config.text is None else pipeline.config.text.tokens  # as its data were encoded
    flags = {key: value for key, value in index.items() if isinstance(value, bool)}
    options = flags | _OPTIONS.get(name, {})
    zeros = name == "StableDiffusionXLPipeline" and flags.get("force_zeros_for_empty_prompt", True)
    call = {"max_sequence_length": own or PIPELINES[name].tokens}
    instructed = pipeline.config.text is None or pipeline.config.text.instruction != ""
    return {
        "pipeline": name,
        "returns": _RETURNS[name],
        "options": options,
        "call": call,
        "zeros": zeros,
        "clip_tokens": own if name in _CLIPS else 0,
        "instructed": instructed,
    }


def _own_latents(pipeline: Pipeline, parts: Parts, beside: Path | None) -> tuple[dict[str, list[float]], Path]:
    """The numbers of the latents that a student was trained on, and their autoencoder, which is checked."""
    spec = pipeline.config.latents
    assert spec is not None
    lay = Path(spec.autoencoder.path)
    place = parts.autoencoder or (lay if lay.is_dir() or beside is None else beside)
    load_decoder(spec, place, torch.device("cpu"))
    return {"mean": list(spec.mean), "std": [each / spec.scale for each in spec.std]}, place


def teachers_latents(kind: str, folder: Path) -> dict[str, list[float]]:
    """Mean and deviation by which a pipeline of diffusers takes its autoencoder's latents z: of each channel, or one.

    x = scaling_factor (z - latents_mean) / latents_std, with shift_factor for a mean where there is none.
    """
    import diffusers

    settings = read_record(folder / "config.json", _ADVICE)
    defaults = inspect.signature(getattr(diffusers, kind).__init__).parameters

    def value(name: str, otherwise: Any) -> Any:
        default = defaults[name].default if name in defaults else None
        found = settings.get(name, default)
        return otherwise if found is None else found

    scale, mean = float(value("scaling_factor", 1.0)), value("latents_mean", [value("shift_factor", 0.0)])
    return {"mean": list(map(float, mean)), "std": [each / scale for each in value("latents_std", [1.0])]}


def _copy(folder: Path, out: Path, weights: bool) -> None:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix in _DATA]
    files = [file for file in files if not any(variant in file.name for variant in _VARIANTS)]
    if weights and not any(file.suffix == ".safetensors" and file.stem.startswith(_WEIGHTS) for file in files):
        raise CheckpointError(
            f"{folder} has no weights in safetensors: save it with safe_serialization, or --parts none"
        )
    for file in files:
        place = out / file.relative_to(folder)
        with guarded(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def index_of(found: Found, network: str, model: tuple[str, str]) -> dict[str, Any]:
    """Components as an index of diffusers has them, with the network's."""
    return {network: list(model), **{name: list(place) for name, place in found.components.items()}}


def to_json(record: dict[str, Any]) -> str:
    """A record as files of diffusers have it."""
    return json.dumps(record, indent=2) + "\n"
