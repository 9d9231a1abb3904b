"""Model cards of exported folders: Python that loads each format where its card lies."""

from pathlib import Path
from typing import Any

from fewstep.export.parts import Found
from fewstep.export.steps import StepTable
from fewstep.networks.base import Network
from fewstep.sampling.card import Card
from fewstep.sampling.pipeline import Pipeline
from fewstep.utils.files import read_record

_NO_CHECKER = "The teacher's safety checker, if it has one, is not part of this folder."
_WAN_FACTORS = {"scale_factor_spatial": 8, "scale_factor_temporal": 4}


def write_card(pipeline: Pipeline, card: Card, folder: Path, teacher: Path | None) -> None:
    """README.md, with the run's figures and the teacher's licence; raises CheckpointError where it cannot write."""
    card.write(folder, pipeline.provenance, teacher)


def diffusers_card(pipeline: Pipeline, table: StepTable, found: Found, plain: bool) -> Card:
    """The card of a folder of diffusers; plain: whether it loads without trust_remote_code."""
    network = pipeline.flow_map.network
    assert isinstance(network, Network)
    calls = 2 if 2 in table.steps else min(table.steps)
    given = [*_prompt_words(network, found), f"num_inference_steps={calls}"]
    given += _video_words(pipeline, found) if plain else _output_words(pipeline, found)
    imports = ["import torch"] if any("torch." in word for word in given) else []
    imports += ["from diffusers import DiffusionPipeline"]
    trust = "" if plain else ", trust_remote_code=True"
    load = f'pipeline = DiffusionPipeline.from_pretrained("."{trust})  # this folder, or its name on the Hub'
    kind = "frames" if plain else "images"
    code = "\n".join([*imports, "", load, f"{kind} = pipeline({', '.join(given)}).{kind}"])
    counts = ", ".join(map(str, table.steps))
    each = "a network call each" if network.guided else "a network call each, two with a `guidance_scale`"
    notes = [f"Times are set for {counts} steps (`num_inference_steps`): {each}."]
    if plain:
        tuned = [f"{count}: `sigmas={[step.t / 1000 for step in steps]}`" for count, steps in table.steps.items()]
        notes = [f"Its times, by the number of network calls: {'; '.join(tuned)}."]
    else:
        notes.append("`pipeline.py` is the sampler; read it before you trust it. It needs torch and diffusers alone.")
    return Card(pipeline.words(), code, "diffusers", pipeline.task, (*notes, *([_NO_CHECKER] if found.encoder else [])))


def _prompt_words(network: Network, found: Found) -> list[str]:
    width, pooled = network.prompt_widths
    if not width:
        return ["batch_size=4"]
    if found.encoder is not None or "text_encoder" in found.components:
        return ['"a photograph"']
    words = [f"prompt_embeds=torch.zeros(1, 8, {width})"]
    return words + ([f"pooled_prompt_embeds=torch.zeros(1, {pooled})"] if pooled else [])


def _output_words(pipeline: Pipeline, found: Found) -> list[str]:
    pictures = found.latents is not None or pipeline.flow_map.sample_shape[0] in (1, 3)
    return [] if pictures else ['output_type="latent"']


def _video_words(pipeline: Pipeline, found: Found) -> list[str]:
    settings = read_record(found.folders["vae"] / "config.json", "bring back a copy of it")
    space, time = (int(settings.get(name, default)) for name, default in _WAN_FACTORS.items())
    _, frames, height, width = pipeline.flow_map.sample_shape
    return [f"height={height * space}", f"width={width * space}", f"num_frames={(frames - 1) * time + 1}"]


def traced_card(pipeline: Pipeline, kind: str, inputs: dict[str, Any], calls: int) -> Card:
    """The card of a folder of programs; inputs: name -> expression of an array, of what a sampler takes."""
    if kind == "onnx":
        code = ["import numpy as np", "import onnxruntime", ""]
        code += [f'session = onnxruntime.InferenceSession("sampler-{calls}.onnx")']
        given = ", ".join(f'"{name}": {value}' for name, value in inputs.items())
        code += [f"(samples,) = session.run(None, {{{given}}})"]
    else:
        code = ["import torch", "", f'sampler = torch.export.load("sampler-{calls}.pt2").module()']
        code += [f"samples = sampler({', '.join(inputs.values())})"]
    note = "`fewstep.json` has shapes, classes, the clock's ends and the steps; `jump` is one jump between two times."
    return Card(pipeline.words(), "\n".join(code), kind if kind == "onnx" else "pytorch", pipeline.task, (note,))
