"""A teacher of diffusers on the command line: distilled, resumed, measured, exported; and what is wrong with one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.training import RunFolder
from tests.end_to_end.test_bad_input import assert_refused
from tests.support.commands import DISTILLED, FEW, Command, contents
from tests.support.foreign import save_foreign

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("teacher")
    save_foreign(folder, "UNet2DModel")
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ("--model.preconditioning", "euler", *FEW),
        ("--model.preconditioning", "analytic", *FEW, "--statistics.points", "8", "--statistics.samples", "8"),
        ("--model.preconditioning", "linear", "--objective", "isd"),
        ("--network.lora", "2", *FEW),
    ],
    ids=["ctm-euler", "ctm-analytic", "isd", "ctm-lora"],
)
def test_a_student_is_trained_in_four_steps_measured_and_exported(
    options: tuple[str, ...], teacher: Path, tmp_path: Path, command: Command
) -> None:
    """Its first weights are the teacher's; it is exported to a folder that diffusers samples from."""
    import diffusers

    run = tmp_path / "run"
    done = command("train", "distil-diffusers", "--teacher", str(teacher), *options, *DISTILLED, "--out", str(run))
    assert done.code == 0, done.err
    pipeline = RunFolder(run).pipeline()
    assert pipeline.generate(2, steps=1).samples.isfinite().all()
    assert command("sample", str(run), "--steps", "2", "--count", "4").code == 0
    assert command("export", str(run), "--to", "diffusers", "--out", str(tmp_path / "out")).code == 0
    found = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert len(found(batch_size=2, num_inference_steps=2).images) == 2


def spoil(name: str, change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: change(folder / name)


def settings(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def to_pickle(file: Path) -> None:
    file.unlink()
    torch.save({"weights": print}, file.with_suffix(".bin"))


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            spoil("unet/config.json", lambda file: settings(file, _class_name="VQModel")),
            "'VQModel' are not known",
        ),
        (spoil("unet/config.json", lambda file: file.write_text("{")), r"config\.json"),
        (spoil("unet/config.json", lambda file: settings(file, block_out_channels=[8, 32])), "do not fit|refuses"),
        (spoil("unet/config.json", lambda file: settings(file, down_block_types=["Evil"])), "refuses its settings"),
        (spoil("unet/config.json", lambda file: settings(file, in_channels=3)), "does not fit samples"),
        (spoil("unet/config.json", lambda file: settings(file, num_class_embeds=None)), "do not fit"),
        (spoil("scheduler/scheduler_config.json", lambda file: file.unlink()), "has no scheduler"),
        (
            spoil("scheduler/scheduler_config.json", lambda file: settings(file, prediction_type="score")),
            "prediction_type 'score' is not known",
        ),
        (
            spoil("scheduler/scheduler_config.json", lambda file: settings(file, beta_schedule="odd")),
            "beta_schedule 'odd' is not known",
        ),
        (spoil(WEIGHTS, truncate), "truncated or not a safetensors file"),
        (spoil(WEIGHTS, lambda file: file.unlink()), "has no weights"),
        (spoil(WEIGHTS, to_pickle), "no pickle of tensors alone"),
    ],
)
def test_what_is_wrong_with_a_teacher_is_one_line(
    change: Callable[[Path], Any], message: str, tmp_path: Path, command: Command
) -> None:
    """Exit code 2, the file named, nothing written."""
    save_foreign(tmp_path / "teacher", "UNet2DModel")
    change(tmp_path / "teacher")
    before = contents(tmp_path)
    out = tmp_path / "run"
    shown = command("train", "distil-diffusers", "--teacher", str(tmp_path / "teacher"), *DISTILLED, "--out", str(out))
    assert_refused(shown, message)
    assert contents(tmp_path) == before


def test_a_recipe_without_its_teacher_asks_for_one(tmp_path: Path, command: Command) -> None:
    """The path, the scaling and the network are the teacher's."""
    shown = command("train", "distil-diffusers", *DISTILLED, "--out", str(tmp_path / "run"))
    assert_refused(shown, "name its run with --teacher")


def test_a_teacher_of_other_samples_than_the_datas_is_refused(teacher: Path, tmp_path: Path, command: Command) -> None:
    """Shape and classes are said of both."""
    shown = command(
        "train", "distil-diffusers", "--teacher", teacher, "--data.no-labels", *DISTILLED, "--out", tmp_path / "run"
    )
    assert_refused(shown, r"makes samples of shape \(1, 8, 8\) in 10 classes, but the data digits .* 0 classes")


def test_a_teacher_that_is_nowhere_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """A name of the Hub, whose cache is empty and which is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    words = ("train", "distil-diffusers", "--teacher", "owner/name", *DISTILLED, "--out", str(tmp_path / "run"))
    assert_refused(command(*words), "fewstep: owner/name .* out of reach: .*: hf download owner/name$")
    assert contents(tmp_path) == {}
