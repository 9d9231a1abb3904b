"""What a caller adds to a run: events in their order, on a run whose bits they do not touch."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.data.base import Dataset
from fewstep.sampling.pipeline import Pipeline
from fewstep.training import Callback, Callbacks, Moment, RunFolder, Start, TrainingResult, train_run
from fewstep.training.clock import Clock
from fewstep.training.flops import StepCost
from fewstep.training.log import progress_bar, show_progress
from fewstep.utils.errors import FewstepWarning
from tests.support.tiny import RUNTIME, TINY, assert_same_run


class Listener(Callback):
    """A user's own: it notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def start(self, start: Start) -> None:
        self.told.append(("start", start))

    def step(self, moment: Moment) -> None:
        self.told.append(("step", moment))

    def log(self, record: Mapping[str, float]) -> None:
        self.told.append(("log", record["step"]))

    def checkpoint(self, folder: Path, step: int) -> None:
        assert (folder / "state.json").is_file()
        self.told.append(("checkpoint", step))

    def sample(self, pipeline: Pipeline, step: int) -> None:
        assert pipeline.generate(2, steps=1).samples.shape == (2, 1, 8, 8)
        self.told.append(("sample", step))

    def end(self, result: TrainingResult) -> None:
        self.told.append(("end", result.step))


def test_events_come_in_order_and_change_nothing(digits: Dataset, unbroken: Any, tmp_path: Path) -> None:
    listener = Listener()
    config = replace(TINY, training=replace(TINY.training, sample_images=160))
    train_run(config, digits, RunFolder(tmp_path / "run"), RUNTIME, Callbacks(also=(listener, Callback())))
    told = [(name, what) for name, what in listener.told if name not in ("start", "step")]
    assert told == [
        ("log", 2), ("checkpoint", 3), ("log", 4), ("sample", 5), ("log", 6), ("checkpoint", 6), ("log", 8),
        ("checkpoint", 9), ("log", 10), ("checkpoint", 10), ("sample", 10), ("end", 10),
    ]  # fmt: skip
    (start,) = [what for name, what in listener.told if name == "start"]
    assert (start.network, start.step, start.images, start.threads) == ("MLP", 0, 320, 1)
    moments = [what for name, what in listener.told if name == "step"]
    assert [moment.step for moment in moments] == list(range(1, 11))
    assert [moment.progress for moment in moments] == pytest.approx([step / 10 for step in range(1, 11)])
    assert all(math.isfinite(moment.loss) and moment.rate > 0 for moment in moments)
    assert_same_run(tmp_path / "run", unbroken("adamw"))


def test_checkpoints_are_made_by_time_too(digits: Dataset, unbroken: Any, tmp_path: Path) -> None:
    """With a limit that every step exceeds, after every step; the weights are the same."""
    listener = Listener()
    timed = replace(TINY, training=replace(TINY.training, checkpoint_seconds=1e-9))
    train_run(timed, digits, RunFolder(tmp_path / "run"), RUNTIME, Callbacks(also=(listener,)))
    assert [step for name, step in listener.told if name == "checkpoint"] == list(range(1, 11))
    assert_same_run(tmp_path / "run", unbroken("adamw"))


def test_what_a_callback_raises_ends_the_run(digits: Dataset, tmp_path: Path) -> None:
    class Enough(Callback):
        def step(self, moment: Moment) -> None:
            if moment.step == 4:
                raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        train_run(TINY, digits, RunFolder(tmp_path), RUNTIME, Callbacks(also=(Enough(),)))
    assert RunFolder(tmp_path).last_checkpoint().name == "step-00000003"


def test_a_run_that_ends_before_its_rate_has_risen_says_so(digits: Dataset, tmp_path: Path) -> None:
    slow = replace(TINY, optimizer=replace(TINY.optimizer, warmup_images=1280))
    with pytest.warns(FewstepWarning, match=r"learning rate had risen: it had come to 25% of 0.005; train longer"):
        train_run(slow, digits, RunFolder(tmp_path), RUNTIME)


def test_the_clock_foretells_the_end_of_this_start() -> None:
    """At a steady pace the time left is exact, whatever an earlier start took."""
    clock = Clock(TINY.training)
    assert clock.left == math.inf
    clock.take_up(4, 100.0)
    clock.step, clock.seconds = 6, 103.0
    assert clock.left == pytest.approx(6.0)
    assert clock.rate == pytest.approx(64 / 3)


def test_a_slow_bar_is_drawn_by_time(capsys: pytest.CaptureFixture[str]) -> None:
    """Every step is shown once the interval has passed, however few there are; nothing stays at 0 %."""
    clock = Clock(replace(TINY.training, images=32_000))
    with progress_bar(clock, "slow", False, "image") as bar:
        for step in range(1, 4):
            bar.last_print_t -= 1.0  # a second ago
            clock.step, clock.seconds = step, 1.0 * step
            show_progress(bar, clock, math.nan, 0.0, StepCost(torch.device("cpu")))
    shown = capsys.readouterr().err
    assert all(f"{percent}%" in shown for percent in ("0.1", "0.2", "0.3"))
    assert "96 images, 32 images/s" in shown
