"""Teachers in the format of diffusers: a folder becomes a flow map whose jumps are DDIM's steps.

A folder holds a pipeline (model_index.json) or a bare network with the configuration of its scheduler beside it or in
../scheduler. Files are read, never run; weights come from safetensors, or from a pickle with tensors alone.
"""

import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.flow.discrete_vp import BetaSchedule, DiscreteVP
from fewstep.flow.flow_map import FlowMap, FlowMapConfig
from fewstep.flow.paths import EDM, Linear
from fewstep.flow.paths import Path as TimePath
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.flow.preconditioning.network_scaling import EDMScaling, Scaling
from fewstep.flow.preconditioning.prediction import Prediction, PredictionScaling
from fewstep.networks.base import LoRA, Shape
from fewstep.networks.condition import Condition
from fewstep.networks.layers import check_inputs
from fewstep.teachers.families import Family, NullableEmbedding, Settings, family, packed
from fewstep.teachers.lora import add_adapters, base_name, last_adapter
from fewstep.teachers.second_time import (
    TwoTimes,
    TwoTimesConfig,
    TwoTimesNetwork,
    differentiable_attention,
    differentiable_norms,
    without_second_time,
)
from fewstep.utils.errors import CheckpointError, ConfigError, FewstepWarning, MissingExtraError
from fewstep.utils.extras import installing
from fewstep.utils.files import read_record
from fewstep.utils.random import seeded
from fewstep.utils.serialization import later
from fewstep.utils.weights import read_weights

NETWORK_FOLDERS = ("unet", "transformer")
_ADVICE = "bring back a copy of it"
_SCHEDULES: dict[str, BetaSchedule] = {
    "linear": "linear",
    "scaled_linear": "scaled-linear",
    "squaredcos_cap_v2": "cosine",
}
_BETAS_BY_DEFAULT = ("DDPM", "DDIM", "PNDM")
"""Schedulers whose betas are linear from 1e-4 to 0.02 where their settings say nothing."""
_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v",
    "flow_prediction": "flow",
}


@dataclass(frozen=True)
class DiffusersConfig(TwoTimesConfig):
    """A network of diffusers with a second time: its class, and its config.json as text."""

    model: str
    settings: str
    lora: int = later(int)
    """Of older files, whose adapters have this rank and no other settings; 0 for none."""

    def __post_init__(self) -> None:
        if self.lora:
            object.__setattr__(self, "adapters", LoRA(self.lora))
            object.__setattr__(self, "lora", 0)

    @cached_property
    def values(self) -> Settings:
        """The settings; raises ConfigError where the text is no JSON object."""
        try:
            found = json.loads(self.settings)
        except ValueError as error:
            raise ConfigError(f"settings of a {self.model}: no JSON ({error})") from error
        if not isinstance(found, dict):
            raise ConfigError(f"settings of a {self.model}: a JSON object is needed")
        return {key: value for key, value in found.items() if not key.startswith("_")}

    def build(self, shape: Shape, num_classes: int, guided: bool, observation: Shape = ()) -> "DiffusersNetwork":
        if observation:
            raise ConfigError(f"a {self.model} takes no observations as inputs")
        return DiffusersNetwork(self, shape, num_classes, guided)


class DiffusersNetwork(TwoTimesNetwork):
    """A network of diffusers as F(x, t, s, cond), t and s in the times that it takes; s counts for nothing at first.

    The foreign layers stay in evaluation mode: no dropout, no labels dropped at random. Raises ConfigError for a class
    that is not known, for settings that it refuses, and where it was made for other channels or classes.

    guided: the guidance enters where the network has an input for its strength, which is then all of it that counts;
    else beside s, and counts for nothing at first.
    """

    def __init__(self, config: DiffusersConfig, shape: Shape, num_classes: int, guided: bool = False) -> None:
        super().__init__(shape, num_classes, guided)
        self.config, self.family = config, family(config.model)
        channels = config.values.get("in_channels")
        if self.family.packed and channels:
            channels //= 4
        if channels != shape[0] or self.family.num_classes(config.values) != num_classes:
            latents = ": give it latents, as fewstep encode --teacher writes them" if channels not in (1, 3) else ""
            raise ConfigError(
                f"a {config.model} of {channels} channels and {self.family.num_classes(config.values)} classes does "
                f"not fit samples of shape {shape} in {num_classes} classes{latents}"
            )
        network = make_model(config.model, config.values)
        classes = getattr(network, "class_embedding", None)
        if isinstance(classes, nn.Embedding):
            network.class_embedding = NullableEmbedding(classes)
        differentiable_norms(network)
        if config.adapters is not None:
            add_adapters(network, config.adapters, self.family.attention, self.family.times)
        self.adapters = config.adapters
        beside = guided and not self.own_guidance
        self.two_times = TwoTimes(network, self.family.times, 1000.0 / self.family.noise_time, beside)
        if config.sees_skip:
            self.sees_skip = True
            self.two_times.see_skip(self.family.first, shape[0] * (4 if self.family.packed else 1))
        self.eval()

    @property
    def prompt_widths(self) -> tuple[int, int]:
        return self.family.prompt_widths(self.config.values)

    @property
    def own_guidance(self) -> bool:
        return self.family.guidance_input(self.config.values) is not None

    @property
    def masks_prompts(self) -> bool:
        return self.family.masked

    @property
    def last_layer(self) -> Tensor:
        network = self.two_times.network
        if self.adapters is not None:
            return last_adapter(network)
        return network.get_submodule(self.family.output).weight  # type: ignore[return-value]

    def foreign_name(self, key: str) -> str | None:
        return foreign_name(key)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        check_inputs(x, t, s, self.shape)
        cond = Condition() if cond is None else cond
        two_times, seen = self.two_times, cond.seen
        shown = packed(seen) if seen is not None and self.family.packed else seen
        with two_times.at(s.to(x.dtype), cond.guidance), two_times.seeing(shown), differentiable_attention(x, t, s):
            found = self.family.call(two_times.network, x, t, cond)
        return two_times.gated(found[:, : x.shape[1]], seen, t, s)


def foreign_name(key: str) -> str | None:
    """A parameter's name in diffusers; None for those of the second time."""
    name = without_second_time(key.removeprefix("two_times."))
    name = None if name is None else base_name(name)
    return None if name is None else name.replace("class_embedding.embedding.", "class_embedding.")


def make_model(name: str, settings: Settings) -> nn.Module:
    """A network of diffusers with fresh weights.

    Raises ConfigError for a class that is not known or settings that it refuses, MissingExtraError without diffusers.
    """
    family(name)
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError(f"{name} needs diffusers: {installing('diffusers')} ({error})") from error
    try:
        model: nn.Module = getattr(diffusers, name)(**settings)
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"{name} refuses its settings: {' '.join(str(error).split())[:300]}") from error
    return model


def is_diffusers(folder: Path) -> bool:
    """Whether a folder holds a pipeline, or a network, of diffusers."""
    if (folder / "model_index.json").is_file():
        return True
    config = folder / "config.json"
    return config.is_file() and "_class_name" in read_record(config, _ADVICE)


def load_diffusers(folder: Path, shape: Shape = ()) -> FlowMap:
    """The network of a folder as a denoiser on its own path.

    shape: of its samples; from the settings where it is not given. Raises CheckpointError where files are missing,
    truncated or do not fit, ConfigError for classes, schedulers and settings that are not known.
    """
    place = _network_folder(folder)
    settings = read_record(place / "config.json", _ADVICE)
    name = str(settings.get("_class_name"))
    config = DiffusersConfig(name, json.dumps(settings, sort_keys=True))
    kind = family(name)
    path, scaling = read_scheduler(_scheduler_file(folder, place), kind)
    shape = shape or _sample_shape(name, settings)
    _warn_of_size(folder, shape, settings)
    stored = FlowMapConfig(path, EulerPreconditioning(path), scaling, config, shape, kind.num_classes(config.values))
    weights = _read_weights(place)
    sketch = config.without_memory(shape, stored.num_classes, guided=False, tensors=len(weights))
    if isinstance(sketch, DiffusersNetwork):  # compared before there is time or memory for it
        sketch.check_foreign(weights, str(place))
    with seeded(0):  # what no file holds, the second time, is the same whenever the teacher is read
        flow_map = stored.build()
    assert isinstance(flow_map.network, DiffusersNetwork)
    flow_map.network.load_foreign(weights, str(place))
    return flow_map.eval()


def _network_folder(folder: Path) -> Path:
    places = [folder / name for name in NETWORK_FOLDERS if (folder / name / "config.json").is_file()]
    if (folder / "model_index.json").is_file():
        if not places:
            raise CheckpointError(f"{folder} is a pipeline without a network: neither {' nor '.join(NETWORK_FOLDERS)}")
        return places[0]
    return folder


def _scheduler_file(folder: Path, place: Path) -> Path:
    name = "scheduler_config.json"
    for file in (folder / "scheduler" / name, place / name, place.parent / "scheduler" / name):
        if file.is_file():
            return file
    raise CheckpointError(
        f"{folder} has no scheduler, which says what the network predicts and at which noise: put {name} beside its "
        "config.json"
    )


def read_scheduler(file: Path, kind: Family) -> tuple[TimePath, Scaling]:
    """The path that a scheduler of diffusers walks, and what the network means on it.

    Raises ConfigError for a kind of schedule or prediction that is not known.
    """
    settings = read_record(file, _ADVICE)
    name = str(settings.get("_class_name", ""))
    if name.startswith("EDM"):
        path: TimePath = EDM(settings.get("sigma_min", 0.002), settings.get("sigma_max", 80.0))
        if settings.get("prediction_type", "epsilon") != "epsilon":
            raise ConfigError(f"{file}: prediction_type {settings['prediction_type']!r} of {name} is not known")
        return path, EDMScaling(settings.get("sigma_data", 0.5), path)
    schedule, predicted = settings.get("beta_schedule", "linear"), settings.get("prediction_type", "epsilon")
    if settings.get("use_flow_sigmas") and predicted != "flow_prediction":
        raise ConfigError(f"{file}: prediction_type {predicted!r} with use_flow_sigmas is not known")
    if name.startswith("Flow") or settings.get("use_flow_sigmas"):
        return Linear(), PredictionScaling("flow", Linear(), Linear(), time_factor=kind.noise_time)
    if not (name.startswith(_BETAS_BY_DEFAULT) or settings.keys() & {"beta_schedule", "trained_betas"}):
        raise ConfigError(
            f"{file}: the noise of {name or 'a scheduler without _class_name'} is not known; known are flow matching's "
            "schedulers, EDM's, and those with a beta_schedule"
        )
    if predicted not in _PREDICTIONS:
        raise ConfigError(f"{file}: prediction_type {predicted!r} is not known; known are {', '.join(_PREDICTIONS)}")
    given = settings.get("trained_betas")
    if given is None and schedule not in _SCHEDULES:
        raise ConfigError(f"{file}: beta_schedule {schedule!r} is not known; known are {', '.join(_SCHEDULES)}")
    path = DiscreteVP(
        "given" if given is not None else _SCHEDULES[schedule],
        float(settings.get("beta_start", 1e-4)),
        float(settings.get("beta_end", 0.02)),
        int(settings.get("num_train_timesteps", 1000)),
        () if given is None else tuple(map(float, given)),
        bool(settings.get("rescale_betas_zero_snr", False)),
    )
    return path, PredictionScaling(_PREDICTIONS[predicted], path, path)


def _warn_of_size(folder: Path, shape: Shape, settings: Settings) -> None:
    """A FewstepWarning for samples of another size than a network says that it was made for; many take any size."""
    size = settings.get("sample_size")
    sides = [size, size] if isinstance(size, int) else size
    if isinstance(sides, list) and list(shape[-2:]) != sides:
        given, own = ("x".join(map(str, each)) for each in (shape[-2:], sides))
        warnings.warn(
            f"{folder} was made for samples of {own}, and the data have {given}: give it those, for images with "
            f"--data.image-size {sides[0]}",
            FewstepWarning,
            stacklevel=2,
        )


def _sample_shape(name: str, settings: Settings) -> Shape:
    size, channels = settings.get("sample_size"), settings.get("in_channels")
    if not isinstance(channels, int) or size is None:
        raise ConfigError(
            f"the configuration of this {name} does not say its samples' size: train on data (no set of its own "
            "samples can be drawn), or give load_teacher their shape"
        )
    sides = [size, size] if isinstance(size, int) else list(size)
    return (channels, *map(int, sides))


def read_model_weights(folder: Path) -> dict[str, Tensor]:
    """Of the network in a folder of diffusers, by its own names; raises CheckpointError as `load_diffusers` does."""
    return _read_weights(_network_folder(folder))


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Weights in one safetensors file, in shards with an index, or in a pickle that holds tensors alone.

    Raises CheckpointError where there are none, or where they cannot be read.
    """
    whole, index = (
        folder / "diffusion_pytorch_model.safetensors",
        folder / "diffusion_pytorch_model.safetensors.index.json",
    )
    pickled = folder / "diffusion_pytorch_model.bin"
    if whole.is_file():
        return read_weights(whole)
    if index.is_file():
        shards = sorted(set(read_record(index, _ADVICE).get("weight_map", {}).values()))
        if not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards):
            raise CheckpointError(f"{index} names shards outside its folder")
        return {key: value for shard in shards for key, value in read_weights(folder / shard).items()}
    if pickled.is_file():
        try:
            found: Any = torch.load(pickled, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{pickled} is no pickle of tensors alone: save it as safetensors") from error
        return dict(found)
    raise CheckpointError(f"{folder} has no weights: diffusion_pytorch_model.safetensors is missing")
