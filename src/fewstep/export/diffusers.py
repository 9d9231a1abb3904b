"""A student of a diffusers teacher as a folder that `DiffusionPipeline.from_pretrained` loads, without fewstep.

FOLDER/model_index.json    names pipeline.py's class
FOLDER/pipeline.py         the sampler; needs torch, safetensors and diffusers alone
FOLDER/unet | transformer  the network in diffusers' own format
FOLDER/fewstep/            second_time.safetensors, steps.json, origin.safetensors where there is one
"""

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fewstep.export.steps import step_table
from fewstep.sampling.pipeline import Pipeline
from fewstep.teachers.diffusers import DiffusersConfig, DiffusersNetwork, foreign_name
from fewstep.teachers.families import family
from fewstep.teachers.lora import merged
from fewstep.utils.errors import ConfigError

CALLS = (1, 2, 3, 4, 8)


def export_diffusers(pipeline: Pipeline, folder: Path, calls: tuple[int, ...] = CALLS) -> None:
    """Write the folder; calls: numbers of network calls that it can sample in.

    Raises ConfigError for a network that is not of diffusers, and for a folder that has something in it.
    """
    flow_map = pipeline.flow_map
    network = flow_map.network
    if flow_map.config is None or not isinstance(network, DiffusersNetwork):
        raise ConfigError(
            "only students with a network of diffusers go into its format (train distil-diffusers): export others "
            "--to onnx or torch"
        )
    config = flow_map.config.network
    assert isinstance(config, DiffusersConfig)
    table = step_table(pipeline, calls)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} has something in it: give an empty folder, or one that is not there")
    place = "unet" if config.model.startswith("UNet") else "transformer"
    (folder / place).mkdir(parents=True)
    (folder / "fewstep").mkdir()
    weights = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    whole = merged(weights)
    foreign = {name: value for key, value in whole.items() if (name := foreign_name(key)) is not None}
    second = {key.removeprefix("two_times."): value for key, value in whole.items() if foreign_name(key) is None}
    save_file(foreign, folder / place / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    save_file(second, folder / "fewstep" / "second_time.safetensors", {"format": "pt"})
    (folder / place / "config.json").write_text(json.dumps(json.loads(config.settings), indent=2) + "\n")
    origin = flow_map.preconditioning.origin
    if origin is not None:
        save_file({"origin": origin.float().contiguous()}, folder / "fewstep" / "origin.safetensors")
    (folder / "fewstep" / "steps.json").write_text(table.to_json())
    shutil.copyfile(str(files("fewstep.export") / "diffusers_pipeline.py"), folder / "pipeline.py")
    index: dict[str, Any] = {"_class_name": ["pipeline", "FewStepPipeline"], place: ["diffusers", config.model]}
    kind = family(config.model)
    record = {
        "shape": list(network.shape),
        "times": kind.times,
        "packed": kind.packed,
        "time_factor": 1000.0 / kind.noise_time,
        "classes": list(pipeline.config.class_names),
        "num_classes": network.num_classes,
        "range": pipeline.config.data_range,
    }
    (folder / "fewstep" / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
