"""Processor time of training steps of recipes, on one thread."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

from benchmarks.harness import take_turns, trainer_of
from fewstep.objectives.losses import Comparison
from fewstep.recipes import recipe
from fewstep.training.log import Window
from fewstep.training.loop import Trainer


def compare(names: tuple[str, str], steps: int) -> None:
    """Print the median step of both recipes, in turns, and the ratio."""
    with contextlib.ExitStack() as held:
        trainers = {name: held.enter_context(trainer_of(recipe(name))) for name in names}
        spent = take_turns({name: trainer.take_step for name, trainer in trainers.items()}, steps, time.process_time)
    medians = [statistics.median(spent[name]) for name in names]
    for name, median in zip(names, medians, strict=True):
        print(f"{name}: {1000 * median:.0f} ms a step")
    print(f"ratio {medians[0] / medians[1]:.2f}")


@contextlib.contextmanager
def without_statistics() -> Iterator[None]:
    """Inside, a step looks at its loss and gradient norm alone."""
    with (
        patch.object(Trainer, "ends_line", False),
        patch.object(Window, "add_terms", lambda self, logs: None),
        patch.object(Comparison, "sizes", lambda self: {}),
    ):
        yield


def gradient_stats_cost(name: str, rounds: int, batch: int) -> str:
    """One line: by how much the log's gradient statistics lengthen a step of a recipe, median (smallest to largest).

    A round is the steps between two lines of the log, so that the backward pass of each term, taken once a line, counts
    as often as in training. "Without": neither those passes, nor the sizes of prediction, target and derivative, nor
    any per-sample value of the log. batch: 0 for the recipe's.
    """
    config = recipe(name)
    training = replace(config.training, batch_size=batch or config.training.batch_size)
    steps = max(1, training.log_images // training.batch_size)
    with trainer_of(replace(config, training=training)) as trainer:

        def seconds() -> float:
            started = time.process_time()
            for _ in range(steps):
                trainer.take_step()
            return time.process_time() - started

        seconds()
        ratios = []
        for _ in range(rounds):
            spent = seconds()
            with without_statistics():
                ratios.append(spent / seconds())
    middle, low, high = (100 * (value - 1) for value in (statistics.median(ratios), min(ratios), max(ratios)))
    return f"{name}: {middle:+.1f} % ({low:+.1f} to {high:+.1f}), a line of the log every {steps} steps"
