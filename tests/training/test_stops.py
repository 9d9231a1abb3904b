"""A run that is stopped: by signals after its step, between saving and showing, and what goes on from there."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.data.base import Dataset
from fewstep.sampling.pipeline import Pipeline
from fewstep.training import Callbacks, RunFolder, train_run
from fewstep.training.loop import Trainer
from fewstep.training.stopping import StopSignals
from fewstep.utils.errors import CheckpointError, FewstepWarning, Stopped, TrainingDivergedError
from tests.support.tiny import KINDS, RUNTIME, TINY, Killed, assert_same_run

SHOWN = replace(
    TINY,
    training=replace(TINY.training, sample_images=64),
    evaluation=replace(TINY.evaluation, curve_images=96),
)
"""Grids after steps 2, 4, 6, 8 and 10, points after 3, 6, 9 and 10, checkpoints after 3, 6, 9 and 10."""
STEPS = {"grid": [2, 4, 6, 8, 10], "point": [3, 6, 9, 10]}


@pytest.fixture(autouse=True)
def python_takes_interrupts() -> Iterator[None]:
    """A shell starts what runs in its background deaf to them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def signalled(patch: pytest.MonkeyPatch, number: int, step: int) -> None:
    """Send the signal to this process in the middle of a step."""
    accumulate = Trainer.accumulate

    def raising(self: Trainer) -> Any:
        if self.clock.step + 1 == step:
            signal.raise_signal(number)
        return accumulate(self)

    patch.setattr(Trainer, "accumulate", raising)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("step", [2, 6])
def test_the_first_signal_finishes_the_step_and_saves_it(
    name: str, step: int, digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, number = RunFolder(tmp_path / "a run"), getattr(signal, name)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signalled(patch, number, step)
        with pytest.raises(Stopped, match=rf"{name}; step {step} is saved: .* --resume '.*a run' goes on") as stopped:
            train_run(TINY, digits, run, RUNTIME)
    assert stopped.value.code == 128 + number
    assert f"fewstep: {name}: the step is finished and saved" in capfd.readouterr().err
    assert signal.getsignal(number) is before
    assert run.last_checkpoint().name == f"step-{step:08d}"
    train_run(TINY, digits, run, RUNTIME)
    assert_same_run(run.root, unbroken("adamw"))


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not its echo by a launcher; what a caller ignores stays ignored."""
    monkeypatch.setattr("fewstep.training.stopping.time.monotonic", iter([1.0, 1.5, 3.0]).__next__)
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(silent=True) as stops:
            signal.raise_signal(signal.SIGHUP)
            assert stops.received is None
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert stops.received is signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, hang_up)


def recorder(shown: dict[str, list[int]], kind: str, stop: int = 0) -> Callable[[Pipeline, int], None]:
    def watch(pipeline: Pipeline, step: int) -> None:
        if step == stop:
            raise Killed
        shown[kind].append(step)

    return watch


@pytest.mark.parametrize(("kind", "stop"), [(kind, step) for kind, steps in STEPS.items() for step in steps])
def test_what_was_to_be_shown_is_shown_after_a_stop(kind: str, stop: int, digits: Dataset, tmp_path: Path) -> None:
    """Whatever was saved before the stop: every grid and point is there in the end."""
    run, shown = RunFolder(tmp_path / "run"), {"grid": [], "point": []}  # type: ignore[var-annotated]
    stopping = {each: recorder(shown, each, stop if each == kind else 0) for each in shown}
    with pytest.raises(Killed):
        train_run(SHOWN, digits, run, RUNTIME, Callbacks(stopping["grid"], stopping["point"]))
    again = Callbacks(recorder(shown, "grid"), recorder(shown, "point"))
    train_run(SHOWN, digits, run, RUNTIME, again)
    assert {each: sorted(set(steps)) for each, steps in shown.items()} == STEPS
    count = sum(map(len, shown.values()))
    train_run(SHOWN, digits, run, RUNTIME, again)  # nothing is pending any more
    assert sum(map(len, shown.values())) == count


def broken_copy(finished: Path, root: Path, *newest: str) -> RunFolder:
    """A run with something left to train, its newest checkpoint without these files."""
    shutil.copytree(finished, root)
    shutil.rmtree(RunFolder(root).last_checkpoint())
    for name in newest:
        (RunFolder(root).last_checkpoint() / name).unlink()
    return RunFolder(root)


def with_checkpoints(config: Any, digits: Dataset, root: Path) -> RunFolder:
    """A run that keeps the checkpoints of steps 3, 6 and 9."""
    kept = replace(config, training=replace(config.training, keep=9))
    train_run(kept, digits, RunFolder(root), RUNTIME)
    shutil.rmtree(RunFolder(root).last_checkpoint())
    return RunFolder(root)


def test_a_checkpoint_without_its_state_is_said_and_written_anew(
    digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    run = with_checkpoints(TINY, digits, tmp_path / "run")
    newest = run.last_checkpoint()
    (newest / "state.json").unlink()
    with pytest.warns(FewstepWarning, match=r"step-00000009 is not whole .*: step-00000006 is used"):
        train_run(TINY, digits, run, RUNTIME)
    assert (newest / "state.json").is_file()
    assert_same_run(run.root, unbroken("adamw"))


def test_a_lone_checkpoint_without_its_state_is_said_too(
    digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    run = with_checkpoints(TINY, digits, tmp_path / "run")
    for checkpoint in run.checkpoints():
        (checkpoint / "state.json").unlink()
    with pytest.warns(FewstepWarning, match=r"step-00000009 is not whole .*: the training begins anew"):
        train_run(TINY, digits, run, RUNTIME)
    assert_same_run(run.root, unbroken("adamw"))


FILES = ("weights", "optimizer", "model", "ema-constant-0.9", "config.json", "state.json")


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_with_the_way_back(
    file: str, digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    """One flipped bit, in any of its files; the run goes on from the checkpoint before, the damaged one set aside."""
    run = with_checkpoints(TINY, digits, tmp_path / "run")
    name = file if file.endswith(".json") else f"{file}.safetensors"
    target = run.last_checkpoint() / name
    content = bytearray(target.read_bytes())
    places = {"state.json": content.rfind(b'"step": ') + 8, "config.json": content.rfind(b'"sigma_data": ') + 17}
    content[places.get(file, -10)] ^= 1
    target.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"; go on from the one before with .* --from 6$") as refused:
        train_run(TINY, digits, run, RUNTIME)
    assert "step-00000009" in str(refused.value)
    if file in ("model", "config.json"):
        with pytest.raises(CheckpointError, match=rf"{name} is damaged: it is not what was written; .*--from 6$"):
            fewstep.load(run.root)
        with pytest.raises(CheckpointError, match=rf"{name} is damaged: it is not what was written$"):
            fewstep.load(target.parent)
    train_run(TINY, digits, run, replace(RUNTIME, from_step=6))
    assert target.parent.with_suffix(".aside").is_dir()
    assert_same_run(run.root, unbroken("adamw"))
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 7: it has 9, 10"):
        train_run(TINY, digits, run, replace(RUNTIME, from_step=7))


@pytest.mark.parametrize("kind", ["weights", "optimizer", "model", "ema-constant-0.9"])
def test_a_checkpoint_that_is_not_finite_is_not_used(kind: str, digits: Dataset, tmp_path: Path) -> None:
    """As an older fewstep could save it: file and tensor are named, at once."""
    run = with_checkpoints(TINY, digits, tmp_path / "run")
    file = run.last_checkpoint() / f"{kind}.safetensors"
    tensors = load_file(file)
    name = "0.3.exp_avg" if kind == "optimizer" else "output.weight"
    tensors[name].view(-1)[0] = torch.inf
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{kind}\.safetensors is of no use: its tensor {name} .*--from 6$"):
        train_run(TINY, digits, run, RUNTIME)


def test_what_is_not_finite_is_not_saved(
    digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step of a portion makes an average infinite: the checkpoint before stays, and is the one named."""
    run, update = RunFolder(tmp_path / "run"), Trainer.take_step

    def overflow(self: Trainer) -> None:
        update(self)
        if self.clock.step == 6:
            next(iter(self.learner.emas[0].weights.values())).view(-1)[0] = torch.inf

    monkeypatch.setattr(Trainer, "take_step", overflow)
    once = replace(TINY, training=replace(TINY.training, keep=1))
    with pytest.raises(
        TrainingDivergedError, match=r"after step 6, model\.safetensors .* good .*step-00000003\. Lower"
    ):
        train_run(once, digits, run, RUNTIME)
    assert [path.name for path in run.checkpoints()] == ["step-00000003"]


def test_the_last_good_checkpoint_is_a_finite_one(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, update = RunFolder(tmp_path / "run"), Trainer.take_step

    def spoil(self: Trainer) -> None:
        if self.clock.step == 7:
            file = run.last_checkpoint() / "weights.safetensors"
            save_file({key: value * torch.nan for key, value in load_file(file).items()}, file)
            self.learner.flow_map.network.output.weight.data.fill_(torch.nan)  # type: ignore[union-attr, operator]
        update(self)

    monkeypatch.setattr(Trainer, "take_step", spoil)
    with pytest.raises(TrainingDivergedError, match=r"the last good checkpoint is \S+step-00000003\. Lower"):
        train_run(TINY, digits, run, RUNTIME)


@pytest.mark.parametrize("link", ["log.jsonl", "checkpoints", "checkpoints/step-00000009/weights.safetensors"])
def test_a_link_within_a_run_is_not_followed(
    link: str, digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    run = broken_copy(unbroken("adamw"), tmp_path / "run")
    path, target = run.root / link, tmp_path / "target"
    path.rename(target)
    path.symlink_to(target)
    before = target.read_bytes() if target.is_file() else sorted(target.iterdir())
    for use in (lambda: train_run(TINY, digits, run, RUNTIME), lambda: fewstep.load(run.root)):
        with pytest.raises(CheckpointError, match=rf"{link} is a link"):
            use()
    assert (target.read_bytes() if target.is_file() else sorted(target.iterdir())) == before
    os.symlink(unbroken("adamw"), tmp_path / "elsewhere")
    fewstep.load(tmp_path / "elsewhere")  # the run itself may be one


def test_files_can_be_read_by_whom_the_umask_lets(unbroken: Callable[[str], Path]) -> None:
    modes = {path.name: path.stat().st_mode for path in RunFolder(unbroken("adamw")).last_checkpoint().iterdir()}
    assert len(set(modes.values())) == 1


def test_a_callers_random_numbers_go_on_as_if_there_had_been_no_training(digits: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train_run(KINDS["dropout"], digits, RunFolder(tmp_path / "run"), RUNTIME)
    fewstep.load(tmp_path / "run")
    assert torch.equal(torch.rand(2), expected)


def test_a_byte_order_mark_and_a_folder_in_words(unbroken: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(unbroken("adamw"), tmp_path / "run")
    run = RunFolder(str(tmp_path / "run"))
    run.config_file.write_bytes(b"\xef\xbb\xbf" + run.config_file.read_bytes())
    assert run == RunFolder(tmp_path / "run")
    assert run.config() == TINY
