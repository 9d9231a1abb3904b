"""Training from a teacher's own samples: no data, a set drawn once, a draw that goes on, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.data.base import Dataset
from fewstep.data.generated import DrawSettings, load_set, read_set
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.flow.flow_map import FlowMap
from fewstep.sampling.generate import SamplingSettings, generate
from fewstep.teachers.text import load_text_encoders
from fewstep.training import RunFolder, teacher_samples, train_run
from fewstep.training.teacher_samples import classes_of
from fewstep.utils.errors import ConfigError
from tests.end_to_end.test_bad_input import assert_refused
from tests.support.commands import DISTILLED, SMALL, Command, contents
from tests.support.foreign import save_foreign
from tests.support.text import save_pipeline
from tests.support.tiny import RUNTIME, TEACHER

QUICK = (*DISTILLED, *SMALL[:6], "--optimizer.lr", "1e-3")
SOURCE = ("--data.source", "teacher-samples", "--data.source.draw.count", "96", "--data.source.draw.steps", "3")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps that knows its classes."""
    folder: Path = tmp_path_factory.mktemp("teacher") / "digits-teacher"
    train_run(TEACHER, load_dataset(DataConfig()), RunFolder(folder), RUNTIME)
    return folder


def words(teacher: Path, run: Path, objective: str, *more: object) -> list[str]:
    """A student of that teacher without data."""
    model = ("--model.path", "edm", "--model.preconditioning", "euler", "--model.scaling", "edm")
    given = ("emd-flow-matching", *model, "--teacher", teacher, *SOURCE, "--objective", objective, *QUICK, *more)
    return ["train", *map(str, given), "--out", str(run)]


@pytest.mark.parametrize("objective", ["cd", "ctm", "emd"])
def test_a_student_of_any_objective_needs_no_data(
    objective: str, teacher: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains, goes on where its samples lie, and is measured against held-out samples of its teacher."""
    run = tmp_path / "run"
    done = command(*words(teacher, run, objective))
    assert done.code == 0, done.err
    assert "samples of digits-teacher: 96 images of 1x8x8 in 10 classes" in done.out
    stored = contents(run / "teacher-samples")
    assert set(stored) == {"samples.json", "samples-00000.safetensors", ".lock"}
    monkeypatch.setattr(teacher_samples, "draw", None)  # nothing is drawn twice
    again = command("train", "--resume", str(run))
    assert again.code == 0, again.err
    if objective == "emd":
        shutil.move(run, tmp_path / "moved")
        shown = command("evaluate", str(tmp_path / "moved"))
        assert shown.code == 0, shown.err
        assert "to samples of digits-teacher held out (" in shown.out


def test_the_set_is_the_teachers_and_split_evenly(teacher: Path, tmp_path: Path, command: Command) -> None:
    """Sample k is sample k of the seed, by that solver, cut to the data's range; every class is held out."""
    folder = tmp_path / "drawn"
    assert command(*words(teacher, tmp_path / "run", "emd", "--data.root", folder)).code == 0
    loaded, latents = load_set(str(folder))
    assert latents is None
    pipeline = RunFolder(teacher).pipeline()
    drawn = pipeline.generate(96, sampler="heun", steps=3, seed=0).samples.clamp(-1, 1)
    torch.testing.assert_close(loaded.train.values, drawn)
    data: Dataset = load_dataset(DataConfig("teacher-samples", root=str(folder)))  # type: ignore[arg-type]
    assert data.data_range == (-1.0, 1.0)
    assert data.heldout.labels is not None
    assert set(data.heldout.labels.tolist()) == set(range(10))
    assert not (tmp_path / "run" / "teacher-samples").exists()
    shared = command(*words(teacher, tmp_path / "other", "lmd", "--data.root", folder))
    assert shared.code == 0, shared.err


def test_a_stopped_draw_goes_on(
    teacher: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole shards are kept, and the set is to the last bit that of a draw without a stop."""
    monkeypatch.setattr(teacher_samples, "SHARD", 32)
    first, second = tmp_path / "first", tmp_path / "second"
    assert command(*words(teacher, tmp_path / "a", "emd", "--data.root", first)).code == 0
    drawn: list[int] = []
    real = teacher_samples.draw

    def draw(own: FlowMap, wanted: Any, start: int, *more: Any) -> Any:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(start)
        return real(own, wanted, start, *more)

    monkeypatch.setattr(teacher_samples, "draw", draw)
    assert command(*words(teacher, tmp_path / "b", "emd", "--data.root", second)).code == 130
    assert not (second / "samples.json").exists()
    drawn[:] = [-1]
    done = command(*words(teacher, tmp_path / "b", "emd", "--data.root", second))
    assert done.code == 0, done.err
    assert drawn == [-1, 64]
    assert contents(first) == contents(second)


def test_what_does_not_fit_is_one_line(teacher: Path, tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "drawn"
    assert command(*words(teacher, tmp_path / "run", "emd", "--data.root", folder)).code == 0
    before = contents(tmp_path)
    out = tmp_path / "new"
    cases = {
        "the teacher cannot be read": words(tmp_path / "nowhere", out, "emd"),
        "name it with --teacher": words(Path(), out, "emd", "--teacher="),
        "10 shares|2 shares for 10 classes": words(teacher, out, "emd", "--data.source.draw.shares", "1", "2"),
        "count is 1": words(teacher, out, "emd", "--data.source.draw.count", "1"),
        r"holds other samples \(another settings\)": words(
            teacher, out, "emd", "--data.root", folder, "--data.source.draw.steps", "4"
        ),
        "holds a run on other data": words(teacher, tmp_path / "run", "emd", "--data.source.draw.count", "50"),
    }
    for message, given in cases.items():
        assert_refused(command(*given), message)
        assert contents(tmp_path) == before, message
    (folder / "samples-00000.safetensors").write_bytes(b"none")
    assert_refused(command("evaluate", str(tmp_path / "run")), "missing or damaged")
    (folder / "samples.json").write_text(json.dumps({"shards": 1}))
    assert_refused(command("evaluate", str(tmp_path / "run")), r"samples\.json")
    shutil.rmtree(folder)
    assert_refused(command("evaluate", str(tmp_path / "run")), "holds no whole set of a teacher's samples")


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of text, and a list of prompts."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    root: Path = tmp_path_factory.mktemp("painter")
    save_pipeline(root / "sd")
    (root / "prompts.txt").write_text("a three\n\n  a seven \na three\n")
    return root


def prompted(painter: Path, run: Path, *more: object) -> list[str]:
    """A student of that pipeline without data."""
    given = ("distil-diffusers", "--teacher", painter / "sd", *SOURCE[:2], "--data.source.draw.count", 12)
    listed = ("--data.source.draw.prompts", painter / "prompts.txt", "--data.source.draw.steps", 2)
    length = ("--training.batch-size", 4, "--training.images", 8, "--training.sample-images", 8, *DISTILLED[-4:])
    small = ("--evaluation.samples", 4, "--evaluation.steps", 1, "--evaluation.curve-images", 0)
    return ["train", *map(str, (*given, *listed, *length, *small, *more, "--out", run))]


def test_a_teacher_of_text_draws_what_a_list_says(painter: Path, tmp_path: Path, command: Command) -> None:
    """Sample k is of prompt k mod n; the student hears prompts, and goes on where the list is gone."""
    shutil.copytree(painter, tmp_path / "own")
    own, run = tmp_path / "own", tmp_path / "run"
    done = command(*prompted(own, run))
    assert done.code == 0, done.err
    assert "samples of sd: 12 latents of 4x8x8, 4 of them held out; with prompts of 16 x 6" in done.out
    made = read_set(run / "teacher-samples")
    assert made is not None
    assert sorted(made.captions) == ["a seven", "a three", "a three"]
    loaded, latents = load_set(str(run / "teacher-samples"))
    assert latents is not None
    assert latents.image_shape == (1, 16, 16)
    encoders = load_text_encoders(own / "sd", torch.device("cpu"))
    settings = SamplingSettings(sampler="heun", steps=2, seed=0, clip=False)
    drawn = generate(fewstep.load_teacher(own / "sd"), 12, settings, prompts=encoders.encode(made.captions)).samples
    torch.testing.assert_close(loaded.train.values, drawn, rtol=1e-2, atol=1e-2)  # embeddings lie in half precision
    data = load_dataset(replace(RunFolder(run).config().data, root=str(run / "teacher-samples")))
    rows = torch.arange(len(data.heldout))
    found = data.heldout.context(rows).prompts
    assert found is not None
    torch.testing.assert_close(found.text, encoders.encode(data.heldout.captions(rows)).text, rtol=1e-3, atol=1e-3)
    (own / "prompts.txt").unlink()
    again = command(*prompted(own, run))
    assert again.code == 0, again.err
    shown = command("sample", run, "--prompt", "a three", "--count", 1, "--steps", 1, "--out", tmp_path / "a.png")
    assert shown.code == 0, shown.err


def test_what_is_wrong_with_prompts_is_one_line(painter: Path, teacher: Path, tmp_path: Path, command: Command) -> None:
    """Before anything is drawn or written."""
    save_foreign(tmp_path / "bare", "UNet2DConditionModel")
    (tmp_path / "none.txt").write_text(" \n")
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe\xff")
    out, option = tmp_path / "run", "--data.source.draw.prompts"
    before = contents(tmp_path)
    cases = {
        r"takes prompts.*--data\.source\.draw\.prompts FILE\.txt.*fewstep encode": prompted(painter, out, option, ""),
        "has no prompt": prompted(painter, out, option, tmp_path / "none.txt"),
        r"odd\.txt' cannot be read as UTF-8": prompted(painter, out, option, tmp_path / "odd.txt"),
        r"gone\.txt' cannot be read": prompted(painter, out, option, tmp_path / "gone.txt"),
        "has no text encoders": prompted(painter, out, "--teacher", tmp_path / "bare"),
        "takes no prompts": words(teacher, out, "emd", option, painter / "prompts.txt"),
        "has no latents.json": prompted(painter, out, option, painter / "sd"),
    }
    for message, given in cases.items():
        assert_refused(command(*given), message)
        assert contents(tmp_path) == before, message


def test_shares_of_classes_are_those_asked_for() -> None:
    settings = DrawSettings(shares=(1.0, 0.0, 3.0))
    found = torch.bincount(classes_of(settings, 0, 0, 4000), minlength=3).double() / 4000
    assert abs(float(found[0]) - 0.25) < 0.03
    assert float(found[1]) == 0.0
    assert torch.equal(classes_of(settings, 0, 10, 5), classes_of(settings, 0, 0, 15)[10:])
    with pytest.raises(ConfigError, match="shares of classes"):
        DrawSettings(shares=(0.0, 0.0))
