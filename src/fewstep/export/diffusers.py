"""A student of a diffusers teacher as a folder that `DiffusionPipeline.from_pretrained` loads, without fewstep.

FOLDER/model_index.json    the pipeline's class: pipeline.py's, or diffusers' own where it has the parts
FOLDER/pipeline.py         the sampler; needs torch, safetensors and diffusers alone
FOLDER/unet | transformer  the network in diffusers' own format
FOLDER/scheduler           FlowMapEulerDiscreteScheduler, where steps are x + (s - t) F
FOLDER/vae, text_encoder, tokenizer, ...  the teacher's own
FOLDER/fewstep/            config.json, steps.json, second_time.safetensors, origin.safetensors where there is one
FOLDER/README.md           the model card
"""

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fewstep.export.anyflow import MODEL, PIPELINE, anyflow_settings, anyflow_weights, is_anyflow
from fewstep.export.cards import diffusers_card, write_card
from fewstep.export.parts import NO_PARTS, Found, Parts, find_parts, index_of, to_json
from fewstep.export.steps import step_table
from fewstep.sampling.pipeline import Pipeline
from fewstep.teachers.diffusers import DiffusersConfig, DiffusersNetwork, foreign_name
from fewstep.teachers.families import family
from fewstep.teachers.lora import merged
from fewstep.utils.errors import ConfigError
from fewstep.utils.files import new_folder

CALLS = (1, 2, 3, 4, 8)
SCHEDULER = "FlowMapEulerDiscreteScheduler"
Weights = dict[str, Tensor]


def export_diffusers(
    pipeline: Pipeline, folder: Path, calls: tuple[int, ...] = CALLS, parts: Parts = NO_PARTS
) -> tuple[str, ...]:
    """Write the folder; calls: numbers of network calls that it can sample in. Returns the names of its components.

    Raises ConfigError for a network that is not of diffusers, and for a folder that has something in it;
    CheckpointError for parts of the teacher that are missing or damaged. Nothing is written then.
    """
    network, config = _network(pipeline)
    table, found = step_table(pipeline, calls), find_parts(pipeline, parts)
    foreign, second = _weights(network)
    flows = table.is_flow(family(config.model).noise_time)
    plain = flows and not network.guided and is_anyflow(config.model, config.values, found)
    place = "unet" if config.model.startswith("UNet") else "transformer"
    index: dict[str, Any] = {"_class_name": PIPELINE if plain else ["pipeline", "FewStepPipeline"]}
    index |= index_of(found, place, ("diffusers", MODEL if plain else config.model))
    with new_folder(folder) as aside:
        (aside / "fewstep").mkdir()
        if plain:
            _write_network(aside / place, anyflow_settings(config.values), anyflow_weights(foreign, second))
        else:
            _write_network(aside / place, json.loads(config.settings), foreign)
            _write_sampler(aside, pipeline, second, found)
            index["fewstep"] = [None, None]  # no component: a folder that the Hub gives along, for being named here
        if flows:
            index["scheduler"] = ["diffusers", SCHEDULER]
            (aside / "scheduler").mkdir()
            scheduler = {"_class_name": SCHEDULER, "num_train_timesteps": 1000, "shift": 1.0}
            (aside / "scheduler" / "scheduler_config.json").write_text(to_json(scheduler))
        found.copy(aside)
        (aside / "fewstep" / "steps.json").write_text(table.to_json())
        (aside / "model_index.json").write_text(to_json(index))
        write_card(pipeline, diffusers_card(pipeline, table, found, plain), aside, parts.teacher)
    return tuple(name for name in index if name not in ("_class_name", "fewstep"))


def loads_plainly(folder: Path) -> bool:
    """Whether an exported folder loads without trust_remote_code."""
    return not (folder / "pipeline.py").is_file()


def _network(pipeline: Pipeline) -> tuple[DiffusersNetwork, DiffusersConfig]:
    flow_map = pipeline.flow_map
    if flow_map.config is None or not isinstance(flow_map.network, DiffusersNetwork):
        raise ConfigError(
            f"diffusers has no network like this {type(flow_map.network).__name__}: export it --to onnx or --to torch; "
            "only students with a network of diffusers (fewstep train distil-diffusers) go into its format"
        )
    config = flow_map.config.network
    assert isinstance(config, DiffusersConfig)
    return flow_map.network, config


def _weights(network: DiffusersNetwork) -> tuple[Weights, Weights]:
    """By the teacher's names, adapters merged; and those of the second time."""
    whole = merged({key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()})
    foreign = {name: value for key, value in whole.items() if (name := foreign_name(key)) is not None}
    second = {key.removeprefix("two_times."): value for key, value in whole.items() if foreign_name(key) is None}
    return foreign, second


def _write_network(folder: Path, settings: dict[str, Any], weights: Weights) -> None:
    folder.mkdir(parents=True)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(to_json(settings))


def _write_sampler(folder: Path, pipeline: Pipeline, second: Weights, found: Found) -> None:
    """pipeline.py, and what it reads besides the steps."""
    network, config = _network(pipeline)
    kind = family(config.model)
    save_file(second, folder / "fewstep" / "second_time.safetensors", {"format": "pt"})
    origin = pipeline.flow_map.preconditioning.origin
    if origin is not None:
        save_file({"origin": origin.float().contiguous()}, folder / "fewstep" / "origin.safetensors")
    shutil.copyfile(str(files("fewstep.export") / "diffusers_pipeline.py"), folder / "pipeline.py")
    record = {
        "shape": list(network.shape),
        "times": kind.times,
        "packed": kind.packed,
        "noise_time": kind.noise_time,
        "time_factor": 1000.0 / kind.noise_time,
        "time_scale": float(config.values.get("timestep_scale", 1.0)),
        "guided": ("own" if network.own_guidance else "beside") if network.guided else "",
        "guidance_unit": float(config.values.get("guidance_embeds_scale", 1.0)),
        "guidance_input": kind.guidance_input(config.values),
        "classes": list(pipeline.config.class_names),
        "num_classes": network.num_classes,
        "null_label": kind.null_label(config.values),
        "prompt_widths": list(network.prompt_widths),
        "range": pipeline.config.data_range,
        "latents": found.latents,
        "encoder": found.encoder,
    }
    (folder / "fewstep" / "config.json").write_text(to_json(record))
