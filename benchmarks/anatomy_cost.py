"""What the gradient anatomy in the log costs: steps of a recipe with it and without, in turns.

    python benchmarks/anatomy_cost.py [digits digits-unet ...] [--rounds 6]

A round is as many steps as lie between two lines of the log, so that the backward pass of each term, taken once a line,
counts as often as in training. "Without" leaves out those passes, the sizes of prediction, target and derivative, and
all per-sample values of the log. One thread; processor time; median over rounds, smallest and largest.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from fewstep.data import load_dataset
from fewstep.objectives.pairs import Comparison
from fewstep.recipes import recipe
from fewstep.training import Callbacks, RunFolder, Runtime
from fewstep.training.log import Window
from fewstep.training.loop import Trainer


@contextlib.contextmanager
def without_anatomy() -> Iterator[None]:
    """Inside, a step looks at its loss and gradient norm alone."""
    with (
        patch.object(Trainer, "ends_line", False),
        patch.object(Window, "add_terms", lambda self, logs: None),
        patch.object(Comparison, "sizes", lambda self: {}),
    ):
        yield


def seconds(trainer: Trainer, steps: int) -> float:
    """Processor time of the next steps."""
    started = time.process_time()
    for _ in range(steps):
        trainer.take_step()
    return time.process_time() - started


def measure(name: str, rounds: int, batch: int) -> str:
    """One line: by how much the anatomy lengthens a step of a recipe, with batches of `batch` (0: the recipe's)."""
    config = recipe(name)
    training = replace(config.training, batch_size=batch or config.training.batch_size)
    config, runtime = replace(config, training=training), Runtime(cpu=True, quiet=True)
    steps = max(1, training.log_images // training.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "run")
        with Trainer(config, load_dataset(config.data), run, runtime, Callbacks()) as trainer:
            trainer.flow_map.train()
            seconds(trainer, steps)
            ratios = []
            for _ in range(rounds):
                spent = seconds(trainer, steps)
                with without_anatomy():
                    ratios.append(spent / seconds(trainer, steps))
    middle, low, high = (100 * (value - 1) for value in (statistics.median(ratios), min(ratios), max(ratios)))
    return f"{name}: {middle:+.1f} % ({low:+.1f} to {high:+.1f}), a line of the log every {steps} steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=["digits", "digits-unet"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=0, help="of every recipe; 0 for its own")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.recipes:
        print(measure(name, options.rounds, options.batch_size), flush=True)


if __name__ == "__main__":
    main()
