"""Sets that are compared are drawn alike, a figure says what it rests on, and nothing that failed ends as a success."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from fewstep.evaluation import evaluate
from fewstep.evaluation.figures import read_figures
from fewstep.sampling.generate import Generated
from fewstep.sampling.pipeline import Pipeline
from tests.support.commands import SMALL, Command, Finished
from tests.support.inputs import demonstrations, few_images, grey, sorted_classes, unequal_classes

SHORT = ("--training.batch-size", 32, "--training.images", 64, "--training.sample-images", 0)
UNGUIDED = ("--objective.guidance.omega", 1)


def rows_of(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["method"], row["nfe"]): row for row in read_figures(run)}


# Unequal classes


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Labels of whatever is drawn to be measured."""
    found: list[Tensor] = []
    usual = evaluate.generate

    def generate(pipeline: Pipeline, count: int, *others: Any, **named: Any) -> Generated:
        samples = usual(pipeline, count, *others, **named)
        if count > 16 and samples.labels is not None:  # one is drawn for its latency, 16 to see whether a run diverged
            found.append(samples.labels)
        return samples

    monkeypatch.setattr(evaluate, "generate", generate)
    return found


def test_unequal_classes_are_drawn_in_their_shares(command: Command, tmp_path: Path, drawn: list[Tensor]) -> None:
    """By the learning curve, `evaluate` and `tune-steps`: one of twenty is bright, as of the held-out images."""
    data = unequal_classes(tmp_path / "unequal.npz")
    curve = ("--evaluation.curve-images", 64, "--evaluation.curve-samples", 40)
    words = ("train", "digits", "--data.source", "npz", "--data.root", data, "--out", "run", *SMALL, *SHORT, *curve)
    few = ("--steps", 2, "--samples", 40)
    for each in (words, ("evaluate", "run", *few), ("tune-steps", "run", *few, "--evaluations", 4)):
        drawn.clear()
        assert command(*each).code == 0
        assert len(drawn) > 1
        assert {int(labels.sum()) for labels in drawn} <= {1, 2, 3}
    for each in (("evaluate", "run", *few), ("tune-steps", "run", *few, "--evaluations", 4)):
        drawn.clear()
        assert command(*each, "--classes", "uniform").code == 0
        assert {int(labels.sum()) for labels in drawn} == {20}
    assert {"iSD-T", "iSD-T, uniform classes"} < {method for method, _ in rows_of(tmp_path / "run")}


# What stands for a set, and what cannot be measured


def test_the_floor_is_drawn_over_all_classes(command: Command, tmp_path: Path) -> None:
    """Of a folder that is sorted by class, and of more images than are measured."""
    root = sorted_classes(tmp_path / "sorted", classes=6, count=40)
    words = ("train", "digits", "--data.source", "images", "--data.root", root, "--out", "run", *SMALL, *SHORT)
    assert command(*words).code == 0
    assert command("evaluate", "run", "--steps", 1, "--samples", 60).code == 0
    rows = rows_of(tmp_path / "run")
    assert rows["real data (training part)", 0]["samples"] == 60
    assert rows["real data (training part)", 0]["frechet"] < 10


def test_the_floor_has_the_classes_that_are_held_out(command: Command, tmp_path: Path) -> None:
    """Where the data bring their own split: the floor is drawn in its shares, as the model's samples are."""
    images, heldout = (np.concatenate([grey(60, count=n), grey(200, count=m)]) for n, m in ((60, 60), (40, 4)))
    labels = {"labels": np.repeat([0, 1], 60), "heldout_labels": np.repeat([0, 1], [40, 4])}
    np.savez(tmp_path / "own.npz", images=images, heldout_images=heldout, **labels)
    words = ("train", "digits", "--data.source", "npz", "--data.root", "own.npz", "--out", "run", *SMALL, *SHORT)
    assert command(*words).code == 0
    assert command("evaluate", "run", "--steps", 1, "--samples", 60).code == 0
    floor = rows_of(tmp_path / "run")["real data (training part)", 0]
    assert floor["samples"] == 60
    assert floor["frechet"] < 20


def advised(shown: Finished) -> list[list[str]]:
    """The words of the commands that a training ends with."""
    return [shlex.split(command)[1:] for command in shown.out.splitlines()[-1].removeprefix("Next: ").split("   ")]


@pytest.mark.parametrize(("count", "held"), [(2, 1), (5, 2)])
def test_too_few_images_are_named(count: int, held: int, command: Command, tmp_path: Path) -> None:
    """By the training too, which advises what works; no option is named that does not help."""
    file = few_images(tmp_path / "few.npz", count)
    words = ("train", "digits", "--data.source", "npz", "--data.root", file, *SMALL, *SHORT, *UNGUIDED)
    found = f"{held} sample" + "s" * (held != 1)
    line = f"the held-out part of few has {found}: measuring needs at least 4; of {count} in all no share serves"
    trained = command(*words, "--out", "a run")
    assert trained.code == 0
    assert f"Not to be measured: {line}, give at least 8" in trained.out
    assert [each[0] for each in advised(trained)] == ["sample", "report"]
    for each in advised(trained):
        assert command(*each).code == 0
    for refused in (command("evaluate", "a run"), command(*words, "--out", "b", "--evaluation.curve-images", 32)):
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert line in refused.err
        assert "--data.heldout" not in refused.err
    assert "or train without a learning curve, --evaluation.curve-images 0" in refused.err
    assert command(*words, "--out", "b", "--evaluation.curve-images", 0).code == 0


def test_the_share_that_is_named_can_be_measured(command: Command, tmp_path: Path) -> None:
    file = few_images(tmp_path / "few.npz", 9)
    words = ("train", "digits", "--data.source", "npz", "--data.root", file, *SMALL, *SHORT, *UNGUIDED)
    trained = command(*words, "--out", "run")
    assert "measuring needs at least 4; train anew with --data.heldout 0.5" in trained.out
    trained = command(*words, "--out", "again", "--data.heldout", 0.5, "--evaluation.steps", 1)
    assert "Not to be measured" not in trained.out
    assert [each[0] for each in advised(trained)] == ["sample", "evaluate", "report"]
    assert command(*advised(trained)[1], "--samples", 8).code == 0
    shown = command("tune-steps", "again", "--samples", 20)
    assert (shown.code, shown.err.count("\n")) == (2, 1)
    assert "needs at least 40; of 9 in all no share serves, give at least 80" in shown.err


def test_a_split_that_the_data_bring_is_not_to_be_changed_by_an_option(command: Command, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=images, heldout_images=images[:3])
    words = ("train", "digits", "--data.source", "npz", "--data.root", "own.npz", *SMALL, *SHORT, *UNGUIDED)
    trained = command(*words, "--out", "run")
    assert "the held-out part of own has 3 samples: measuring needs at least 4; give more samples of it" in trained.out


def test_what_a_figure_rests_on_is_said(command: Command, tmp_path: Path) -> None:
    """A class of which no image is held out is not drawn; a distance of few samples is biased."""
    file = unequal_classes(tmp_path / "rare.npz", dark=1, bright=200)
    words = ("train", "digits", "--data.source", "npz", "--data.root", file, "--data.heldout", 0.1, "--out", "run")
    assert command(*words, *SMALL, *SHORT).code == 0
    shown = command("evaluate", "run", "--steps", 1, "--samples", 8)
    assert shown.code == 0
    assert "Not measured, since no sample is held out: class 0." in shown.out
    assert "Few samples: at 8, and 20 held out" in shown.out
    assert "biased upwards" in shown.out


# Nothing that failed is a success


def test_a_diverged_run_is_no_success(archive: Path, command: Command) -> None:
    words = ("train", "digits", "--data.source", "npz", "--data.root", archive, "--out", "run", *SMALL, *SHORT)
    shown = command(*words, "--optimizer.lr", 100, "--optimizer.warmup-images", 0, "--training.images", 1600)
    assert (shown.code, shown.err.count("\n")) == (2, 1)
    assert "the training has diverged" in shown.err
    for words, code in ((("sample", "run", "--count", 4), 0), (("evaluate", "run", "--steps", 1), 2)):
        shown = command(*words)
        assert shown.code == code
        assert re.search(r"values up to .* while the data lie in \[-1, 1\], in \d+ of", shown.out)


def test_policies_are_measured_on_held_out_episodes(command: Command, tmp_path: Path) -> None:
    """Without a simulator; and a task that nobody knows is not advised to be acted in."""
    demos = demonstrations(tmp_path / "moves.npz")
    words = ("train", "policy-mlp", "--data.root", demos, "--out", "a run", *SMALL, "--training.images", 6400)
    trained = command(*words, "--training.batch-size", 64, "--training.checkpoint-images", 6400)
    assert trained.code == 0, trained.err
    assert "steps of the held-out episodes" in trained.out
    assert trained.out.splitlines()[-1] == "Next: fewstep evaluate 'a run'   fewstep report 'a run'"
    shown = command("evaluate", "a run", "--steps", 1)
    assert shown.code == 0
    method, calls, error, *each = shown.out.splitlines()[1].split()
    assert (method, calls, len(each)) == ("iSD", "1", 3)
    assert 0.1 < float(error) < 5
    assert command("sample", "a run").err.endswith("draws no images: fewstep evaluate 'a run'\n")


@pytest.mark.parametrize("task", ["nobody-knows-it", "pointmaze-ring"])
def test_a_rollout_is_advised_where_it_can_be_done(task: str, command: Command, tmp_path: Path) -> None:
    """Demonstrations may name a task that is not here, or be of other sizes than one that is."""
    demos = demonstrations(tmp_path / "moves.npz", task=np.array(task))
    words = ("train", "policy-mlp", "--data.root", demos, "--out", "run", *SMALL, "--training.images", 640)
    trained = command(*words, "--training.batch-size", 64)
    assert trained.code == 0, trained.err
    assert [each[0] for each in advised(trained)] == ["evaluate", "report"]
    for each in advised(trained):
        assert command(*each).code == 0
