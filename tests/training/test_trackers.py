"""Trackers are given what the log says; one that is missing or cannot start is one line."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch.utils
from accelerate.utils import LoggerType

from fewstep.data.base import Dataset
from fewstep.training import RunFolder, train_run
from fewstep.training.settings import TrackerName
from fewstep.utils.errors import MissingExtraError, UnsupportedError
from tests.support.tiny import RUNTIME, TINY

AVAILABLE = "accelerate.tracking._available_trackers"
EVERY: tuple[TrackerName, ...] = ("tensorboard", "wandb", "trackio")


@pytest.mark.parametrize("name", EVERY)
def test_a_tracker_that_is_missing_is_named_and_leaves_no_folder(
    name: TrackerName, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AVAILABLE, [])
    with pytest.raises(MissingExtraError, match=rf"{name} is not installed: pip install tensorboard trackio wandb"):
        train_run(TINY, digits, RunFolder(tmp_path / "run"), replace(RUNTIME, track=(name,)))
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_is_given_what_the_log_says(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that stands in for TensorBoard's; a resumed run tells it from where on older events are dropped."""
    writers: list[MagicMock] = []

    def make(folder: str, purge_step: int) -> MagicMock:
        writers.append(MagicMock(folder=folder, purge_step=purge_step))
        return writers[-1]

    monkeypatch.setattr(AVAILABLE, [LoggerType.TENSORBOARD])
    monkeypatch.setattr(torch.utils, "tensorboard", MagicMock(SummaryWriter=make), raising=False)
    run, runtime = RunFolder(tmp_path / "run"), replace(RUNTIME, track=("tensorboard",))
    train_run(TINY, digits, run, runtime)
    (writer,) = writers
    assert (writer.folder, writer.purge_step) == (str(run.root / "tensorboard" / "fewstep"), 1)
    last = run.read_log()[-1]
    calls = writer.add_scalar.call_args_list
    said = [call.args for call in calls if call.kwargs["global_step"] == last["images"]]
    assert set(said) == set(last.items())
    writer.close.assert_called_once()
    train_run(TINY, digits, run, runtime)
    assert writers[1].purge_step == TINY.training.images + 1


def test_a_tracker_that_cannot_start_is_one_line(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AVAILABLE, [LoggerType.TENSORBOARD])
    failing = MagicMock(SummaryWriter=MagicMock(side_effect=RuntimeError("no\nlogin")))
    monkeypatch.setattr(torch.utils, "tensorboard", failing, raising=False)
    with pytest.raises(UnsupportedError, match=r"^the run cannot be tracked \(no login\): log in"):
        train_run(TINY, digits, RunFolder(tmp_path), replace(RUNTIME, track=("tensorboard",)))
    train_run(TINY, digits, RunFolder(tmp_path), RUNTIME)


@pytest.mark.parametrize("name", EVERY)
def test_installed_trackers_write_without_a_network(
    name: TrackerName, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(name)
    train_run(TINY, digits, RunFolder(tmp_path / "run"), replace(RUNTIME, track=(name,)))
    written = {
        "tensorboard": "run/tensorboard/fewstep/events*",
        "wandb": "run/wandb/offline-run-*",
        "trackio": "trackio/*",
    }
    assert list(tmp_path.glob(written[name]))
