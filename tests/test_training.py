"""Training: exact resume, accumulation, divergence, averages, schedules, precision, checkpoints, saved models."""

from __future__ import annotations

import math
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewstep
from fewstep.config import OptimizerConfig, RunConfig, TrainingConfig
from fewstep.data import DataConfig, Dataset, load_dataset
from fewstep.errors import CheckpointError, ConfigError, TrainingDivergedError
from fewstep.flowmap import FlowMap
from fewstep.guidance import FixedGuidance
from fewstep.networks import MLPConfig, UNetConfig
from fewstep.objectives import ISD, Batch, DiagonalMatching, Losses, Objective
from fewstep.randomness import Draws
from fewstep.training import Machine, RunFolder, build, checkpoint, train
from fewstep.training.loop import Trainer, TrainStep, split_batch
from fewstep.training.optimizers import Optimizers, schedule

MACHINE = Machine(cpu=True, threads=1, quiet=True)
TINY = RunConfig(
    recipe="tiny",
    network=MLPConfig(width=16, depth=1, embedding_width=16),
    objective=ISD(diagonal=0.5, guidance=FixedGuidance(omega=1.3)),
    optimizer=OptimizerConfig(lr=5e-3, warmup_images=100),
    training=TrainingConfig(
        images=320, batch_size=32, ema_power=(0.1,), ema_decay=(0.9,),
        log_images=64, checkpoint_images=96, sample_images=0,
    ),
)  # fmt: skip
"""Ten steps, checkpoints after 3, 6, 9 and 10."""

KINDS: dict[str, RunConfig] = {
    "adamw": TINY,
    "muon": replace(TINY, optimizer=replace(TINY.optimizer, name="muon", decay="cosine")),
    "bf16": replace(TINY, training=replace(TINY.training, precision="bf16", flip=True)),
    "dropout": replace(
        TINY,
        network=UNetConfig(width=8, multipliers=(1,), blocks=1, attention=(), embedding_width=16, dropout=0.5),
        objective=DiagonalMatching(),
    ),
}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DataConfig())


@pytest.fixture(scope="module")
def unbroken(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an unbroken run of a kind, trained once."""
    root = tmp_path_factory.mktemp("unbroken")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            train(KINDS[kind], digits, RunFolder(root / kind), MACHINE)
        return root / kind

    return folder


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time of writing."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def stored_tensors(run: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint: raw weights, averages, optimiser state."""
    folder = RunFolder(run).last_checkpoint()
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.stem}/{key}": value for file in files for key, value in load_file(file).items()}


def assert_same_run(run: Path, other: Path) -> None:
    """Bit-identical newest checkpoints of the same step, and a log with each line once."""
    assert RunFolder(run).last_checkpoint().name == RunFolder(other).last_checkpoint().name
    first, second = stored_tensors(run), stored_tensors(other)
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert different == []
    steps = [[record["step"] for record in RunFolder(each).read_log()] for each in (run, other)]
    assert steps[0] == steps[1]


class Killed(BaseException):
    """Stands for anything that stops a process in the middle."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> None:
    """Let `owner.name` work `calls` times and raise Killed after that."""
    original, made = getattr(owner, name), []

    def stopping(*args: Any, **options: Any) -> Any:
        made.append(name)
        if len(made) > calls:
            raise Killed
        return original(*args, **options)

    monkeypatch.setattr(owner, name, stopping)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [2, 4, 9])
def test_a_stopped_run_goes_on_exactly(
    kind: str,
    steps: int,
    digits: Dataset,
    unbroken: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, Trainer, "take_step", steps)
        with pytest.raises(Killed):
            train(KINDS[kind], digits, RunFolder(tmp_path / "run"), MACHINE)
    torch.manual_seed(99)  # what else the process draws must not matter
    train(KINDS[kind], digits, RunFolder(tmp_path / "run"), MACHINE)
    assert_same_run(tmp_path / "run", unbroken(kind))


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (checkpoint, "save_flow_map", 1),
        (checkpoint, "_save", 3),
        (checkpoint, "_save", 4),
        (checkpoint, "_save", 5),
        (checkpoint.os, "fsync", 8),
        (checkpoint.os, "replace", 3),
    ],
    ids=["model", "weights", "optimizer", "average", "fsync", "rename"],
)
@pytest.mark.parametrize("cleaned", [True, False], ids=["raised", "killed"])
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
            train(config, digits, run, MACHINE)
    good = run.last_checkpoint()
    assert good.name == "step-00000003"
    assert sorted(file.name for file in good.iterdir()) == sorted(
        file.name for file in RunFolder(unbroken("adamw")).last_checkpoint().iterdir()
    )
    assert torch.isfinite(fewstep.load(run.root).jump(*noise_and_times(fewstep.load(run.root)))).all()
    train(config, digits, run, MACHINE)
    assert_same_run(run.root, unbroken("adamw"))
    assert [path.name for path in run.root.rglob(".*")] == []


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
            train(TINY, digits, run, MACHINE)
    assert [path.name for path in run.checkpoints()] == ["step-00000006", "step-00000009"]
    train(TINY, digits, run, MACHINE)
    assert_same_run(run.root, unbroken("adamw"))
    assert [path.name for path in (run.root / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_leftovers_of_a_kill_do_not_disturb(
    digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill before the first whole file, and one while a checkpoint was written: what they leave is removed."""
    root = tmp_path / "run"
    root.mkdir()
    (root / ".config.json.0123abcd").write_text("half")
    with monkeypatch.context() as patch:
        interrupt_after(patch, Trainer, "take_step", 4)
        with pytest.raises(Killed):
            train(TINY, digits, RunFolder(root), MACHINE)
    half = root / "checkpoints" / ".step-00000006.0123abcd"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    (half / "state.json").write_text("{")
    (root / ".log.jsonl.0123abcd").write_text("half")
    train(TINY, digits, RunFolder(root), MACHINE)
    assert_same_run(root, unbroken("adamw"))
    assert [path.name for path in root.rglob(".*")] == []


def test_a_torn_log_line_is_written_again(digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(unbroken("adamw"), root)
    shutil.rmtree(RunFolder(root).last_checkpoint())
    log = (root / "log.jsonl").read_text()
    (root / "log.jsonl").write_text(log[:-20])
    train(TINY, digits, RunFolder(root), MACHINE)
    assert_same_run(root, unbroken("adamw"))


def test_a_finished_run_started_again_changes_nothing(
    digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    before = snapshot(unbroken("adamw"))
    result = train(TINY, digits, RunFolder(unbroken("adamw")), MACHINE)
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
    with monkeypatch.context() as patch:
        interrupt_after(patch, Trainer, "take_step", 4)
        with pytest.raises(Killed):
            train(TINY, digits, run, MACHINE)
    before = snapshot(run.root)
    with largest_file(size), pytest.raises(CheckpointError, match=r"cannot write .*; free some space or give another"):
        train(TINY, digits, run, MACHINE)
    after = snapshot(run.root)
    assert {name: after[name] for name in before if name != "log.jsonl"} == {
        name: content for name, content in before.items() if name != "log.jsonl"
    }
    train(TINY, digits, run, MACHINE)
    assert_same_run(run.root, unbroken("adamw"))


@pytest.mark.parametrize("micro_batch", [8, 5, 31])
def test_accumulation_gives_the_weights_of_the_whole_batch(micro_batch: int, digits: Dataset, tmp_path: Path) -> None:
    """5 and 31 do not divide the share of 32: smaller parts of equal size are taken."""
    config = replace(TINY, training=replace(TINY.training, images=640))
    train(config, digits, RunFolder(tmp_path / "whole"), MACHINE)
    train(config, digits, RunFolder(tmp_path / "parts"), replace(MACHINE, micro_batch=micro_batch))
    whole, parts = stored_tensors(tmp_path / "whole"), stored_tensors(tmp_path / "parts")
    weights = [key for key in whole if not key.startswith("optimizer")]
    assert max(float((whole[key] - parts[key]).abs().max()) for key in weights) < 1e-5
    assert split_batch(32, 1, micro_batch)[1] * micro_batch >= 32


def test_a_batch_whose_labels_are_all_dropped_trains(digits: Dataset, tmp_path: Path) -> None:
    """Nothing is left to guide: small batches meet it by chance, a dropout of 1 always."""
    config = replace(TINY, objective=ISD(dropout=1.0, guidance=FixedGuidance(omega=1.3)))
    assert train(config, digits, RunFolder(tmp_path), MACHINE).step == 10


@pytest.mark.parametrize(
    ("batch_size", "processes", "micro_batch", "expected"),
    [(256, 1, 0, (256, 1)), (256, 2, 0, (128, 1)), (256, 2, 32, (128, 4)), (30, 1, 8, (30, 5)), (7, 1, 3, (7, 7))],
)
def test_the_batch_is_shared_out(batch_size: int, processes: int, micro_batch: int, expected: tuple[int, int]) -> None:
    assert split_batch(batch_size, processes, micro_batch) == expected


@pytest.mark.parametrize(
    ("batch_size", "processes", "micro_batch", "message"),
    [
        (3, 4, 0, "a batch of 3 is smaller than the 4 processes"),
        (10, 4, 0, "a batch of 10 does not split over 4"),
        (8, 1, -1, "micro_batch is -1"),
    ],
)
def test_batches_that_do_not_split_are_refused(batch_size: int, processes: int, micro_batch: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_batch(batch_size, processes, micro_batch)


@dataclass(frozen=True)
class Poisoned(Objective):
    """iSD until one step, where the loss, or the gradient alone, is NaN."""

    step: int
    what: str

    @property
    def label_dropout(self) -> float:
        return 0.1

    @property
    def guided(self) -> bool:
        return False

    def __call__(self, flow_map: FlowMap, batch: Batch) -> Losses:
        losses = ISD()(flow_map, batch)
        if batch.draws.step != self.step:
            return losses
        zero = sum(parameter.sum() for parameter in flow_map.parameters()) * 0
        return replace(losses, loss=losses.loss + (math.nan if self.what == "loss" else zero.abs().sqrt()))


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("step", [1, 5])
def test_a_value_that_is_not_finite_stops_the_run(what: str, step: int, digits: Dataset, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    config = replace(TINY, objective=Poisoned(step, what))  # type: ignore[arg-type]
    trainer = Trainer(config, digits, run, MACHINE, None)
    for _ in range(step):
        trainer.take_step()
        if trainer.due(config.training.checkpoint_images):
            trainer.save()
    before, weights = snapshot(run.root), stored_weights(trainer)
    last = "step-00000003" if step > 3 else "there is no checkpoint yet"
    times = r"batch times t in \[0\.\d+, 0\.\d+\], s in \[\S+, 0\.\d+\]"
    with pytest.raises(TrainingDivergedError, match=rf"step {step + 1}: .*nan.*{times}.*{last}"):
        trainer.run_to_end()
    assert snapshot(run.root) == before
    assert all(torch.equal(value, weights[key]) for key, value in stored_weights(trainer).items())


def stored_weights(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of the weights and averages in memory."""
    averages = {f"{ema.name}/{key}": value.clone() for ema in trainer.emas for key, value in ema.weights.items()}
    return averages | {key: value.clone() for key, value in trainer.flow_map.network.state_dict().items()}


def test_several_averages_are_kept_and_stored(digits: Dataset, tmp_path: Path) -> None:
    """The constant average follows its formula, computed here from the weights of every step."""
    config = replace(TINY, training=replace(TINY.training, ema_power=(0.05, 0.2), ema_decay=(0.5,)))
    trainer = Trainer(config, digits, RunFolder(tmp_path), MACHINE, None)
    average = {key: value.double() for key, value in trainer.flow_map.network.state_dict().items()}
    for step in range(1, 7):
        trainer.take_step()
        beta = min(0.5, (1 + step) / (10 + step))
        for key, value in trainer.flow_map.network.state_dict().items():
            average[key] = beta * average[key] + (1 - beta) * value.double()
    trainer.save()
    folder = RunFolder(tmp_path).last_checkpoint()
    stored = load_file(folder / "ema-constant-0.5.safetensors")
    assert all(torch.allclose(stored[key].double(), value, atol=1e-6) for key, value in average.items())
    again = Trainer(config, digits, RunFolder(tmp_path), MACHINE, None)
    assert [ema.name for ema in again.emas] == ["power-0.05", "power-0.2", "constant-0.5"]
    assert all(torch.equal(value, stored_weights(trainer)[key]) for key, value in stored_weights(again).items())
    first, second = again.emas[0].weights, again.emas[1].weights
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_learning_rate_schedules_are_the_stated_functions() -> None:
    constant = OptimizerConfig(warmup_images=1000)
    assert [schedule(constant, images, 0.5) for images in (250, 1000, 5000)] == [0.25, 1, 1]
    cosine = replace(constant, warmup_images=0, decay="cosine")
    assert [schedule(cosine, 1, share) for share in (0, 1 / 3, 0.5, 1, 1.2)] == pytest.approx([1, 0.75, 0.5, 0, 0])
    root = replace(constant, decay="rsqrt", decay_images=2000)
    assert [schedule(root, images, 0.5) for images in (500, 2000, 8000, 18_000)] == pytest.approx(
        [0.5, 1, 1 / 2, 1 / 3]
    )


def test_the_schedule_reaches_every_optimizer(digits: Dataset, tmp_path: Path) -> None:
    config = replace(KINDS["muon"], optimizer=OptimizerConfig("muon", lr=1e-3, matrix_lr=4e-3, warmup_images=640))
    trainer = Trainer(config, digits, RunFolder(tmp_path), MACHINE, None)
    for _ in range(5):
        trainer.take_step()
    rates = [group["lr"] for optimizer in trainer.optimizers.optimizers for group in optimizer.param_groups]
    assert rates == pytest.approx([1e-3 / 4, 4e-3 / 4])
    trainer.write_log()
    assert RunFolder(tmp_path).read_log()[-1]["lr"] == pytest.approx(1e-3 / 4)


def test_muon_takes_the_matrices_of_the_trunk(digits: Dataset) -> None:
    """Each trunk matrix moves by Muon's orthogonal step: all its singular values are about equal."""
    flow_map = build(TINY, digits)
    optimizers = Optimizers(flow_map.network, OptimizerConfig("muon", lr=1e-9, matrix_lr=1e-2, warmup_images=0))
    before = {key: value.clone() for key, value in flow_map.network.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for parameter in flow_map.network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizers.step(1, 0.0)
    moved = {key: value - before[key] for key, value in flow_map.network.named_parameters()}
    large = [key for key, value in moved.items() if float(value.detach().abs().max()) > 1e-6]
    assert large == ["blocks.0.first.weight", "blocks.0.last.weight"]
    for key in large:
        singular = torch.linalg.svdvals(moved[key].detach())
        assert float(singular.max() / singular.min()) < 2.5


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_learns(name: str, digits: Dataset, tmp_path: Path) -> None:
    """The error of the anchor starts at the data's and the noise's variance and falls."""
    config = replace(
        TINY,
        network=MLPConfig(width=64, depth=1, embedding_width=16),
        optimizer=OptimizerConfig(name, lr=1e-2, matrix_lr=1e-2, warmup_images=0),  # type: ignore[arg-type]
        training=TrainingConfig(
            images=6400, batch_size=64, log_images=64, checkpoint_images=6400, sample_images=0, seed=3
        ),
    )
    train(config, digits, RunFolder(tmp_path), MACHINE)
    anchors = [record["anchor"] for record in RunFolder(tmp_path).read_log()]
    assert len(anchors) == 100
    assert anchors[0] > 1.2
    assert sum(anchors[-10:]) / 10 < 0.6 * anchors[0]


def test_bf16_computes_the_same_gradient_coarsely(digits: Dataset) -> None:
    """Guidance evaluates the network without gradient first; the pass with gradient must keep it."""
    flow_map = build(TINY, digits)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in flow_map.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    images, labels = digits.train.fetch(torch.arange(64))
    batch = Batch(images, labels, Draws(0, 0, torch.arange(64)))
    gradients = []
    for bf16 in (False, True):
        flow_map.zero_grad()
        loss, _, _ = TrainStep(flow_map, TINY.objective, bf16)(batch)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in flow_map.parameters() if p.grad is not None]))
    assert gradients[0].shape == gradients[1].shape
    assert float(torch.cosine_similarity(gradients[0], gradients[1], dim=0)) > 0.99
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-4)


def test_bf16_keeps_float32_weights(unbroken: Callable[[str], Path]) -> None:
    tensors = stored_tensors(unbroken("bf16"))
    assert {value.dtype for key, value in tensors.items() if "optimizer" not in key} == {torch.float32}
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())


def test_the_time_limit_stops_the_run(digits: Dataset, tmp_path: Path) -> None:
    config = replace(TINY, training=replace(TINY.training, images=10**9, seconds=0.3, checkpoint_images=10**9))
    result = train(config, digits, RunFolder(tmp_path), MACHINE)
    assert 0.3 <= result.seconds < 10
    assert 1 <= result.step < 10**7
    before = snapshot(tmp_path)
    assert train(config, digits, RunFolder(tmp_path), MACHINE).step == result.step
    assert snapshot(tmp_path) == before


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
        train(config, digits, RunFolder(unbroken("adamw")), MACHINE)
    assert snapshot(unbroken("adamw")) == before


def test_a_resume_on_other_data_is_refused(unbroken: Callable[[str], Path]) -> None:
    before = snapshot(unbroken("adamw"))
    other = load_dataset(DataConfig(seed=1))
    with pytest.raises(CheckpointError, match=r"data\.fingerprint: '\w+' -> '\w+'"):
        train(TINY, other, RunFolder(unbroken("adamw")), MACHINE)
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
        train(TINY, digits, RunFolder(root), MACHINE)


def test_an_optimizer_state_with_parameters_missing_is_refused(digits: Dataset) -> None:
    flow_map = build(TINY, digits)
    optimizers = Optimizers(flow_map.network, TINY.optimizer)
    for parameter in flow_map.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(1, 0.0)
    tensors = {key: value for key, value in optimizers.tensors().items() if not key.startswith("0.0.")}
    with pytest.raises(CheckpointError, match="does not fit a model"):
        Optimizers(flow_map.network, TINY.optimizer).load(tensors)


def test_a_folder_that_is_no_run_is_left_alone(digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="is not empty and holds no run"):
        train(TINY, digits, RunFolder(tmp_path), MACHINE)
    assert list(snapshot(tmp_path)) == ["letter.txt"]


def test_a_file_in_the_place_of_the_folder(digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        train(TINY, digits, RunFolder(tmp_path / "file"), MACHINE)
    with pytest.raises(CheckpointError, match=r"cannot write .*Not a directory"):
        train(TINY, digits, RunFolder(tmp_path / "file" / "below"), MACHINE)
    assert (tmp_path / "file").read_text() == "dear"


def test_the_watcher_sees_the_average_and_leaves_the_weights(digits: Dataset, tmp_path: Path) -> None:
    seen: list[tuple[int, Tensor, bool]] = []

    def watch(flow_map: FlowMap, step: int) -> None:
        seen.append((step, next(flow_map.parameters()).detach().clone(), flow_map.training))

    config = replace(TINY, training=replace(TINY.training, sample_images=160))
    trainer = Trainer(config, digits, RunFolder(tmp_path), MACHINE, watch)
    trainer.run_to_end()
    assert [step for step, _, _ in seen] == [5, 10]
    key = next(iter(dict(trainer.flow_map.network.named_parameters())))
    assert torch.equal(seen[-1][1], trainer.emas[0].weights[key])
    assert not torch.equal(seen[-1][1], dict(trainer.flow_map.network.named_parameters())[key])
    assert [training for _, _, training in seen] == [False, False]
    assert trainer.flow_map.training


def noise_and_times(flow_map: FlowMap) -> tuple[Tensor, Tensor, Tensor]:
    """Six points with times (t, s) across the path's range."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, *flow_map.sample_shape, generator=generator)
    t = torch.linspace(0.5, 1.0, 6, dtype=torch.float64) * flow_map.path.t_max
    return x, t, 0.3 * t


def test_load_gives_the_map_of_the_first_average(digits: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(TINY, digits, RunFolder(tmp_path), MACHINE, None)
    trainer.run_to_end()
    loaded = fewstep.load(tmp_path)
    with torch.no_grad():
        found = loaded.jump(*noise_and_times(loaded))
        raw = trainer.flow_map.jump(*noise_and_times(loaded))
        trainer.flow_map.network.load_state_dict(trainer.emas[0].weights)
        assert torch.equal(found, trainer.flow_map.jump(*noise_and_times(loaded)))
    assert not torch.equal(found, raw)
    assert not loaded.training


def test_a_saved_model_comes_back_exactly(unbroken: Callable[[str], Path], tmp_path: Path) -> None:
    flow_map = fewstep.load(unbroken("dropout"))
    flow_map.save_pretrained(tmp_path / "model")
    for again in (FlowMap.from_pretrained(tmp_path / "model"), fewstep.load(tmp_path / "model")):
        assert again.config == flow_map.config
        weights = flow_map.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in again.state_dict().items())
        with torch.no_grad():
            assert torch.equal(again.jump(*noise_and_times(again)), flow_map.jump(*noise_and_times(again)))
    assert callable(flow_map.push_to_hub)
