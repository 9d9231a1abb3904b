"""`fewstep export` on the command line: what it writes runs, and what it cannot write is one line."""

from pathlib import Path

import pytest

from fewstep.training import RunFolder
from tests.end_to_end.test_bad_input import assert_refused
from tests.export.test_cards import executed
from tests.support.commands import DISTILLED, Command
from tests.support.foreign import save_foreign


def test_a_run_becomes_a_program_with_its_card(
    small_run: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card has the run's recipe and digest, and its Python draws."""
    shown = command("export", small_run, "--to", "torch", "--steps", "1", "--out", tmp_path / "out")
    assert shown.code == 0, shown.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "fewstep.json", "jump.pt2", "sampler-1.pt2",
    }  # fmt: skip
    assert executed(tmp_path / "out", monkeypatch)["samples"].shape == (4, 1, 8, 8)
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"| digest of its settings | {RunFolder(small_run).provenance().settings} |" in text


def test_what_cannot_be_exported_is_one_line(small_run: Path, tmp_path: Path, command: Command) -> None:
    """Another network to diffusers; a folder with something in it; a run that is none. Nothing is written."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    cases = {
        (
            small_run,
            "--to",
            "diffusers",
            "--out",
            tmp_path / "out",
        ): "like this MLP: .* --to onnx or --to torch",
        (small_run, "--to", "torch", "--out", tmp_path / "full"): "has something in it",
        (tmp_path / "none", "--to", "torch"): "none: no such folder",
        (small_run, "--to", "torch", "--steps", "0", "--out", tmp_path / "out"): "0 steps asked for",
    }
    for words, message in cases.items():
        assert_refused(command("export", *words), message)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_teacher_that_was_moved_is_named(tmp_path: Path, command: Command) -> None:
    """What goes along of it is found with --teacher, or left out with --parts."""
    pytest.importorskip("diffusers")
    save_foreign(tmp_path / "teacher", "UNet2DModel")
    run = tmp_path / "run"
    words = ("train", "distil-diffusers", "--teacher", tmp_path / "teacher", "--model.preconditioning", "euler")
    assert command(*words, *DISTILLED, "--training.images", "16", "--out", run).code == 0
    (tmp_path / "teacher").rename(tmp_path / "moved")
    export = ("export", run, "--to", "diffusers", "--out", tmp_path / "out")
    assert_refused(command(*export), "teacher .* is not there: .* --teacher, or leave out its parts with --parts none$")
    assert not (tmp_path / "out").exists()
    (tmp_path / "moved" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert command(*export, "--teacher", tmp_path / "moved").code == 0
    assert "\nlicense: mit\n" in (tmp_path / "out" / "README.md").read_text()
    assert command(*export[:-1], tmp_path / "other", "--parts", "none").code == 0
