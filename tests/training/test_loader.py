"""Batches made by processes of their own: the same bits, the same errors, and nothing left behind."""

import io
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from fewstep.data.base import Dataset, Samples
from fewstep.data.sources import (
    DataConfig,
    DataSource,
    HuggingFaceSource,
    ImagesSource,
    WebdatasetSource,
    load_dataset,
)
from fewstep.networks.mlp import MLPConfig
from fewstep.training import Callbacks, RunFolder, train_run
from fewstep.training.callbacks import Callback, Moment
from fewstep.training.loader import Flag, Loader, Shares, _without_locks, serve
from fewstep.utils.errors import ConfigError, DataError, Stopped, TrainingDivergedError
from tests.support.sources import bytes_of
from tests.support.tiny import RUNTIME, TINY, assert_same_run, killed_after

WORKED = replace(RUNTIME, workers=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve grey and coloured images of several sizes in two classes."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(12):
        file = root / f"class-{i % 2}" / f"{i:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(bytes_of((6 + i, 8) if i % 3 == 0 else (9, 6 + i, 3), i)).save(file)
    return root


def on_disk(root: Path, **settings: object) -> DataConfig:
    return DataConfig(ImagesSource(on_disk=True), root=str(root), image_size=4, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [0, 1])
def test_images_on_disk_are_those_in_memory(channels: int, pictures: Path) -> None:
    config = on_disk(pictures, channels=channels)
    files, memory = load_dataset(config), load_dataset(replace(config, source=ImagesSource()))
    assert (files.fingerprint, files.mean, files.sigma_data) == (memory.fingerprint, memory.mean, memory.sigma_data)
    assert (files.summary, files.shape, files.data_range) == (memory.summary, memory.shape, memory.data_range)
    rows, mirror = torch.tensor([5, 0, 3]), torch.tensor([True, False, True])
    for part, other in ((files.train, memory.train), (pickle.loads(pickle.dumps(files.train)), memory.train)):
        for own, expected in zip(part.fetch(rows, mirror), other.fetch(rows, mirror), strict=True):
            assert torch.equal(own, expected)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"stay on disk are cut to one size: give it with --data\.image-size"):
        load_dataset(replace(config, image_size=0))


def in_tars(pictures: Path, root: Path) -> Path:
    """The same pictures in three tars with their classes."""
    files = sorted(pictures.rglob("*.png"), key=lambda file: file.name)
    for start in range(0, len(files), 5):
        with tarfile.open(root / f"{start}.tar", "w") as tar:
            for file in files[start : start + 5]:
                members = {file.name: file.read_bytes(), f"{file.stem}.cls": file.parent.name[-1].encode()}
                for name, content in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root


def in_rows(pictures: Path, root: Path) -> Path:
    """The same pictures as a Hugging Face dataset that was saved."""
    datasets = pytest.importorskip("datasets")
    files = sorted(pictures.rglob("*.png"), key=lambda file: file.name)
    values = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "label": [int(file.parent.name[-1]) for file in files],
    }
    classes = datasets.ClassLabel(names=["0", "1"])
    table = datasets.Dataset.from_dict(values, features=datasets.Features(image=datasets.Image(), label=classes))
    table.save_to_disk(root)
    return root


PLACES: dict[str, tuple[DataSource, Callable[[Path, Path], Path]]] = {
    "images": (ImagesSource(on_disk=True), lambda pictures, root: pictures),
    "webdataset": (WebdatasetSource(on_disk=True), in_tars),
    "hugging-face": (HuggingFaceSource(on_disk=True), in_rows),
}


@pytest.mark.parametrize("kind", ["webdataset", "hugging-face"])
def test_what_stays_where_it_lies_is_what_comes_into_memory(kind: str, pictures: Path, tmp_path: Path) -> None:
    """And, after a process has been sent it, the same again."""
    source, place = PLACES[kind]
    config = replace(on_disk(place(pictures, tmp_path)), source=source)
    there, memory = load_dataset(config), load_dataset(replace(config, source=type(source)()))
    assert (there.fingerprint, there.mean, there.sigma_data) == (memory.fingerprint, memory.mean, memory.sigma_data)
    assert (there.summary, there.class_names) == (memory.summary, memory.class_names)
    assert there.num_classes == 2
    assert load_dataset(config).fingerprint == there.fingerprint
    for part in (there.train, pickle.loads(pickle.dumps(there.train))):
        for own, expected in zip(part.fetch(torch.arange(4)), memory.train.fetch(torch.arange(4)), strict=True):
            assert torch.equal(own, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", PLACES)
def test_a_run_with_workers_is_the_run_without(
    kind: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed and gone on in mid-epoch, with two parts a step, and with another number of workers."""
    (tmp_path / "data").mkdir()
    source, place = PLACES[kind]
    data_config = replace(on_disk(place(pictures, tmp_path / "data"), heldout=0.2), source=source)
    data = load_dataset(data_config)
    config = replace(TINY, network=MLPConfig(width=8, depth=1, embedding_width=8), data=data_config)
    config = replace(config, optimizer=replace(TINY.optimizer, warmup_images=0))
    config = replace(config, training=replace(TINY.training, batch_size=8, images=56, checkpoint_images=24, flip=True))
    train_run(config, data, RunFolder(tmp_path / "plain"), replace(RUNTIME, micro_batch=4))
    with monkeypatch.context() as patch:
        patch.setattr("tests.support.tiny.RUNTIME", replace(WORKED, micro_batch=4))
        killed_after(4, config, data, tmp_path / "run", monkeypatch)
    train_run(config, data, RunFolder(tmp_path / "run"), replace(RUNTIME, workers=1, micro_batch=4))
    assert_same_run(tmp_path / "run", tmp_path / "plain")
    assert all(0 <= line["data_wait"] <= 1 for line in RunFolder(tmp_path / "run").read_log())


def test_a_file_that_is_damaged_later_is_named(pictures: Path, tmp_path: Path) -> None:
    """In one line, the same with workers and without."""
    data = load_dataset(on_disk(pictures))
    file = pictures / data.train.pictures.name(int(data.train.rows[2]))  # type: ignore[attr-defined]
    content, said = file.read_bytes(), []
    file.write_bytes(content[: len(content) // 2])
    for workers in (0, 1):
        shares = Shares(data.train, replace(TINY.training, batch_size=len(data.train)), 0, len(data.train), 1)
        loader = Loader(shares, torch.device("cpu"), workers)
        with pytest.raises(
            DataError, match=rf"{file.name}' in '.*' cannot be read \(.*\): mend or remove it$"
        ) as refused:
            loader.batch(0, 0)
        said.append(str(refused.value))
    file.write_bytes(content)
    assert said[0] == said[1]
    assert "\n" not in said[0]


def loader_of(digits: Dataset, workers: int, context: str | None = None) -> Loader:
    return Loader(Shares(digits.train, TINY.training, 0, 16, 2), torch.device("cpu"), workers, context)


def test_parts_come_in_order_and_from_any_one_on(digits: Dataset) -> None:
    plain, ahead = loader_of(digits, 0), loader_of(digits, 2)
    for step, part in ((0, 0), (0, 1), (1, 0), (7, 1), (8, 0)):
        first, second = plain.batch(step, part), ahead.batch(step, part)
        assert torch.equal(first.x0, second.x0)
        assert torch.equal(first.draws.indices, second.draws.indices)
        assert torch.equal(first.host_labels, second.host_labels)  # type: ignore[arg-type]
    ahead.close()


class Faulty(Samples):
    """Samples of a user's own, which fail in a way that fewstep does not know."""

    def fetch(self, *args: Any, **settings: Any) -> Any:
        raise RuntimeError("row 7 is bad")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_data_raise_is_raised_by_the_training(digits: Dataset, workers: int) -> None:
    data = replace(digits, train=Faulty(*digits.train.fetch(torch.arange(32))))
    with pytest.raises(RuntimeError, match=r"^row 7 is bad") as caught:
        loader_of(data, workers).batch(0, 0)
    assert workers == 0 or "in fetch" in caught.value.__notes__[0]


def test_processes_leave_signals_to_the_training_and_a_killed_one_is_said(digits: Dataset) -> None:
    loader = loader_of(digits, 1)
    loader.batch(0, 0)
    (worker,) = loader._coming._workers  # type: ignore[union-attr]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(worker.pid, number)
    for part in range(1, 6):
        loader.batch(part // 2, part % 2)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"^a process that reads the data has ended \(.*\): .*--runtime\.workers$"):
        [loader.batch(part // 2, part % 2) for part in range(6, 20)]
    worker.join(5)
    assert not worker.is_alive()


@pytest.mark.parametrize("context", [None, "spawn"])
def test_processes_are_told_to_end_without_a_lock(context: str | None, digits: Dataset) -> None:
    """One that is killed with an event's lock in hand lets nobody end."""
    loader = loader_of(digits, 2, context)
    loader.batch(0, 0)
    coming: Any = loader._coming
    told, processes = coming._workers_done_event, coming._workers
    assert isinstance(told, Flag)
    assert not told.is_set()
    del coming
    loader.close()
    assert told.is_set()
    assert [process.exitcode for process in processes] == [0, 0]


class Many(TorchDataset[torch.Tensor]):
    """So many samples, of 256 KiB each, that they are being handed over whenever a process is told to end."""

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.empty(1 << 16)


def test_a_process_that_hands_over_a_batch_ends_well() -> None:
    """Python's own end of a started process aborts it there, which the training would be told as an error."""
    coming: Any = iter(
        DataLoader(
            Many(),
            batch_size=None,
            sampler=itertools.count(),
            num_workers=2,
            prefetch_factor=100,
            multiprocessing_context=_without_locks("spawn"),
            worker_init_fn=serve,
        )
    )
    next(coming)
    processes = coming._workers
    del coming
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]


def fail() -> None:
    """What a process that reads data does where its own code ends it."""
    serve(0)
    assert not Flag(multiprocessing.get_context()).is_set()
    sys.exit(3)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_process_that_fails_says_so(context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one that was told to end leaves as if all were well, whatever the training saw before it forked."""
    monkeypatch.setattr(Flag, "seen", True)
    process = multiprocessing.get_context(context).Process(target=fail)  # type: ignore[attr-defined]
    process.start()
    process.join(60)
    assert process.exitcode == 3


def test_ten_steps_are_watched(digits: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run of ten the last five."""
    train_run(TINY, digits, RunFolder(tmp_path / "run"), replace(RUNTIME, profile=True))
    said = capsys.readouterr().out.splitlines()
    assert "5 steps watched, their trace in" in said[0]
    assert len(said) == 6
    assert "ms a step  aten::" in said[1]
    assert (tmp_path / "run" / "profile.json").stat().st_size > 1000


@pytest.mark.parametrize("step", [3, 5, 8])
@pytest.mark.parametrize("error", [Stopped("stopped", 143), TrainingDivergedError("diverged")])
def test_a_run_that_ends_early_says_what_was_watched(
    error: BaseException, step: int, digits: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Ending(Callback):
        def step(self, moment: Moment) -> None:
            if moment.step == step:
                raise error

    run = RunFolder(tmp_path / "run")
    with pytest.raises(type(error)):
        train_run(TINY, digits, run, replace(RUNTIME, profile=True), Callbacks(also=(Ending(),)))
    said = capsys.readouterr().out.splitlines()
    if step == 8:
        assert said[0].startswith("3 steps watched, their trace in")
    else:
        ending = f"as this start ended after {step} steps: the first 5 warm up, the next 10 are watched"
        assert said == [f"no step was watched, {ending}"]
    assert (run.root / "profile.json").exists() == (step == 8)
