"""An exported folder has its teacher's autoencoder and text encoders, and draws pictures of prompts without fewstep."""

import inspect
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep import Pipeline
from fewstep.export.diffusers import export_diffusers, loads_plainly
from fewstep.export.parts import Parts, teachers_latents
from fewstep.flow.guidance import ClassifierFreeGuidance
from fewstep.networks.condition import Condition, Prompts
from fewstep.sampling.samplers import map_sampler
from fewstep.teachers.diffusers import load_diffusers
from fewstep.teachers.text import TextSpec
from fewstep.utils.errors import CheckpointError
from fewstep.utils.random import Draws
from tests.export.test_export import linear, load_pipeline, noise, trained
from tests.support.foreign import TINY, save_foreign
from tests.support.text import PIPELINES, save_pipeline

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
PROMPTS = ["a three", "an eight"]
IMAGES = [name for name in PIPELINES if name != "WanPipeline"]


def embedded(teacher: Any, prompts: list[str], name: str) -> Prompts:
    """By the teacher's own pipeline."""
    more: dict[str, Any] = {"prompt_2": None} if name in ("StableDiffusion3Pipeline", "FluxPipeline") else {}
    more |= {"prompt_3": None} if name == "StableDiffusion3Pipeline" else {}
    more |= {} if name == "FluxPipeline" else {"do_classifier_free_guidance": False}
    if name == "SanaPipeline" and prompts != [""]:
        told = inspect.signature(type(teacher).__call__).parameters["complex_human_instruction"]
        more["complex_human_instruction"] = told.default
    found = teacher.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, **more)
    if name in ("PixArtSigmaPipeline", "SanaPipeline"):
        return Prompts(found[0], found[1].bool())
    return Prompts(found[0], pooled=found[1 if name == "FluxPipeline" else 2] if len(found) > 2 else None)


@pytest.mark.parametrize("name", IMAGES)
def test_prompts_give_the_students_own_pictures(name: str, tmp_path: Path) -> None:
    """Embedded as the teacher's pipeline embeds them, guided, decoded by its autoencoder in its units."""
    teacher, tiny = save_pipeline(tmp_path / "teacher", name), TINY[PIPELINES[name]]
    student = trained(Pipeline(load_diffusers(tmp_path / "teacher", tiny.shape)))
    export_diffusers(student, tmp_path / "out", (2,), Parts(tmp_path / "teacher"))
    found = load_pipeline(tmp_path / "out", trust_remote_code=True)
    given = {"num_inference_steps": 2, "latents": noise(tiny.shape, 2), "guidance_scale": 3.0}
    latents = found(PROMPTS, output_type="latent", **given).images
    null = embedded(teacher, [""], name)
    if name == "StableDiffusionXLPipeline":
        null = Prompts(torch.zeros_like(null.text), pooled=torch.zeros_like(null.pooled))
    prompts = embedded(teacher, PROMPTS, name)
    cond = Condition(prompts=Prompts(prompts.text, prompts.mask, prompts.pooled, null))
    path = student.flow_map.path
    times = torch.linspace(path.t_max, path.t_min, 3, dtype=torch.float64)
    guided, draws = ClassifierFreeGuidance(student.flow_map, 3.0), Draws(0, 0, torch.arange(2))
    with torch.no_grad():
        own = map_sampler(guided, path.prior(noise(tiny.shape, 2)), times, cond, draws)
        shift = teacher.vae.config.get("shift_factor", 0.0)
        decoded = teacher.vae.decode(own / teacher.vae.config.scaling_factor + shift).sample
    torch.testing.assert_close(latents, own, rtol=1e-5, atol=1e-5 * float(own.abs().max()))
    pictures = found(PROMPTS, output_type="pt", **given).images
    torch.testing.assert_close(pictures, (decoded / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_symlink() or file.suffix in (".bin", ".pkl")]


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "PixArtSigmaPipeline"])
def test_prompts_are_as_long_as_those_of_the_data(name: str, tmp_path: Path) -> None:
    """Where these were encoded to fewer tokens than the teacher takes."""
    save_pipeline(tmp_path / "teacher", name)
    student = Pipeline(load_diffusers(tmp_path / "teacher", (4, 8, 8)))
    spec = TextSpec(name, (), 7, 7, 6, 0, "")
    student = Pipeline(student.flow_map, replace(student.config, text=spec))
    export_diffusers(student, tmp_path / "out", (1,), Parts(tmp_path / "teacher"))
    found = load_pipeline(tmp_path / "out", trust_remote_code=True)
    found.prepare()
    assert found.encode(["a three"], "cpu")["text"].shape == (1, 7, 6)


def test_guidance_of_classes_pushes_away_from_no_class(tmp_path: Path) -> None:
    """Also by the names of classes, for networks with a row for "no class" and without."""
    for kind in ("UNet2DModel", "DiTTransformer2DModel"):
        tiny = TINY[kind]
        save_foreign(tmp_path / kind, kind)
        student = trained(Pipeline(load_diffusers(tmp_path / kind, tiny.shape)))
        names = tuple(f"the {number}" for number in range(10))
        student = Pipeline(student.flow_map, type(student.config)(class_names=names))
        export_diffusers(student, tmp_path / f"{kind}-out", (1,))
        found = load_pipeline(tmp_path / f"{kind}-out", trust_remote_code=True)
        theirs = found(
            class_labels=["the 3", "the 7"], guidance_scale=2.0, num_inference_steps=1, output_type="latent",
            latents=noise(tiny.shape, 2),
        ).images  # fmt: skip
        own = student.generate(2, steps=1, labels=[3, 7], guidance_scale=2.0, clip=False).samples
        torch.testing.assert_close(theirs, own, rtol=1e-5, atol=1e-5 * float(own.abs().max()))
        with pytest.raises(ValueError, match="no class"):
            found(class_labels=["a cat"], num_inference_steps=1)


@pytest.mark.parametrize("kind", ["UNet2DModel", "FluxTransformer2DModel"])
def test_guidance_that_a_student_takes_costs_no_second_call(kind: str, tmp_path: Path) -> None:
    """Beside the second time, or where the network has an input for it."""
    tiny = TINY[kind]
    save_foreign(tmp_path / "teacher", kind)
    teacher = load_diffusers(tmp_path / "teacher", tiny.shape)
    assert teacher.config is not None
    made = replace(teacher.config, guided=True).build().eval()
    made.network.take(teacher.network, "the teacher")
    student = trained(Pipeline(made))
    export_diffusers(student, tmp_path / "out", (1,))
    found = load_pipeline(tmp_path / "out", trust_remote_code=True)
    calls: list[int] = []
    found.network.register_forward_hook(lambda *_: calls.append(1))
    cond, path = tiny.condition(2), made.path
    row = torch.tensor([[math.log(3.0), 0.0, 1.0]]).expand(2, 3)
    times = torch.tensor([path.t_max, path.t_min], dtype=torch.float64)
    with torch.no_grad():
        start, draws = path.prior(noise(tiny.shape, 2)), Draws(0, 0, torch.arange(2))
        own = map_sampler(made, start, times, replace(cond, guidance=row), draws)
    words = {"prompt_embeds": cond.text, "pooled_prompt_embeds": cond.pooled, "class_labels": cond.labels}
    words |= {"guidance_scale": 3.0, "num_inference_steps": 1, "latents": noise(tiny.shape, 2)}
    theirs = found(output_type="latent", **words).images
    torch.testing.assert_close(theirs, own, rtol=1e-5, atol=1e-5 * float(own.abs().max()))
    assert calls == [1]


def tiny_wan(folder: Path) -> Any:
    """A Wan pipeline with the time features of real ones, and an autoencoder of video."""
    import diffusers

    save_pipeline(folder, "WanPipeline")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {**TINY["WanTransformer3DModel"].settings, "freq_dim": 256}
        network = diffusers.WanTransformer3DModel(**settings)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        vae = diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0],
        )  # fmt: skip
    network.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderKLWan"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return vae


def test_a_student_of_wan_loads_plainly_and_draws_the_same(tmp_path: Path) -> None:
    """diffusers' own AnyFlow takes both times; no code goes along."""
    tiny_wan(tmp_path / "teacher")
    shape = (4, 2, 4, 4)
    student = trained(linear(load_diffusers(tmp_path / "teacher", shape)))
    export_diffusers(student, tmp_path / "out", (1, 2), Parts(tmp_path / "teacher"))
    assert loads_plainly(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.py"))
    found = load_pipeline(tmp_path / "out")
    assert type(found).__name__ == "AnyFlowPipeline"
    text, size = torch.randn(1, 5, 6), {"height": 32, "width": 32, "num_frames": 5}
    with torch.no_grad():
        start, times = noise(shape, 1), torch.linspace(1, 0, 3, dtype=torch.float64)
        own = map_sampler(
            student.flow_map, start, times, Condition(prompts=Prompts(text)), Draws(0, 0, torch.arange(1))
        )
    given = {"num_inference_steps": 2, "prompt_embeds": text, "latents": start, **size}
    theirs = found(output_type="latent", **given).frames
    torch.testing.assert_close(theirs, own, rtol=1e-5, atol=1e-5 * float(own.abs().max()))
    assert found("a three", num_inference_steps=2, output_type="np", **size).frames.shape == (1, 5, 32, 32, 3)


def test_what_a_pipeline_of_diffusers_does_with_latents(tmp_path: Path) -> None:
    """Scale and shift, or mean and deviation of each channel."""
    tiny_wan(tmp_path)
    save_pipeline(tmp_path / "images")
    assert teachers_latents("AutoencoderKL", tmp_path / "images" / "vae") == {"mean": [0.25], "std": [2.0]}
    own = teachers_latents("AutoencoderKLWan", tmp_path / "vae")
    assert own == {"mean": [0.1, 0.2, 0.3, 0.4], "std": [1.0, 2.0, 3.0, 4.0]}


def test_an_exported_folder_is_saved_again_whole(tmp_path: Path) -> None:
    """save_pretrained of diffusers keeps the sampler; the samples stay the same."""
    save_foreign(tmp_path / "teacher", "UNet2DModel")
    student = trained(Pipeline(load_diffusers(tmp_path / "teacher", (1, 8, 8))))
    export_diffusers(student, tmp_path / "out", (2,))
    found = load_pipeline(tmp_path / "out", trust_remote_code=True)
    drawn = found(batch_size=2, latents=noise((1, 8, 8), 2), output_type="np").images
    found.save_pretrained(tmp_path / "again")
    again = load_pipeline(tmp_path / "again", trust_remote_code=True)
    assert (again(batch_size=2, latents=noise((1, 8, 8), 2), output_type="np").images == drawn).all()


def test_parts_without_safetensors_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "teacher")
    student = Pipeline(load_diffusers(tmp_path / "teacher"))
    weights = tmp_path / "teacher" / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(CheckpointError, match=r"text_encoder has no weights in safetensors: .* --parts none$"):
        export_diffusers(student, tmp_path / "out", (1,), Parts(tmp_path / "teacher"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher"]
    export_diffusers(student, tmp_path / "out", (1,), Parts(tmp_path / "teacher", which="vae"))
    assert (tmp_path / "out" / "vae").is_dir()
    assert not (tmp_path / "out" / "text_encoder").exists()
