"""Going on by the command line: with the run's own options, from anywhere; and what is refused on the way."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from fewstep.cli.main import _interrupts
from fewstep.networks.base import Network
from fewstep.networks.mlp import MLPConfig
from fewstep.training import RunFolder, load
from fewstep.training.loop import Trainer
from tests.support.commands import SMALL, Command, contents

MACHINE = SMALL[6:]


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> RunFolder:
    """A run with a space in its name that lacks its last step."""
    root = tmp_path / "my run"
    shutil.copytree(small_run, root)
    shutil.rmtree(RunFolder(root).last_checkpoint())
    return RunFolder(root)


def test_a_run_goes_on_by_its_folder_alone(command: Command, run: RunFolder, small_run: Path) -> None:
    assert command("train", "--resume", run.root, *MACHINE).code == 0
    assert run.config() == RunFolder(small_run).config()
    ends = [contents(RunFolder(each).last_checkpoint()) for each in (run.root, small_run)]
    assert {name: ends[0][name] for name in ends[0] if name != "state.json"} == {
        name: ends[1][name] for name in ends[1] if name != "state.json"
    }
    assert command("train", f"--resume={run.root}", *MACHINE, "--training.keep", 9).code == 0
    assert run.config().training.keep == 9


def test_what_resume_takes(command: Command, run: RunFolder) -> None:
    for words in ((), ("--runtime.quiet",)):
        shown = command("train", "--resume", *words)
        assert (shown.code, "--resume needs the folder of a run" in shown.err) == (2, True)
    shown = command("train", "--resume", run.root, "--out", "elsewhere")
    assert (shown.code, "leave out --out" in shown.err) == (2, True)
    shown = command("train", "--resume", "nowhere")
    assert (shown.code, "nowhere is not a run" in shown.err) == (2, True)
    shown = command("train", "--resume", run.root, "--optimizer.lr", 1)
    assert shown.code == 2
    assert f"(fewstep train --resume '{run.root}')" in shown.err
    assert f"--initial '{run.root}' starts from its weights" in shown.err


def test_data_that_have_moved(command: Command, run: RunFolder, archive: Path, tmp_path: Path) -> None:
    record = json.loads(run.config_file.read_text())
    record["run"]["data"]["root"] = str(tmp_path / "gone.npz")
    run.config_file.write_text(json.dumps(record))
    with np.load(archive) as data:
        np.savez(tmp_path / "other.npz", images=255 - data["images"], labels=data["labels"])
    for words in (("train", "--resume", run.root, *MACHINE), ("evaluate", run.root), ("tune-steps", run.root)):
        shown = command(*words)
        assert (shown.code, "gone.npz" in shown.err, "--data.root" in shown.err) == (2, True, words[0] != "train")
    shown = command("evaluate", run.root, "--data.root", tmp_path / "other.npz")
    assert (shown.code, "holds other data than" in shown.err) == (2, True)
    few = ("--samples", 64, "--steps", 2, "--data.root", archive)
    assert command("evaluate", run.root, *few).code == 0
    assert command("tune-steps", run.root, *few, "--evaluations", 4).code == 0
    assert command("train", "--resume", run.root, *MACHINE, "--data.root", archive).code == 0


def test_a_signal_ends_a_command_with_its_code(
    command: Command, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step = Trainer.take_step

    def signalled(self: Trainer) -> None:
        signal.raise_signal(signal.SIGTERM)
        take_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", signalled)
        shown = command("train", "--resume", run.root, *MACHINE)
    assert shown.code == 143
    assert shown.err.endswith(f"step 10 is saved: fewstep train --resume '{run.root}' goes on\n")
    assert run.last_checkpoint().name == "step-00000010"


def test_an_interrupt_that_becomes_another_error_is_one_still() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

    def importing() -> None:
        with _interrupts():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt as error:
                raise ImportError("half done") from error

    with pytest.raises(KeyboardInterrupt):
        importing()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_a_configuration_is_compared_with_the_weights_before_there_is_memory_for_it(
    command: Command, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = ((run.last_checkpoint() / "config.json", "flow_map", 30_000), (run.config_file, "run", 3000))
    for file, part, width in stored:
        record = json.loads(file.read_text())
        record[part]["network"]["width"] = width
        file.write_text(json.dumps(record))
    build, devices = MLPConfig.build, []

    def building(self: MLPConfig, *args: object, **options: object) -> Network:
        network = build(self, *args, **options)  # type: ignore[arg-type]
        devices.append({parameter.device.type for parameter in network.parameters()})
        return network

    monkeypatch.setattr(MLPConfig, "build", building)
    for words in (("sample", run.root), ("sample", run.last_checkpoint()), ("evaluate", run.root)):
        shown = command(*words)
        assert (shown.code, "model.safetensors is of another architecture" in shown.err) == (2, True)
    shown = command("train", "--resume", run.root, *MACHINE)
    assert (shown.code, "weights.safetensors is of another architecture" in shown.err) == (2, True)
    assert devices == [{"meta"}] * 5


def test_a_run_that_cannot_be_written(command: Command, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No advice that cannot be followed: `evaluate` and `report` write into the run's own folder."""

    def locked(*args: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.replace", locked)
    shown = command("evaluate", run.root, "--samples", 64, "--steps", 1)
    assert shown.code == 2
    assert "Frechet" in shown.out
    assert "Read-only file system; make its folder writable, or work on a copy of it" in shown.err


LINKS = (
    "log.jsonl", "checkpoints", "checkpoints/step-00000009/weights.safetensors", "samples", "samples/step-00000005.png",
    "samples/deep/er", "statistics", "statistics/0123.json", "tensorboard", "tensorboard/fewstep",
    "tensorboard/fewstep/events.1", "wandb", "wandb/latest-run", "wandb/run-1/files/x", "figures.json", "new",
)  # fmt: skip


@pytest.mark.parametrize("link", LINKS)
def test_nothing_is_written_through_a_link_in_a_run(
    command: Command, run: RunFolder, tmp_path: Path, link: str
) -> None:
    """Wherever in the folders that are written to; by a training and by what measures."""
    path, target = run.root / link, tmp_path / "target"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.rename(target)
    else:
        target.mkdir()
        (target / "own").write_text("kept")
    path.symlink_to(target)
    before = contents(target) if target.is_dir() else target.read_bytes()
    for words in (("train", "--resume", run.root, *MACHINE), ("evaluate", run.root, "--samples", 8, "--steps", 1)):
        shown = command(*words)
        assert (shown.code, shown.err.count("\n")) == (2, 1), shown
        assert f"{link} is a link, which a run must not have" in shown.err
    assert (contents(target) if target.is_dir() else target.read_bytes()) == before


def test_links_within_a_trackers_own_folder_may_stay(command: Command, run: RunFolder) -> None:
    (run.root / "wandb" / "run-1").mkdir(parents=True)
    (run.root / "wandb" / "latest-run").symlink_to("run-1")
    assert command("train", "--resume", run.root, *MACHINE).code == 0


def test_statistics_are_not_written_through_a_link_in_a_teacher(
    command: Command, run: RunFolder, tmp_path: Path, archive: Path
) -> None:
    """A saved model is no run: its folder takes a run's statistics all the same."""
    words = ("--data.source", "npz", "--data.root", archive, "--data.labels", *SMALL[6:], "--training.images", 64)
    small = ("--network.width", 16, "--network.depth", 1, "--network.embedding-width", 16, "--training.batch-size", 32)
    assert command("train", "edm-digits", *words, *small, "--training.sample-images", 0, "--out", "teacher").code == 0
    load("teacher").save(tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model" / "statistics").symlink_to(tmp_path / "elsewhere")
    quick = ("--statistics.points", 8, "--statistics.samples", 16, "--evaluation.curve-images", 0)
    student = ("train", "ctm-digits", *words, *small, *quick, "--teacher", "model", "--out", "student")
    shown = command(*student)
    assert (shown.code, "model/statistics is a link" in shown.err) == (2, True), shown
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "model" / "statistics").unlink()
    assert command(*student, "--training.sample-images", 0).code == 0
