"""What each of two processes does in test_processes.py: commands, a loss that is NaN in one of them, a time limit."""

import json
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from fewstep.cli.main import main
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.flow.flow_map import FlowMap
from fewstep.networks.mlp import MLPConfig
from fewstep.objectives import ALONE, ISD, Batch, Companions, Losses, Objective
from fewstep.recipes.config import RunConfig, TrainingConfig
from fewstep.training import RunFolder, Runtime, train_run
from fewstep.utils.errors import TrainingDivergedError

RANK = int(os.environ["RANK"])
RUNTIME = Runtime(cpu=True, threads=1, quiet=True)
BASE = RunConfig(
    recipe="pair",
    network=MLPConfig(width=16, depth=1, embedding_width=16),
    training=TrainingConfig(images=320, batch_size=32, sample_images=0),
)


@dataclass(frozen=True)
class PoisonedHere(Objective):
    """iSD, but NaN from the second step on in the second process alone."""

    @property
    def guided(self) -> bool:
        return False

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        losses = ISD()(flow_map, batch)
        return replace(losses, loss=losses.loss * math.nan) if RANK and batch.draws.step else losses


def run(folder: Path, commands: list[list[str]]) -> None:
    """The three parts; every process writes what it saw."""
    assert [main(words) for words in commands] == [0] * len(commands)
    data = load_dataset(DataConfig())
    try:
        train_run(replace(BASE, objective=PoisonedHere()), data, RunFolder(folder / "diverged"), RUNTIME)  # type: ignore[arg-type]
    except TrainingDivergedError as error:
        (folder / f"diverged-{RANK}.txt").write_text(str(error))

    clock = time.perf_counter
    time.perf_counter = lambda: clock() * (1 + 2 * RANK)  # a second process whose clock is three times as fast
    limited = replace(BASE, training=replace(BASE.training, images=10**9, seconds=0.5))
    result = train_run(limited, data, RunFolder(folder / "limited"), RUNTIME)
    (folder / f"steps-{RANK}.txt").write_text(str(result.step))


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
