"""Exact resume, checkpoints, and runs that must not be resumed."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.data.base import Dataset
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.objectives import DiagonalMatching
from fewstep.recipes.config import RunConfig
from fewstep.sampling.pipeline import Pipeline
from fewstep.training import Callbacks, RunFolder, build, checkpoint, train_run
from fewstep.training.claim import check, hold
from fewstep.training.loop import Trainer
from fewstep.training.optimizers import Optimizers
from fewstep.utils.errors import CheckpointError, ConfigError
from tests.support.tiny import (
    KINDS,
    RUNTIME,
    TINY,
    Killed,
    assert_same_run,
    interrupt_after,
    killed_after,
    noise_and_times,
    snapshot,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_exactly(
    kind: str,
    digits: Dataset,
    unbroken: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed before the first checkpoint, a step after it, and at the third."""
    run = RunFolder(tmp_path / "run")
    for steps, newest in ((2, []), (4, ["step-00000003"]), (6, ["step-00000009"])):
        killed_after(steps, KINDS[kind], digits, run.root, monkeypatch)
        assert [path.name for path in run.checkpoints()][-1:] == newest
        torch.manual_seed(99)  # what else the process draws must not matter
    train_run(KINDS[kind], digits, run, RUNTIME)
    assert_same_run(run.root, unbroken(kind))


@pytest.mark.parametrize(
    ("owner", "name", "calls", "cleaned"),
    [
        (Pipeline, "save", 1, False),
        (checkpoint, "save_weights", 3, False),
        (checkpoint, "save_weights", 4, True),
        (checkpoint, "save_weights", 4, False),
        (checkpoint, "save_weights", 5, False),
        (checkpoint.os, "fsync", 8, False),
        (checkpoint.os, "replace", 3, True),
        (checkpoint.os, "replace", 3, False),
    ],
)
def test_a_stop_while_writing_leaves_the_older_checkpoint(
    owner: Any,
    name: str,
    calls: int,
    cleaned: bool,
    digits: Dataset,
    unbroken: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every stage of writing, for an exception and for a kill after which no cleaning runs."""
    run = RunFolder(tmp_path / "run")
    config = KINDS["adamw"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, owner, name, calls)
        if not cleaned:
            patch.setattr(checkpoint.shutil, "rmtree", lambda *args, **options: None)
        with pytest.raises(Killed):
            train_run(config, digits, run, RUNTIME)
    good = run.last_checkpoint()
    assert good.name == "step-00000003"
    assert sorted(file.name for file in good.iterdir()) == sorted(
        file.name for file in RunFolder(unbroken("adamw")).last_checkpoint().iterdir()
    )
    assert torch.isfinite(fewstep.load(run.root).flow_map.jump(*noise_and_times(fewstep.load(run.root).flow_map))).all()
    train_run(config, digits, run, RUNTIME)
    assert_same_run(run.root, unbroken("adamw"))
    assert [path.name for path in run.root.rglob(".*")] == [".lock"]


def test_a_stop_while_removing_the_oldest_checkpoint(
    digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is half removed is no longer taken for a checkpoint, and is gone after the next start."""
    run = RunFolder(tmp_path / "run")

    def stop_half_way(folder: Path, ignore_errors: bool = False) -> None:
        if folder.is_dir() and (folder / "weights.safetensors").exists():
            (folder / "weights.safetensors").unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", stop_half_way)
        with pytest.raises(Killed):
            train_run(TINY, digits, run, RUNTIME)
    assert [path.name for path in run.checkpoints()] == ["step-00000006", "step-00000009"]
    train_run(TINY, digits, run, RUNTIME)
    assert_same_run(run.root, unbroken("adamw"))
    assert [path.name for path in (run.root / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_leftovers_of_a_kill_do_not_disturb(
    digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill before the first whole file, and one while a checkpoint was written: what they leave is removed."""
    root = tmp_path / "run"
    root.mkdir()
    (root / ".config.json.0123abcd").write_text("half")
    killed_after(4, TINY, digits, root, monkeypatch)
    half = root / "checkpoints" / ".step-00000006.0123abcd"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    (half / "state.json").write_text("{")
    (root / ".log.jsonl.0123abcd").write_text("half")
    train_run(TINY, digits, RunFolder(root), RUNTIME)
    assert_same_run(root, unbroken("adamw"))
    assert [path.name for path in root.rglob(".*")] == [".lock"]


def test_a_torn_log_line_is_written_again(digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(unbroken("adamw"), root)
    shutil.rmtree(RunFolder(root).last_checkpoint())
    log = (root / "log.jsonl").read_text()
    (root / "log.jsonl").write_text(log[:-20])
    train_run(TINY, digits, RunFolder(root), RUNTIME)
    assert_same_run(root, unbroken("adamw"))


def test_a_finished_run_started_again_changes_nothing(
    digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    before = snapshot(unbroken("adamw"))
    result = train_run(TINY, digits, RunFolder(unbroken("adamw")), RUNTIME)
    assert (result.step, result.images) == (10, 320)
    assert snapshot(unbroken("adamw")) == before


def test_old_checkpoints_are_removed(unbroken: Callable[[str], Path]) -> None:
    assert [path.name for path in RunFolder(unbroken("adamw")).checkpoints()] == ["step-00000009", "step-00000010"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Refuse to write files beyond `size` bytes, as a full disk would in the middle of one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 3000, 12_000], ids=["anything", "the log alone", "all but the optimizer"])
def test_a_full_disk_stops_with_the_older_checkpoint_intact(
    size: int, digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "run")
    killed_after(4, TINY, digits, run.root, monkeypatch)
    before = snapshot(run.root)
    with (
        largest_file(size),
        pytest.raises(CheckpointError, match=r"cannot write .*; free some space, or work elsewhere"),
    ):
        train_run(TINY, digits, run, RUNTIME)
    after = snapshot(run.root)
    assert {name: after[name] for name in before if name != "log.jsonl"} == {
        name: content for name, content in before.items() if name != "log.jsonl"
    }
    train_run(TINY, digits, run, RUNTIME)
    assert_same_run(run.root, unbroken("adamw"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(TINY, training=replace(TINY.training, batch_size=64)), r"training\.batch_size: 32 -> 64"),
        (replace(TINY, optimizer=replace(TINY.optimizer, lr=0.1)), r"optimizer\.lr: 0\.005 -> 0\.1"),
        (replace(TINY, objective=DiagonalMatching()), r"objective\.measure: absent -> 'velocity'"),
    ],
    ids=["batch size", "learning rate", "objective"],
)
def test_a_resume_with_another_recipe_is_refused(
    config: RunConfig, message: str, digits: Dataset, unbroken: Callable[[str], Path]
) -> None:
    before = snapshot(unbroken("adamw"))
    with pytest.raises(CheckpointError, match=message):
        train_run(config, digits, RunFolder(unbroken("adamw")), RUNTIME)
    assert snapshot(unbroken("adamw")) == before


def test_a_resume_on_other_data_is_refused(unbroken: Callable[[str], Path]) -> None:
    before = snapshot(unbroken("adamw"))
    other = load_dataset(DataConfig(seed=1))
    with pytest.raises(CheckpointError, match=r"data\.fingerprint: '\w+' -> '\w+'"):
        train_run(TINY, other, RunFolder(unbroken("adamw")), RUNTIME)
    assert snapshot(unbroken("adamw")) == before


@pytest.mark.parametrize("file", ["weights", "optimizer", "model", "ema-constant-0.9"])
@pytest.mark.parametrize("damage", ["truncated", "of another architecture", "gone"])
def test_a_damaged_checkpoint_is_named(
    file: str, damage: str, digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(unbroken("adamw"), root)
    shutil.rmtree(RunFolder(root).last_checkpoint())  # so that there is something left to train
    target = RunFolder(root).last_checkpoint() / f"{file}.safetensors"
    if damage == "truncated":
        target.write_bytes(target.read_bytes()[:-100])
    elif damage == "gone":
        target.unlink()
    else:
        save_file({key: torch.zeros([n + 1 for n in value.shape]) for key, value in load_file(target).items()}, target)
    pattern = {"truncated": "is truncated", "gone": "no such file", "of another architecture": "another architecture"}
    with pytest.raises(CheckpointError, match=pattern[damage]):
        train_run(TINY, digits, RunFolder(root), RUNTIME)


def test_an_optimizer_state_with_parameters_missing_is_refused(digits: Dataset) -> None:
    flow_map = build(TINY, digits).flow_map
    optimizers = Optimizers(flow_map.network, TINY.optimizer)
    for parameter in flow_map.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(1, 0.0)
    tensors = {key: value for key, value in optimizers.tensors().items() if not key.startswith("0.0.")}
    with pytest.raises(CheckpointError, match=r"here is of another architecture or optimizer: 0\.0\."):
        Optimizers(flow_map.network, TINY.optimizer).load(tensors, "here")


def test_a_folder_that_is_no_run_is_left_alone(digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="is not empty and holds no run"):
        train_run(TINY, digits, RunFolder(tmp_path), RUNTIME)
    assert list(snapshot(tmp_path)) == ["letter.txt"]


def test_a_file_in_the_place_of_the_folder(digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        train_run(TINY, digits, RunFolder(tmp_path / "file"), RUNTIME)
    with pytest.raises(CheckpointError, match=r"cannot write .*Not a directory"):
        train_run(TINY, digits, RunFolder(tmp_path / "file" / "below"), RUNTIME)
    assert (tmp_path / "file").read_text() == "dear"


def test_a_folder_has_one_trainer_at_a_time(digits: Dataset, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    first = Trainer(TINY, digits, run, RUNTIME, Callbacks())
    first.take_step()
    unfinished = run.root / "checkpoints" / ".step-1.aside"
    unfinished.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"run is being trained in by another .*: wait for it, or .*--out"):
        train_run(TINY, digits, run, RUNTIME)
    assert unfinished.is_dir()  # what the first is writing is left alone
    first.release()
    assert train_run(TINY, digits, run, RUNTIME).images == TINY.training.images
    assert not unfinished.exists()
    train_run(TINY, digits, run, RUNTIME)  # the lock went with the run's end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "take_up", raising)
        with pytest.raises(ConfigError) as kept:  # and with it the trainer, as a notebook keeps it
            train_run(TINY, digits, run, RUNTIME)
    assert kept.tb is not None
    train_run(TINY, digits, run, RUNTIME)


def test_a_run_that_cannot_be_built_leaves_its_folder_to_others(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    def estimate(*_: object) -> None:  # statistics take minutes: nobody else may spend them on this folder
        with pytest.raises(CheckpointError, match="being trained in by another"):
            hold(run, TINY, {})
        held.append(True)
        raise ConfigError("no statistics")

    run = RunFolder(tmp_path / "deep" / "run")
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.training.loop.first_statistics", estimate)
        with pytest.raises(ConfigError, match="no statistics"):
            train_run(TINY, digits, run, RUNTIME)
    assert held
    assert list(tmp_path.iterdir()) == []
    other = replace(TINY, training=replace(TINY.training, seed=TINY.training.seed + 1))
    with Trainer(other, digits, run, RUNTIME, Callbacks()) as trainer:  # other settings may follow
        trainer.take_step()
    train_run(other, digits, run, RUNTIME)


def raising(self: Trainer) -> None:
    raise ConfigError("as a damaged checkpoint does")


def test_what_is_only_logged_or_measured_may_change(unbroken: Callable[[str], Path]) -> None:
    """A finished run accepts other settings of logs and evaluation, which leave its weights as they are."""
    run = RunFolder(unbroken("adamw"))
    changed = replace(
        TINY, training=replace(TINY.training, log_images=32, keep=5), evaluation=replace(TINY.evaluation, samples=99)
    )
    check(run, changed, run.record()["data"])  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"training\.seed"):
        check(run, replace(TINY, training=replace(TINY.training, seed=1)), run.record()["data"])  # type: ignore[arg-type]


def test_the_last_command_says_what_is_measured(digits: Dataset, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    train_run(TINY, digits, run, RUNTIME)
    written = run.config_file.read_bytes()
    train_run(TINY, digits, run, RUNTIME)
    assert run.config_file.read_bytes() == written
    changed = replace(TINY, evaluation=replace(TINY.evaluation, samples=99, gamma=0.5))
    train_run(changed, digits, run, RUNTIME)
    assert run.config() == changed
    assert run.record()["data"] == json.loads(written)["data"]
