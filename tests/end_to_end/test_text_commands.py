"""From captioned pictures and a pipeline of text to a student that draws what prompts say; and what goes wrong."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fewstep
from fewstep.cli.main import main
from fewstep.data.base import Dataset
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.evaluation import tune_steps
from fewstep.evaluation.align import guided_teacher
from fewstep.evaluation.evaluate import build_evaluator, measure_run
from fewstep.evaluation.metrics.measure import Evaluator
from fewstep.flow.guidance import ClassifierFreeGuidance, FixedGuidance
from fewstep.recipes.config import EvaluationConfig, TrainingConfig
from fewstep.sampling.pipeline import Pipeline
from fewstep.training import RunFolder
from fewstep.training.loader import Loader, Shares
from fewstep.training.setup import check_context
from fewstep.utils.errors import ConfigError, FewstepWarning
from tests.end_to_end.test_bad_input import assert_refused
from tests.support.commands import Command, contents
from tests.support.text import save_captioned_digits, save_pipeline

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

ENCODE = ("--image-size", 16, "--shard-size", 10, "--heldout", 0.25, "--batch-size", 8, "--cpu", "--quiet")
TRAIN = (
    "--data.source", "latents", "--training.batch-size", 8, "--training.images", 16, "--training.checkpoint-images", 8,
    "--training.sample-images", 16, "--evaluation.samples", 6, "--evaluation.steps", 1, 2,
    "--evaluation.curve-images", 0, "--evaluation.reference-steps", 2, "--objective.label-dropout", 0.5,
    "--runtime.cpu", "--runtime.quiet", "--runtime.threads", 1,
)  # fmt: skip


def words(*parts: object) -> list[str]:
    return [str(part) for part in parts]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, captioned digits, their latents and a student; tests that change them take copies."""
    root = tmp_path_factory.mktemp("studio")
    save_pipeline(root / "sd")
    save_captioned_digits(root / "digits")
    assert main(words("encode", root / "digits", "--teacher", root / "sd", "--out", root / "latents", *ENCODE)) == 0
    where = words("--teacher", root / "sd", "--data.root", root / "latents", "--out", root / "run")
    assert main(["train", "distil-diffusers", *where, *words(*TRAIN)]) == 0
    return root


@pytest.fixture(scope="module")
def dataset(studio: Path) -> Dataset:
    return load_dataset(DataConfig("latents", str(studio / "latents")))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pipeline(studio: Path) -> Pipeline:
    return fewstep.load(studio / "run")


def test_latents_are_in_the_pipelines_units_and_their_deviation_is_measured(studio: Path, dataset: Dataset) -> None:
    """x = (z - shift) factor, with what is stored as z; sigma_data is the training part's own."""
    (file, *_) = sorted((studio / "latents").glob("latents-*.safetensors"))
    stored = load_file(file)["latents"].float()
    rows = torch.arange(len(dataset.train))
    assert any(torch.allclose(dataset.train.fetch(rows)[0][0], 0.5 * (z - 0.25)) for z in stored)
    values = dataset.train.fetch(rows)[0].double()
    assert dataset.mean == pytest.approx(float(values.mean()), abs=1e-6)
    assert dataset.sigma_data == pytest.approx(float(values.std(correction=0)), rel=1e-6)


def test_every_sample_comes_with_its_own_caption(dataset: Dataset, pipeline: Pipeline) -> None:
    """Embedded as the pipeline embeds it, in half precision; the empty prompt is the null condition."""
    rows = torch.tensor([3, 0])
    captions, (_, cond) = dataset.train.captions(rows), dataset.train.conditioned(rows)
    expected = pipeline.encode_prompts(captions)
    assert cond.text is not None
    torch.testing.assert_close(cond.text, expected.text, rtol=1e-3, atol=1e-3)
    null, empty = cond.unconditional().text, pipeline.encode_prompts([""]).text
    assert null is not None
    torch.testing.assert_close(null, empty.expand_as(null), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_latents_and_their_prompts_come_from_processes_as_without(dataset: Dataset, context: str) -> None:
    """From the middle of an epoch on, and over its end; what is sent to a process does not hold the shards."""
    dataset.train.fetch(torch.arange(len(dataset.train)))
    assert len(pickle.dumps(dataset.train)) < 20_000
    shares = Shares(dataset.train, TrainingConfig(batch_size=8), 0, 4, 2)
    plain, ahead = Loader(shares, torch.device("cpu")), Loader(shares, torch.device("cpu"), 2, context)
    for step, part in ((1, 1), (2, 0), (2, 1), (3, 0)):
        own, other = plain.batch(step, part), ahead.batch(step, part)
        assert torch.equal(own.x0, other.x0)
        for key in ("text", "mask", "pooled"):
            one, two = (getattr(each.prompts, key) for each in (own, other))
            assert (one is None and two is None) or torch.equal(one, two)
        assert own.prompts is not None
        assert torch.equal(own.prompts.null.text, other.prompts.null.text)  # type: ignore[union-attr]
    ahead.close()


def test_prompts_decide_what_is_drawn(pipeline: Pipeline) -> None:
    """In words or embedded they give the same; guidance from the empty prompt at strength 1 changes nothing."""
    settings: dict[str, Any] = {"steps": 1, "seed": 3}
    one = pipeline.generate(2, prompts=["a three"], **settings).samples
    again = pipeline.generate(2, prompts=pipeline.encode_prompts(["a three"]), **settings).samples
    other = pipeline.generate(2, prompts=["a seven"], **settings).samples
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)
    guided = pipeline.generate(2, prompts=["a three"], guidance_scale=2.0, **settings)
    assert guided.nfe == 2
    assert not torch.allclose(guided.samples, one)


def test_a_student_with_guidance_distilled_in_is_compared_with_the_guided_teacher(
    studio: Path, dataset: Dataset
) -> None:
    """v_null + omega (v - v_null) of the held-out prompts, as guidance at sampling has it."""
    config = RunFolder(studio / "run").config()
    fixed = replace(config, objective=replace(config.objective, guidance=FixedGuidance(50.0)))  # type: ignore[call-arg]
    teacher = fewstep.load_teacher(studio / "sd").double()
    x, cond = dataset.heldout.conditioned(torch.arange(3))
    t = torch.full((3,), 0.5 * teacher.path.t_max, dtype=torch.float64)
    x = x.double()
    v = ClassifierFreeGuidance(teacher, 50.0).velocity(x, t, cond)
    found = guided_teacher(fixed, teacher).denoise(x, t, cond)
    torch.testing.assert_close(found, teacher.path.denoised_from_velocity(x, v, t), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, teacher.denoise(x, t, cond), rtol=0, atol=1e-6)
    assert guided_teacher(config, teacher) is teacher


def test_data_without_prompts_for_a_network_of_text_is_said(studio: Path, dataset: Dataset, pipeline: Pipeline) -> None:
    """In one line with what to do, guidance or not; data with prompts and networks of none are silent."""
    config, without = RunFolder(studio / "run").config(), replace(dataset, text=None)
    guided = replace(config, objective=replace(config.objective, guidance=FixedGuidance(2.0)))  # type: ignore[call-arg]
    check_context(config, dataset, pipeline.flow_map)
    for each in (config, guided):
        with pytest.warns(
            FewstepWarning, match=rf"no prompts.*fewstep encode FOLDER --teacher {studio / 'sd'}"
        ) as said:
            check_context(each, without, pipeline.flow_map)
        assert len(said) == 1
    left_out = replace(config, data=replace(config.data, prompts=False))
    with pytest.warns(FewstepWarning, match="leave out --data.no-prompts"):
        check_context(left_out, without, pipeline.flow_map)


def test_prompts_of_an_archive_are_not_left_out_unsaid(studio: Path, tmp_path: Path, command: Command) -> None:
    """Nothing says which encoders made them; a network of no text does not miss them."""
    values = np.random.default_rng(0).standard_normal((8, 4, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "some.npz", images=values, text=np.zeros((8, 16, 6), np.float32))
    where = words("--data.source", "npz", "--data.root", tmp_path / "some.npz", "--out", tmp_path / "run", *TRAIN[2:])
    shown = command("train", "distil-diffusers", "--teacher", studio / "sd", *where)
    assert_refused(shown, r"some has array text, .*fewstep encode.*--data\.no-prompts")
    assert not (tmp_path / "run").exists()


def test_pictures_in_place_of_latents_are_refused_with_what_to_do(studio: Path) -> None:
    with pytest.raises(ConfigError, match=r"4 channels.*\(1, 8, 8\).*give it latents, as fewstep encode"):
        fewstep.load_teacher(studio / "sd", (1, 8, 8))


def test_drawn_guidance_of_a_teacher_is_an_input_of_its_student(studio: Path, tmp_path: Path, command: Command) -> None:
    """So that a strength costs no second call."""
    where = words("--teacher", studio / "sd", "--data.root", studio / "latents", "--out", tmp_path / "run")
    done = command("train", "distil-diffusers", *where, *words(*TRAIN), "--objective.guidance", "drawn")
    assert done.code == 0, done.err
    found = fewstep.load(tmp_path / "run")
    assert found.flow_map.guided
    assert found.generate(2, steps=1, guidance_scale=3.0).nfe == 1


def test_a_saved_model_keeps_captions_and_their_prompts(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save(tmp_path)
    found = fewstep.load(tmp_path)
    assert found.config.captions == pipeline.config.captions
    assert len(found.config.captions) == 6
    assert torch.equal(found.generate(3, steps=1).samples, pipeline.generate(3, steps=1).samples)


def test_samples_of_the_held_out_prompts_are_measured(studio: Path, dataset: Dataset) -> None:
    evaluator = build_evaluator(dataset, None)
    rows = measure_run(RunFolder(studio / "run"), evaluator, EvaluationConfig(samples=6, steps=(1,), reference_steps=2))
    assert rows[0]["samples"] == 6
    assert rows[0]["frechet"] >= 0
    assert evaluator.prompts is not None
    assert len(evaluator.prompts) == 6


def test_steps_of_a_student_of_text_are_tuned(
    studio: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On samples of the held-out prompts, as they are measured."""
    shutil.copytree(studio / "run", tmp_path / "run")
    monkeypatch.setattr(tune_steps, "LEAST", 6)
    monkeypatch.setattr(tune_steps, "_SMALLEST_HALF", 3)
    asked, defaults = Evaluator.asked, []
    given = words("tune-steps", tmp_path / "run", "--samples", 6, "--evaluations", 4, "--steps", 2, "--cpu")
    for change in ({}, {"prompts": None}):
        monkeypatch.setattr(Evaluator, "asked", lambda *given, to=change: replace(asked(*given), **to))
        found = command(*given)
        assert found.code == 0, found.err
        (tuned,) = json.loads((tmp_path / "run" / "step_times.json").read_text())["found"]
        defaults.append(tuned["figures"]["search"]["default"])
    assert defaults[0] != defaults[1]


def test_a_stopped_encoding_goes_on_to_the_same_files(studio: Path, tmp_path: Path, command: Command) -> None:
    shutil.copytree(studio / "latents", tmp_path / "latents")
    before = contents(tmp_path / "latents")
    for name in ("latents-00001.safetensors", "latents.json"):
        (tmp_path / "latents" / name).unlink()
    again = command("encode", studio / "digits", "--teacher", studio / "sd", "--out", tmp_path / "latents", *ENCODE)
    assert again.code == 0, again.err
    assert contents(tmp_path / "latents") == before


def test_files_are_named_by_their_prompts(studio: Path, tmp_path: Path, command: Command) -> None:
    drawn = command(
        "sample", studio / "run", "--prompt", "a three", "--count", 2, "--steps", 1, "--out", tmp_path / "o"
    )
    assert drawn.code == 0, drawn.err
    assert {file.name for file in (tmp_path / "o").glob("*.png")} == {"000000-a_three.png", "000001-a_three.png"}
    embedded = studio / "run" / "checkpoints" / "step-00000002" / "prompts.safetensors"
    drawn = command("sample", studio / "run", "--prompts", embedded, "--count", 2, "--out", tmp_path / "grid.png")
    assert drawn.code == 0, drawn.err


def lines(file: Path, **captions: str) -> None:
    rows = [{"file_name": name.replace("_", ".", 1), "text": text} for name, text in captions.items()]
    file.write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "001.txt").unlink(), r"has no caption of 001\.png"),
        (lambda folder: (folder / "001.png").unlink(), r"captions without image for 001\.txt"),
        (lambda folder: (folder / "001.txt").write_text(" \n"), r"captions without a word for 001\.png"),
        (lambda folder: (folder / "001.txt").write_bytes(b"\xff\xfe\xff"), r"001\.txt' cannot be read"),
        (lambda folder: lines(folder / "metadata.jsonl", a_png="a one"), "has no caption of 000"),
        (lambda folder: (folder / "captions.jsonl").write_text("{}"), r"captions\.jsonl', line 1: give an object"),
        (lambda folder: [(folder / f"{n}.jsonl").touch() for n in ("metadata", "captions")], "say which"),
    ],
)
def test_what_is_wrong_with_captions_is_one_line(
    change: Callable[[Path], Any], message: str, studio: Path, tmp_path: Path, command: Command
) -> None:
    """Exit code 2, the image named, nothing written."""
    shutil.copytree(studio / "digits", tmp_path / "digits")
    change(tmp_path / "digits")
    before = contents(tmp_path)
    shown = command("encode", tmp_path / "digits", "--teacher", studio / "sd", "--out", tmp_path / "out", *ENCODE)
    assert_refused(shown, message)
    assert contents(tmp_path) == before


def test_captions_of_one_file_are_those_beside_the_images(studio: Path, tmp_path: Path, command: Command) -> None:
    """metadata.jsonl, as Hugging Face's imagefolder has it, gives the same latents and prompts."""
    shutil.copytree(studio / "digits", tmp_path / "digits")
    texts = sorted((tmp_path / "digits").glob("*.txt"))
    lines(tmp_path / "digits" / "metadata.jsonl", **{f"{file.stem}_png": file.read_text() for file in texts})
    for file in texts:
        file.unlink()
    out = tmp_path / "out"
    shown = command("encode", tmp_path / "digits", "--teacher", studio / "sd", "--out", out, *ENCODE)
    assert shown.code == 0, shown.err
    assert contents(out).keys() == contents(studio / "latents").keys()
    for file in sorted(out.glob("*.safetensors")):
        assert file.read_bytes() == (studio / "latents" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        ("distil-diffusers", {"width": 8}, "prompts 8 wide and no pooled"),
        ("edm-digits", {}, "does not take: add --data.no-prompts"),
    ],
)
def test_prompts_that_do_not_fit_the_network_are_refused(
    recipe: str, change: dict[str, int], message: str, studio: Path, tmp_path: Path, command: Command
) -> None:
    options = ["--data.root", studio / "latents", *TRAIN[:2], "--runtime.cpu", "--out", tmp_path / "run"]
    if change:
        shutil.copytree(studio / "sd", tmp_path / "sd")
        shutil.rmtree(tmp_path / "sd" / "unet")
        save_pipeline(tmp_path / "other", cross_attention_dim=8)
        shutil.copytree(tmp_path / "other" / "unet", tmp_path / "sd" / "unet")
        options += ["--teacher", tmp_path / "sd"]
    shown = command("train", recipe, *options)
    assert_refused(shown, message)
    assert not (tmp_path / "run").exists()


def test_other_text_encoders_are_refused(studio: Path, tmp_path: Path, command: Command) -> None:
    save_pipeline(tmp_path / "other", seed=1)
    shown = command("sample", studio / "run", "--prompt", "a one", "--text-encoders", tmp_path / "other", "--cpu")
    assert_refused(shown, "other text encoders")
    shown = command("sample", studio / "run", "--prompt", "a one", "--text-encoders", tmp_path / "no", "--cpu")
    assert_refused(shown, r"no has no model_index\.json.*--text-encoders")
