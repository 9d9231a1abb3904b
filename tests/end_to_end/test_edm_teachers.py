"""A network pickle of EDM or EDM2 on the command line: distilled, sampled from; and one that means harm."""

import os
from pathlib import Path

import pytest

from fewstep.training import RunFolder
from tests.end_to_end.test_bad_input import assert_refused
from tests.support.commands import DISTILLED, FEW, Command, contents
from tests.support.edm_files import Runs, save_edm, write


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ddpmpp", ("--model.preconditioning", "euler", *FEW)),
        ("adm", ("--model.preconditioning", "analytic", *FEW, "--statistics.points", "8", "--statistics.samples", "8")),
        ("ncsnpp", ("--model.preconditioning", "linear", "--objective", "isd")),
        ("edm2", ("--model.preconditioning", "euler", "--objective", "isd")),
    ],
)
def test_a_student_is_trained_in_four_steps(
    kind: str, options: tuple[str, ...], tmp_path: Path, command: Command
) -> None:
    """By CTM and by the continuous objective; it samples, saved and loaded."""
    save_edm(tmp_path / "network.pkl", kind, channels=1, classes=10)
    run = tmp_path / "run"
    teacher = ("--teacher", str(tmp_path / "network.pkl"))
    done = command("train", "distil-diffusers", *teacher, *options, *DISTILLED, "--out", str(run))
    assert done.code == 0, done.err
    assert RunFolder(run).pipeline().generate(2, steps=1).samples.isfinite().all()
    assert command("sample", str(run), "--steps", "2", "--count", "4").code == 0


@pytest.mark.parametrize("harm", ["call", "truncated", "shape"])
def test_what_is_wrong_with_a_teacher_is_one_line(harm: str, tmp_path: Path, command: Command) -> None:
    """Exit code 2, the file named, nothing run and nothing written."""
    file = tmp_path / "network.pkl"
    save_edm(file, "ddpmpp", channels=2 if harm == "shape" else 1, classes=10)
    if harm == "call":
        write(file, {"ema": Runs(os.system, f"touch {tmp_path / 'mark'}")})
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:10_000])
    before = contents(tmp_path)
    shown = command("train", "distil-diffusers", "--teacher", str(file), *DISTILLED, "--out", str(tmp_path / "run"))
    message = {"call": "nothing in it was run", "truncated": "truncated", "shape": r"shape \(2, 8, 8\)"}[harm]
    assert_refused(shown, message)
    assert contents(tmp_path) == before
