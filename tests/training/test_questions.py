"""A whole step of training, with optimizers, averages and a discriminator, asks its device nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.engine.questions import Questions
from fewstep.data.base import Dataset
from fewstep.flow.guidance import DrawnGuidance
from fewstep.objectives import ISD
from fewstep.recipes.config import RunConfig
from fewstep.training import Callbacks, RunFolder
from fewstep.training.loop import Trainer
from fewstep.utils.errors import TrainingDivergedError
from tests.support.tiny import KINDS, RUNTIME, TINY, student


def unseen(step: Callable[[], Any]) -> Callable[[], Any]:
    def stepped() -> Any:
        with _disable_current_modes():
            return step()

    return stepped


@pytest.mark.parametrize("kind", ["muon", "flips", "ctm-adversarial"])
def test_a_step_asks_nothing_until_it_is_read(
    kind: str, digits: Dataset, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of the three steps looks at the gradient term by term; two parts a step."""
    flips = replace(TINY, objective=ISD(guidance=DrawnGuidance()), training=replace(TINY.training, flip=True))
    configs: dict[str, RunConfig] = {"muon": KINDS["muon"], "flips": flips}
    config = configs[kind] if kind in configs else student(kind, teacher)
    config = replace(config, gan=replace(config.gan, start_images=0))
    config = replace(config, training=replace(config.training, log_images=96))
    runtime = replace(RUNTIME, micro_batch=16)
    with Trainer(config, digits, RunFolder(tmp_path / "run"), runtime, Callbacks()) as trainer:
        trainer.take_step()
        if (gan := trainer.learner.gan) is not None:  # its optimizer counts steps on the host, wherever it is
            monkeypatch.setattr(gan.optimizer.optimizer, "step", unseen(gan.optimizer.optimizer.step))
        with Questions() as questions:
            trainer.take_step()
            trainer.take_step()
        assert questions.asked == []
        assert len(trainer.window.waiting) == 3
        trainer.write_log()
        assert trainer.window.waiting == []
    assert RunFolder(tmp_path / "run").read_log()[-1]["step"] == 3


def test_steps_that_wait_are_read_before_they_are_many(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no line of the log is due for long; the step that was not finite is named, not the one that was last."""
    monkeypatch.setattr("fewstep.training.log.Window.MOST", 4)
    rare = replace(TINY, training=replace(TINY.training, log_images=10**9, checkpoint_images=10**9))
    wild = replace(rare, optimizer=replace(rare.optimizer, lr=1e30, clip=0.0, warmup_images=0))
    with (
        Trainer(wild, digits, RunFolder(tmp_path), RUNTIME, Callbacks()) as trainer,
        pytest.raises(TrainingDivergedError, match=r"step [23]: .*left its range first, at step [12] "),
    ):
        trainer.run_to_end()
    assert [line["step"] for line in RunFolder(tmp_path).read_log()][-1] in (2, 3)
