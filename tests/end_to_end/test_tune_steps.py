"""fewstep tune-steps: what it finds is stored, travels with the model, is used by default and given up when stale."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

import fewstep
from fewstep.cli import recipes
from fewstep.sampling.step_times import TIMES_FILE, StepTimes, Tuned, TunedSteps, read_tuned_steps
from fewstep.training import RunFolder
from fewstep.utils.errors import FewstepWarning
from fewstep.utils.files import UPDATE_FILE
from tests.support.commands import SMALL, STEPS, Command, contents

FEW = ("--samples", 40, "--evaluations", 4)
PLACED = StepTimes("map", 0.0, 1.0, (1.0, 0.3, 0.0), "half A of the tests")


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of ten steps."""
    shutil.copytree(small_run, tmp_path / "run")
    return tmp_path / "run"


def place(run: Path, step: int = 10) -> None:
    """As if two steps of the checkpoint at this step had been tuned."""
    TunedSteps(step, (Tuned(PLACED, True, {}),)).write(run)


def drawn(command: Command, source: Path, *words: object) -> np.ndarray:
    shown = command("sample", source, "--out", "drawn.npz", "--count", 4, *words)
    assert shown.code == 0
    with np.load("drawn.npz") as stored:
        return np.asarray(stored["images"])


def test_what_is_found_is_stored_beside_the_run(run: Path, command: Command) -> None:
    before = contents(run)
    shown = command("tune-steps", run, *FEW)
    assert (shown.code, shown.err) == (0, "")
    assert f"Stored: {run / TIMES_FILE}" in shown.out
    assert {key: value for key, value in contents(run).items() if key not in (TIMES_FILE, UPDATE_FILE)} == before
    record = json.loads((run / TIMES_FILE).read_text())
    assert record["step"] == 10
    for steps, found in zip((2, 4), record["found"], strict=True):
        times, figures = found["step_times"]["times"], found["figures"]
        assert (len(times), times[0], times[-1]) == (steps + 1, 1.0, 0.0)
        assert figures["default_times"] == [1 - k / steps for k in range(steps + 1)]
        assert (figures["search"]["half"], figures["search"]["seed"], figures["search"]["heldout"]) == ("A", 2000, 33)
        assert (figures["check"]["half"], figures["check"]["seed"], figures["check"]["heldout"]) == ("B", 2001, 33)
        assert figures["search"]["tuned"] <= figures["search"]["default"]
        gain = figures["check"]["default"] - figures["check"]["tuned"]
        assert figures["gain"] == gain
        assert found["kept"] == (times != figures["default_times"] and gain > figures["gain_error"])
        assert (figures["samples"], figures["evaluations"] <= 4) == (40, True)
        assert f"{figures['check']['default']:.3f} -> {figures['check']['tuned']:.3f}" in shown.out

    first = contents(run)
    assert command("tune-steps", run, *FEW).code == 0
    assert contents(run) == first  # the same again, to the last digit
    assert command("tune-steps", run, "--steps", 3, *FEW).code == 0
    again = json.loads((run / TIMES_FILE).read_text())["found"]
    assert again[:2] == record["found"]
    assert len(again[2]["step_times"]["times"]) == 4


def test_samples_use_it_unless_told_otherwise(run: Path, command: Command) -> None:
    plain = drawn(command, run)
    place(run)
    tuned = drawn(command, run)
    assert np.array_equal(tuned, drawn(command, run, "--times", 1, 0.3, 0))
    assert not np.array_equal(tuned, plain)
    for words in (("--spacing", "uniform"), ("--times", 1, 0.5, 0)):
        assert np.array_equal(drawn(command, run, *words), plain)
    assert "Times tuned for 2 steps: 1 0.3 0" in command("sample", run).out
    assert "tuned" not in command("sample", run, "--steps", 3).out

    fewstep.load(run).save_pretrained("model")
    assert np.array_equal(drawn(command, Path("model")), tuned)
    assert np.array_equal(drawn(command, Path("model"), "--spacing", "uniform"), plain)


def test_figures_say_what_was_tuned_on(run: Path, command: Command) -> None:
    place(run)
    shown = command("evaluate", run)
    assert (shown.code, shown.err) == (0, "")
    assert "Tuned times were chosen on half of these held-out samples" in shown.out
    rows = {(row["method"], row["nfe"]): row for row in json.loads((run / "figures.json").read_text())}
    tuned, default = rows["iSD-T, tuned times", 2], rows["iSD-T", 2]
    assert (tuned["tuned_on"], default["tuned_on"]) == ("half A of the tests", None)
    assert tuned["frechet"] != default["frechet"]
    assert ("iSD-T, tuned times", 1) not in rows
    assert command("report", run).code == 0
    page = (run / "report.html").read_text()
    assert "2 steps are taken at the times 1 0.3 0, tuned on half A of the tests" in page
    assert "iSD-T, tuned times" in page


def test_further_training_leaves_it_behind(run: Path, small_run: Path, archive: Path, command: Command) -> None:
    """Tuned at step 9 and resumed to step 10: the same weights as ever, and the times no longer used."""
    plain = drawn(command, run)
    shutil.rmtree(RunFolder(run).last_checkpoint())
    place(run, step=9)
    assert "Times tuned for 2 steps" in command("sample", run).out
    words = ("train", "digits", "--data.source", "npz", "--data.root", archive, "--out", run, *SMALL, *STEPS)
    assert command(*words).code == 0
    last = [RunFolder(each).last_checkpoint() / "model.safetensors" for each in (run, small_run)]
    assert last[0].read_bytes() == last[1].read_bytes()
    with pytest.warns(FewstepWarning, match=r"tuned at step 9, but the model is now at step 10"):
        assert np.array_equal(drawn(command, run), plain)
    assert command("tune-steps", run, "--steps", 2, *FEW).code == 0
    tuned = read_tuned_steps(run)
    assert tuned is not None
    assert (tuned.step, len(tuned.found)) == (10, 1)
    assert command("sample", run).err == ""


def test_a_warning_is_one_plain_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a command formats it: pytest itself would catch one that is given."""

    def warn(options: recipes.Options) -> None:
        for kind in (FewstepWarning, UserWarning):
            print(warnings.formatwarning(kind("first\n  second"), kind, "module.py", 3, ""), end="")

    usual = warnings.formatwarning
    monkeypatch.setattr(recipes, "run", warn)
    assert command("recipes").out.splitlines()[:2] == ["fewstep: first second", "module.py:3: UserWarning: first"]
    assert warnings.formatwarning is usual


def test_a_model_of_the_diagonal_is_placed_for_its_solver(archive: Path, command: Command) -> None:
    words = ("train", "digits-flow-matching", "--data.source", "npz", "--data.root", archive, "--out", "flow")
    assert command(*words, *SMALL, *STEPS, "--training.images", 64, "--training.sample-images", 0).code == 0
    assert command("tune-steps", "flow", "--steps", 2, "--guidance-scale", 1.5, *FEW).code == 0
    tuned = read_tuned_steps(Path("flow"))
    assert tuned is not None
    assert tuned.found[0].step_times.purpose == ("euler", 0.0, 1.5, 2)
    TunedSteps(2, (Tuned(tuned.found[0].step_times, True, {}),)).write(Path("flow"))  # in use, better or not
    assert "Times tuned" not in command("sample", "flow").out  # the run is measured without guidance
    fewstep.load("flow").save_pretrained("model")
    shown = command("sample", "model")
    assert "4 network calls" in shown.out
    assert "Times tuned for 2 steps" in shown.out
    plain = command("sample", "model", "--guidance-scale", 1)
    assert "2 network calls" in plain.out
    assert "Times tuned" not in plain.out


def test_samples_are_guided_as_the_run_is_measured(archive: Path, command: Command) -> None:
    words = ("train", "digits-flow-matching", "--data.source", "npz", "--data.root", archive, "--out", "flow")
    few = ("--training.images", 64, "--training.sample-images", 0, "--evaluation.guidance-scale", 1.5)
    assert command(*words, *SMALL, *STEPS, *few).code == 0
    assert "4 network calls" in command("sample", "flow").out  # two steps, each with and without the label
    assert "2 network calls" in command("sample", "flow", "--guidance-scale", 1).out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps 1", "one step goes from t_max to t_min: there is nothing to place"),
        ("--steps 0", "give counts from 2 to 8"),
        ("--steps 2 2", "give each count once"),
        ("--steps", "give counts from 2 to 8"),
        ("--steps two", "'two'"),
        ("--samples 3", "at least 20 samples"),
        ("--evaluations 0", "at least 4 evaluations"),
        ("--seed 1000", "noise that evaluation measures with"),
        ("--seed 999", "noise that evaluation measures with"),
        ("--step 2", "unknown option --step; did you mean --steps?"),
    ],
)
def test_what_cannot_be_tuned(words: str, message: str, small_run: Path, command: Command) -> None:
    before = contents(small_run)
    shown = command("tune-steps", small_run, *words.split())
    assert (shown.code, len(shown.err.splitlines())) == (2, 1)
    assert message in shown.err
    assert contents(small_run) == before


def test_no_run_and_no_checkpoint(run: Path, command: Command) -> None:
    shown = command("tune-steps", "nowhere")
    assert (shown.code, shown.err) == (2, "fewstep: nowhere is not a run: it has no config.json\n")
    shutil.rmtree(run / "checkpoints")
    shown = command("tune-steps", run)
    assert (shown.code, "has no checkpoint yet" in shown.err) == (2, True)


def test_too_little_is_held_out(archive: Path, command: Command) -> None:
    words = ("train", "digits", "--data.source", "npz", "--data.root", archive, "--data.heldout", 0.05, "--out", "run")
    assert command(*words, *SMALL, *STEPS, "--training.images", 32, "--training.sample-images", 0).code == 0
    shown = command("tune-steps", "run", *FEW)
    assert (shown.code, len(shown.err.splitlines())) == (2, 1)
    assert "has 10 samples: tuning needs at least 40" in shown.err
    assert not Path("run", TIMES_FILE).exists()


@pytest.mark.parametrize("words", [("tune-steps", *FEW), ("sample",), ("evaluate",), ("report",)])
def test_a_damaged_file_is_left_and_named(words: tuple[object, ...], run: Path, command: Command) -> None:
    (run / TIMES_FILE).write_text('{"step": 10,')
    before = contents(run)
    shown = command(words[0], run, *words[1:])
    assert (shown.code, len(shown.err.splitlines())) == (2, 1)
    assert "step_times.json is damaged" in shown.err
    assert contents(run) == before
