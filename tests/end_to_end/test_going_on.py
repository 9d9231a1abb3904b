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
from fewstep.training import RunFolder
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
