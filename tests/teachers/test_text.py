"""Prompts are embedded as the pipelines of diffusers embed them."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.data.latents.prompts import encode_prompts
from fewstep.networks.condition import Prompts
from fewstep.teachers.families import family
from fewstep.teachers.text import TextSpec, load_text_encoders
from fewstep.utils.serialization import from_json, to_json
from tests.support.foreign import TINY, class_name
from tests.support.text import CAPTIONS, PIPELINES, make_pipeline

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


def own_way(pipeline: Any, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the pipeline's own encode_prompt gives, and for the empty prompt."""
    options = {name for name in inspect.signature(pipeline.encode_prompt).parameters if name.startswith("prompt_")}
    prompts: dict[str, Any] = {f"prompt_{n}": None for n in (2, 3) if f"prompt_{n}" in options}
    if name != "FluxPipeline":
        prompts["do_classifier_free_guidance"] = True
    if name == "WanPipeline":
        prompts["max_sequence_length"] = 512
    if name == "SanaPipeline":
        call = inspect.signature(type(pipeline).__call__)
        prompts["complex_human_instruction"] = call.parameters["complex_human_instruction"].default
    per = {"num_videos_per_prompt" if name == "WanPipeline" else "num_images_per_prompt": 1}
    with torch.no_grad():
        found = pipeline.encode_prompt(prompt=list(CAPTIONS), device="cpu", **prompts, **per)
    if name == "FluxPipeline":
        return {"text": found[0], "pooled": found[1]}, {}
    if name in ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline"):
        return {"text": found[0], "pooled": found[2]}, {"text": found[1], "pooled": found[3]}
    if name in ("PixArtSigmaPipeline", "SanaPipeline"):
        return {"text": found[0], "mask": found[1].bool()}, {"text": found[2], "mask": found[3].bool()}
    return {"text": found[0]}, {"text": found[1]}


def close(found: Prompts, expected: dict[str, Tensor]) -> None:
    for name in ("text", "mask", "pooled"):
        own = getattr(found, name)
        assert (own is None) == (name not in expected), name
        if own is not None:
            torch.testing.assert_close(own, expected[name][: len(own)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_embeddings_are_those_of_the_pipelines_own_code(name: str, tmp_path: Path) -> None:
    """Text, mask and pooled embeddings to 1e-5, and the empty prompt's; their widths are those of the network."""
    pipeline = make_pipeline(name)
    pipeline.save_pretrained(tmp_path)
    encoders = load_text_encoders(tmp_path, torch.device("cpu"))
    found, (expected, null) = encoders.encode(CAPTIONS), own_way(pipeline, name)
    close(found, expected)
    assert found.null is not None
    if null:
        close(found.null, null)
    assert bool(encoders.spec.instruction) == (name == "SanaPipeline")
    kind = PIPELINES[name]
    assert encoders.spec.widths == family(class_name(kind)).prompt_widths(TINY[kind].settings)
    assert encoders.spec.length == found.text.shape[1]


def test_embeddings_without_an_instruction_are_made_again_as_they_were(tmp_path: Path) -> None:
    """Folders encoded before there was one have none; whatever the pipeline puts before prompts today."""
    pipeline = make_pipeline("SanaPipeline")
    pipeline.save_pretrained(tmp_path)
    plain = load_text_encoders(tmp_path, torch.device("cpu"), 12, instructed=False)
    spec = from_json(TextSpec, {key: each for key, each in to_json(plain.spec).items() if key != "instruction"})
    with torch.no_grad():
        text, mask, *_ = pipeline.encode_prompt(list(CAPTIONS), False, device="cpu", max_sequence_length=12)
    close(encode_prompts(spec, CAPTIONS, None, torch.device("cpu")), {"text": text, "mask": mask.bool()})
    assert not load_text_encoders(tmp_path, torch.device("cpu"), 12).spec.same_as(spec)
