"""Processes that look after each other: here as threads, with the connections that processes have."""

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from accelerate import Accelerator

from fewstep.data.sources import DataConfig, load_dataset
from fewstep.evaluation import align
from fewstep.training import RunFolder, peers, teacher_samples, train_run
from fewstep.training.parallel import Agreement
from fewstep.training.peers import Peers
from fewstep.utils.errors import ConfigError, ProcessLostError
from tests.support.tiny import RUNTIME, TEACHER

COUNT = 3


class Said:
    """What the first says, to all: the port and the secret."""

    def __init__(self) -> None:
        self.values = [queue.SimpleQueue[float]() for _ in range(COUNT)]

    def of(self, index: int) -> Agreement:
        class Own:
            def first(_, value: float) -> float:
                for each in self.values if index == 0 else ():
                    each.put(value)
                return self.values[index].get(timeout=10)

        return cast(Agreement, Own())


@pytest.fixture
def all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Peers]]:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(peers, "PATIENCE", 2.0)
    said, made = Said(), dict[int, Peers]()

    def make(index: int) -> None:
        made[index] = Peers(RunFolder(tmp_path / "run").way_on, index, COUNT, said.of(index))

    threads = [threading.Thread(target=make, args=(index,)) for index in range(COUNT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    yield [made[index] for index in range(COUNT)]
    for each in made.values():
        each.close()


@pytest.mark.parametrize("gone", range(COUNT))
def test_the_lost_process_is_named_by_all_others(all_of_them: list[Peers], gone: int) -> None:
    all_of_them[gone].close(RuntimeError("of its own"))
    for index, each in enumerate(all_of_them):
        if index != gone:
            found = each.explanation(RuntimeError("Connection closed by peer"))
            assert isinstance(found, ProcessLostError)
            assert str(found) == f"process {gone} of {COUNT} is lost; there is no checkpoint yet"


def test_errors_of_ones_own_stay_what_they_are(all_of_them: list[Peers], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PATIENCE", 0.3)
    assert all_of_them[0].explanation(RuntimeError("a shape")) is None
    all_of_them[1].close(RuntimeError())
    assert all_of_them[0].explanation(ConfigError("an option")) is None
    assert all_of_them[0].explanation(None) is None


def test_one_that_has_ended_by_itself_is_not_lost(all_of_them: list[Peers], monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless another comes to wait for it."""
    ended: list[int] = []
    monkeypatch.setattr(peers, "GRACE", 0.1)
    monkeypatch.setattr(os, "_exit", ended.append)
    all_of_them[1].close()
    assert all_of_them[0]._gone.wait(5)
    assert (all_of_them[0].lost, all_of_them[0].left) == (-1, {1})
    assert "process 1 of 3" in str(all_of_them[0].explanation(RuntimeError()))
    all_of_them[0].close()
    all_of_them[2].close()
    assert ended == []


def test_one_that_is_silent_is_lost_and_who_waits_for_it_is_ended(
    all_of_them: list[Peers], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = queue.SimpleQueue[int]()
    monkeypatch.setattr(os, "_exit", ended.put)
    monkeypatch.setattr(peers, "BEAT", 100.0)
    monkeypatch.setattr(peers, "GRACE", 0.2)
    monkeypatch.setattr(peers, "SILENT", 1.0)
    assert ended.get(timeout=10) == 2
    assert "is lost; there is no checkpoint yet" in capfd.readouterr().err


def test_inside_watching_an_error_that_a_lost_process_brings_is_that_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(peers, "PATIENCE", 2.0)
    said, raised = Said(), dict[int, BaseException]()
    monkeypatch.setattr(peers, "Agreement", lambda _: said.of(int(threading.current_thread().name)))

    def work(index: int) -> None:
        try:
            with peers.watching(cast(Accelerator, SimpleNamespace(num_processes=2, process_index=index)), lambda: "on"):
                raise KeyError("its own") if index else RuntimeError("Connection closed by peer")
        except BaseException as error:
            raised[index] = error

    threads = [threading.Thread(target=work, args=(index,), name=str(index)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (type(raised[1]), type(raised[0])) == (KeyError, ProcessLostError)
    assert str(raised[0]) == "process 1 of 2 is lost; on"


def test_statistics_are_estimated_and_samples_drawn_under_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = RunFolder(tmp_path / "teacher")
    train_run(TEACHER, load_dataset(DataConfig()), teacher, RUNTIME)
    inside: list[str] = []
    seen: list[tuple[object, ...]] = []

    @contextmanager
    def watching(_: Accelerator, way_on: Callable[[], str]) -> Iterator[None]:
        inside.append(way_on())
        yield
        inside.clear()

    def estimate(*_: object) -> tuple[Path, str]:
        seen.append(tuple(inside))
        raise KeyboardInterrupt

    for module in (align, teacher_samples):
        monkeypatch.setattr(module, "watching", watching)
    monkeypatch.setattr(teacher_samples, "draw_set", lambda folder, *_: seen.append((folder, *inside)))
    monkeypatch.setattr(align, "teacher_statistics", estimate)
    student = replace(TEACHER, teacher=str(teacher.root), data=DataConfig("teacher-samples"))  # type: ignore[arg-type]
    teacher_samples.run_data(student, RunFolder(tmp_path / "run"), cpu=True)
    folder = tmp_path / "run" / "teacher-samples"
    assert seen.pop() == (folder, f"the samples in {folder} are kept: the same command goes on")
    inside.clear()
    with pytest.raises(KeyboardInterrupt):
        align.measure_statistics(teacher, load_dataset(DataConfig()), {}, "", None, cpu=True)
    assert seen == [("nothing of the estimate is kept: start the same command again",)]


def test_one_process_alone_has_no_thread(tmp_path: Path) -> None:
    alone = Peers(RunFolder(tmp_path).way_on, 0, 1, Agreement(1))
    assert alone.explanation(RuntimeError()) is None
    assert "fewstep-peers" not in {thread.name for thread in threading.enumerate()}
    alone.close()
