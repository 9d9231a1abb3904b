"""Of a run that diverged, or whose newest checkpoint is damaged: what there is, and the way back."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewstep.evaluation.actions import read_actions
from fewstep.evaluation.figures import read_figures
from fewstep.training import RunFolder
from fewstep.training.loop import Trainer
from tests.support.commands import SMALL, STEPS, Command, Finished, contents
from tests.support.inputs import demonstrations

MACHINE = SMALL[6:]
SHORT = ("--training.batch-size", 32, "--training.images", 320, "--training.sample-images", 0)
FOUND = ("--steps", 1, "--samples", 32)


def refused(shown: Finished, *parts: str) -> None:
    """Exit code 2 and one line with every part."""
    assert (shown.code, shown.err.count("\n")) == (2, 1), shown
    for part in parts:
        assert part in shown.err


# Damaged checkpoints


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> RunFolder:
    """A run with sound checkpoints of steps 6, 9 and 10; commands see the newest two, 9 and 10."""
    root = tmp_path / "run"
    shutil.copytree(small_run, root)
    older = RunFolder(root).checkpoint(6)
    shutil.copytree(RunFolder(root).checkpoint(9), older)
    state = json.loads((older / "state.json").read_text())
    del state["digest"]
    (older / "state.json").write_text(json.dumps(state | {"step": 6, "images": 192}))
    return RunFolder(root)


def lose(file: Path) -> None:
    file.unlink()


def lack_a_key(file: Path) -> None:
    record = json.loads(file.read_text())
    del record["flow_map"]["shape"]
    file.write_text(json.dumps(record))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_digit(file: Path) -> None:
    text = file.read_text()
    place = text.index('"seconds": ') + len('"seconds": ')
    file.write_text(text[:place] + str(int(text[place]) ^ 1) + text[place + 1 :])


DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    ("config.json", lose),
    ("config.json", lack_a_key),
    ("config.json", cut),
    ("model.safetensors", lose),
    ("model.safetensors", cut),
    ("state.json", cut),
    ("state.json", flip_a_digit),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_file_is_named_with_the_newest_step_that_can_be_used(
    name: str, damage: Callable[[Path], None], command: Command, run: RunFolder
) -> None:
    """By whichever command; first the step before is named, and once that is damaged too the one before it."""
    damage(run.last_checkpoint() / name)
    before = contents(run.root)
    commands = (
        ("sample", run.root), ("report", run.root), ("evaluate", run.root, *FOUND),
        ("tune-steps", run.root, *FOUND[2:], "--steps", 2), ("train", "--resume", run.root, *MACHINE),
    )  # fmt: skip
    for words in commands:
        if words[0] != "sample" or name != "state.json" or damage is cut:
            refused(
                command(*words), f"step-00000010/{name}", f"; go on from the one before with {run.going_on} --from 9"
            )
    cut(run.checkpoint(9) / "optimizer.safetensors")
    refused(command("report", run.root), f"go on from the newest that can be used with {run.going_on} --from 6")
    (run.checkpoint(6) / "config.json").unlink()
    refused(command("report", run.root), "; train it anew")
    shutil.rmtree(run.checkpoint(6))
    shutil.rmtree(run.checkpoint(9))
    refused(command("report", run.root), "; train it anew")
    assert {key: value for key, value in contents(run.root).items() if not key.startswith((".", "checkpoints/"))} == {
        key: value for key, value in before.items() if not key.startswith((".", "checkpoints/"))
    }


def test_the_step_that_is_named_goes_on(command: Command, run: RunFolder) -> None:
    (run.last_checkpoint() / "config.json").unlink()
    cut(run.checkpoint(9) / "weights.safetensors")
    shown = command("sample", run.root)
    refused(shown, f"with {run.going_on} --from 6")
    assert command(*shown.err.split(" with fewstep ")[1].split(), *MACHINE).code == 0
    assert command("sample", run.root).code == 0


@pytest.mark.parametrize("key", ["step", "images", "seconds", "pending", "digests", "digest"])
def test_no_part_of_a_state_can_change_unnoticed(key: str, command: Command, run: RunFolder) -> None:
    """Its values, and the names that they stand under."""
    file = run.last_checkpoint() / "state.json"
    state: dict[str, Any] = json.loads(file.read_text())
    value = state[key]
    other: Any = {"model.safetensors": "0"} if key == "digests" else "0" if key == "digest" else value + 1
    for spoilt in (state | {key: other}, {name + "_" * (name == key): each for name, each in state.items()}):
        file.write_text(json.dumps(spoilt))
        refused(command("sample", run.root), "step-00000010/state.json is damaged", "--from 9")
    file.write_text(json.dumps(state))
    assert command("sample", run.root).code == 0
    for name in ("digest", "digests"):
        del state[name]  # as a checkpoint was before there were any
    file.write_text(json.dumps(state))
    assert command("sample", run.root).code == 0


# Runs that diverged


def diverging(patch: pytest.MonkeyPatch, step: int) -> None:
    """Make the weights NaN before a step."""
    take_step = Trainer.take_step

    def spoiled(self: Trainer) -> None:
        if self.clock.step + 1 == step:
            next(self.learner.flow_map.network.parameters()).data.fill_(float("nan"))
        take_step(self)

    patch.setattr(Trainer, "take_step", spoiled)


def train(command: Command, archive: Path, *more: object) -> Finished:
    words = ("train", "digits", "--data.source", "npz", "--data.root", archive, "--out", "run")
    return command(*words, *SMALL, *STEPS, *more)


def test_a_run_that_diverged_before_its_first_checkpoint_has_a_report(
    archive: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what there is: its losses, its settings, and why it ended."""
    with monkeypatch.context() as patch:
        diverging(patch, 3)
        refused(train(command, archive), "step 3: loss nan", "there is no checkpoint yet")
    shown = command("report", "run")
    assert (shown.code, shown.err) == (0, "")
    page = Path("run/report.html").read_text()
    assert "The training diverged: step 3: loss nan" in page
    assert "There is no checkpoint, and so no samples" in page
    assert "<summary>Training</summary>" in page
    assert "<h2>Samples</h2>" not in page
    assert "optimizer.lr" in page
    refused(command("evaluate", "run"), "has no checkpoint yet: train it first")
    assert train(command, archive).code == 0  # anew; nothing of the divergence is left
    assert command("report", "run").code == 0
    assert "diverged" not in Path("run/report.html").read_text()


def test_a_run_without_a_log_has_a_report(command: Command, run: RunFolder) -> None:
    shutil.rmtree(run.root / "checkpoints")
    run.log_file.unlink()
    assert command("report", run.root).code == 0
    assert "There is no checkpoint, and so no samples" in (run.root / "report.html").read_text()


def test_figures_of_a_run_that_diverged_are_of_its_last_checkpoint_and_say_so(
    archive: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        diverging(patch, 5)
        refused(
            train(command, archive), "step 5: loss nan", "the last good checkpoint is run/checkpoints/step-00000003"
        )
    shown = command("evaluate", "run", *FOUND)
    assert (shown.code, shown.err) == (0, "")
    assert "The training diverged (step 5: loss nan" in shown.out
    assert "the figures are of its checkpoint of step 3." in shown.out
    assert command("report", "run").code == 0
    assert "The training diverged: step 5: loss nan" in Path("run/report.html").read_text()


def test_a_model_that_makes_nonsense_is_measured_and_is_no_success(
    archive: Path, command: Command, tmp_path: Path
) -> None:
    """Images and policies alike: `train` and `evaluate` end with 2, figures are shown and kept, `report` shows them."""
    wild = ("--optimizer.lr", 100, "--optimizer.warmup-images", 0, "--training.images", 1600)
    refused(train(command, archive, *wild), "the training has diverged")
    shown = command("evaluate", "run", *FOUND)
    refused(shown, "run: values up to", "the training has diverged, or learned nothing yet")
    assert "Frechet" in shown.out
    assert len(read_figures(tmp_path / "run")) > 1
    assert command("report", "run").code == 0

    demos = demonstrations(tmp_path / "moves.npz")
    words = ("train", "policy-mlp", "--data.root", demos, "--out", "policy", *SMALL, *SHORT, *wild[:4])
    nothing = ("times their spread away", "the training has diverged, or learned nothing yet", "train this run longer")
    refused(command(*words, "--training.images", 1600), *nothing)
    kept = read_actions(tmp_path / "policy")
    shown = command("evaluate", "policy", *FOUND)
    refused(shown, *nothing)
    assert "of each action" in shown.out
    assert len(kept) < len(read_actions(tmp_path / "policy"))
    assert command("report", "policy").code == 0


def test_errors_of_actions_are_kept_and_shown(command: Command, tmp_path: Path) -> None:
    demos = demonstrations(tmp_path / "moves.npz")
    words = ("train", "policy-mlp", "--data.root", demos, "--out", "run", *SMALL, *SHORT, "--training.images", 640)
    assert command(*words).code == 0
    (trained, *_) = read_actions(tmp_path / "run")
    assert (trained["method"], trained["steps"], len(trained["errors"])) == ("iSD", 1, 3)
    shown = command("evaluate", "run", *FOUND)
    assert shown.code == 0
    assert f"Stored: {Path('run/actions.json')}" in shown.out
    assert {row["samples"] for row in read_actions(tmp_path / "run")} == {trained["samples"], 32}
    assert command("evaluate", "run", *FOUND, "--out", "elsewhere").code == 0
    assert len(read_actions(tmp_path / "elsewhere")) == 1
    assert command("report", "run").code == 0
    page = Path("run/report.html").read_text()
    assert "Error of actions held out" in page
    assert "<h2>Actions of held-out episodes</h2>" in page
    for rows in ([1], [{}], [trained | {"errors": ["x"]}], [trained | {"error": None}]):
        Path("run/actions.json").write_text(json.dumps(rows))
        refused(command("report", "run"), "actions.json is damaged", "delete it, and run fewstep evaluate run anew")
