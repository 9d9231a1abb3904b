"""The commands around a teacher and its student: statistics, train, evaluate, report."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fewstep.cli.main import main
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.recipes import recipe
from tests.support.commands import SMALL, STEPS, Command

QUICK = ("--points", "8", "--samples", "16")


@pytest.fixture(scope="module")
def teacher(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional denoiser of the archive; tests that change it take a copy."""
    root = tmp_path_factory.mktemp("teacher") / "run"
    assert main(["train", "edm-digits", "--data.source", "npz", "--data.root", str(archive), "--out", str(root),
                 *SMALL, *STEPS]) == 0  # fmt: skip
    return root


@pytest.fixture
def run(teacher: Path, tmp_path: Path) -> Path:
    """A copy of the teacher."""
    shutil.copytree(teacher, tmp_path / "teacher")
    return tmp_path / "teacher"


def train_student(command: Command, archive: Path, teacher: Path, *words: object) -> Path:
    shown = command(
        "train", "ctm-digits", "--data.source", "npz", "--data.root", archive, "--teacher", teacher, *SMALL, *STEPS,
        "--training.images", 64, "--statistics.points", 8, "--statistics.samples", 16, "--evaluation.curve-images", 64,
        "--evaluation.curve-samples", 16, *words,
    )  # fmt: skip
    assert shown.code == 0, shown.err
    return Path("runs/ctm-digits")


def test_statistics_are_estimated_once_kept_and_drawn(run: Path, command: Command) -> None:
    shown = command("statistics", run, *QUICK, "--cpu")
    assert shown.code == 0
    assert "statistics" in shown.err
    pattern = r"8 noise levels, 16 samples each: \S+ s = \S+ % of training ctm-digits \(2,000 steps of \S+ s\)"
    assert re.search(pattern, shown.out)
    assert "estimated now" in shown.out
    (file,) = (run / "statistics").glob("*.json")
    found = TrajectoryStatistics.load(file)
    assert (len(found.lam), found.samples) == (8, 16)
    with Image.open(file.with_suffix(".png")) as figure:
        assert figure.width > 1000
    assert f"Figure: {file.with_suffix('.png')}" in shown.out
    stored = file.read_bytes()
    again = command("statistics", run, *QUICK, "--student", "cd-digits", "--no-shrink", "--cpu")
    assert (again.code, again.err) == (0, "")
    assert "kept from an earlier estimate" in again.out
    assert "of training cd-digits (" in again.out
    assert file.read_bytes() == stored
    assert len(list((run / "statistics").iterdir())) == 2


def test_a_student_that_jumps_to_the_data_alone_is_measured_and_teaches_nobody(
    run: Path, archive: Path, command: Command
) -> None:
    data = ("--data.source", "npz", "--data.root", archive, *SMALL, *STEPS, "--evaluation.curve-images", 0)
    model = ("--model.preconditioning", "cm", "--model.scaling", "edm-input", "--training.images", 64)
    assert command("train", "cd-digits", *data, *model, "--teacher", run, "--initial", "", "--out", "cd").code == 0
    shown = command("evaluate", "cd")
    assert (shown.code, shown.err) == (0, "")
    jumps = json.loads(Path("cd/alignment.json").read_text())["jumps"]
    assert [[error is not None for error in row] for row in jumps["rmse"]] == [
        [start < end == len(jumps["times"]) - 1 for end in range(len(jumps["times"]))]
        for start in range(len(jumps["times"]))
    ]
    refused = command("train", "cd-digits", *data, "--teacher", "cd", "--out", "of-cd")
    assert refused.code == 2
    assert "the teacher cd has cm preconditioning, and so no velocity" in refused.err


def test_statistics_are_the_students_where_nothing_else_is_said(
    run: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = recipe("ctm-digits")
    own = replace(own, statistics=replace(own.statistics, points=9, samples=12))
    monkeypatch.setattr("fewstep.evaluation.align.student_recipe", lambda *_: own)
    shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("statistics"))
    shown = command("statistics", "copy", "--cpu")
    assert "9 noise levels, 12 samples each" in shown.out
    assert "8 noise levels, 12 samples each" in command("statistics", "copy", "--points", 8, "--cpu").out


def test_statistics_of_a_model_without_a_student(small_run: Path, tmp_path: Path, command: Command) -> None:
    shutil.copytree(small_run, tmp_path / "copy")
    shown = command("statistics", "copy", *QUICK, "--cpu")
    assert shown.code == 0
    assert re.search(r"16 samples each: \S+ s\n", shown.out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nowhere", r"nowhere is not a run"),
        ("RUN --student digits", r"'digits' distils no teacher; students: ctm-digits"),
        ("RUN --student ctm", r"no recipe 'ctm'"),
        ("RUN --points 3", r"points is 3; it must be finite and at least 4"),
        ("RUN --refresh-images 3", r"unknown option --refresh-images"),
    ],
)
def test_statistics_that_cannot_be_had(words: str, message: str, run: Path, command: Command) -> None:
    shown = command("statistics", *words.replace("RUN", str(run)).split())
    assert shown.code == 2
    assert len(shown.err.splitlines()) == 1
    assert re.search(message, shown.err)
    assert not (run / "statistics").exists()


def test_a_student_is_measured_beside_its_teacher(run: Path, archive: Path, command: Command, cache: Path) -> None:
    """Trained on a distance of features, without classes; measured with the labelled data's classifier."""
    student = train_student(command, archive, run, "--objective.distance.kind", "features")
    kept = {file.stem for file in cache.iterdir() if "halves-classifier" in file.stem}
    assert (student / "curve.jsonl").is_file()

    shown = command("evaluate", student)
    assert (shown.code, shown.err) == (0, "")
    rows = json.loads((student / "figures.json").read_text())
    assert len({row["extractor"] for row in rows}) == 1
    assert {row["extractor"] for row in rows} <= kept
    assert {row["accuracy"] for row in rows} == {None}
    assert "Alignment with edm-digits, RMS error per element over 66 samples" in shown.out
    stored = json.loads((student / "alignment.json").read_text())
    assert stored["jumps"]["times"] == pytest.approx([80, 12.9, 1.92, 0.585, 0.002], rel=0.01)
    assert [row["steps"] for row in stored["trajectories"]] == [1, 2, 4]
    assert [len(row["stops"]) for row in stored["trajectories"]] == [1, 2, 4]
    assert stored["jumps"]["method"] == rows[0]["method"]

    assert command("report", student).code == 0
    page = (student / "report.html").read_text()
    assert "Alignment with the teacher" in page
    assert "distilled from edm-digits" in page


def test_a_teacher_that_moved_is_asked_for(run: Path, small_run: Path, archive: Path, command: Command) -> None:
    """Labels of held-out samples go to both models where there are classes."""
    words = ("train", "edm-digits", "--data.source", "npz", "--data.root", archive, "--data.labels", *SMALL, *STEPS)
    assert command(*words, "--out", "labelled").code == 0
    student = train_student(command, archive, Path("labelled"), "--data.labels", "--evaluation.curve-images", 0)
    Path("labelled").rename("elsewhere")
    shown = command("evaluate", student)
    assert shown.code == 0
    assert f"give the run's teacher with --teacher: {Path('labelled').resolve()}: no such folder" in shown.out
    assert not (student / "alignment.json").exists()
    assert "Alignment with elsewhere" not in shown.out
    found = command("evaluate", student, "--teacher", "elsewhere")
    assert found.code == 0
    assert "Alignment with labelled, RMS error" in found.out

    other = command("evaluate", student, "--teacher", small_run)
    assert other.code == 2
    assert other.err.startswith(f"fewstep: {small_run} has other weights than the teacher of")
    (student / "alignment.json").write_text("[]")
    damaged = command("report", student)
    assert damaged.code == 2
    assert "alignment.json is damaged" in damaged.err
