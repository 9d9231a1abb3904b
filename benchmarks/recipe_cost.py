"""What a step of one recipe costs in steps of another, on this machine, for a comparison at equal cost.

    python benchmarks/recipe_cost.py fashion-mnist-unet fashion-mnist-flow-matching [--steps 20]

Both train in one process, one step after the other in turns, on one thread; medians of processor time.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import torch

from fewstep.data import load_dataset
from fewstep.recipes import recipe
from fewstep.training import Callbacks, RunFolder, Runtime
from fewstep.training.loop import Trainer


def seconds(trainer: Trainer) -> float:
    """Processor time of the next step."""
    started = time.process_time()
    trainer.take_step()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs=2)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as held:
        trainers = []
        for name in options.recipes:
            config = recipe(name)
            run = RunFolder(Path(folder) / name)
            dataset, runtime = load_dataset(config.data), Runtime(cpu=True, quiet=True)
            trainers.append(held.enter_context(Trainer(config, dataset, run, runtime, Callbacks())))
            trainers[-1].flow_map.train()
        spent = [[seconds(trainer) for trainer in trainers] for _ in range(options.steps + 2)][2:]
    first, second = (statistics.median(times) for times in zip(*spent, strict=True))
    for name, median in zip(options.recipes, (first, second), strict=True):
        print(f"{name}: {1000 * median:.0f} ms a step")
    print(f"ratio {first / second:.2f}")


if __name__ == "__main__":
    main()
