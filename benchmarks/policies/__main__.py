"""Robot policies: regression, flow matching and iSD on the same demonstrations, network and budget, task by task.

A cell is a task, a method and a training seed; all cells of a task have the same network, batch, steps and learning
rate, those of one seed the same initial weights and order of the data. Methods: regression (least squares), flow
matching (by Euler's method in 16, 4, 2 and 1 calls), iSD (2 calls and 1), and iSD from the weights of the flow-matching
policy of the same seed, which has then seen twice the samples.
"""

from pathlib import Path

import torch

from benchmarks.harness import Seeds, Study, Worker
from benchmarks.policies.run import GRID, METHODS, TASKS, measure, plan
from benchmarks.policies.tables import draw, tables

STUDY = Study("policies", tables, draw, GRID)


def run(
    tasks: tuple[str, ...] = TASKS,
    methods: tuple[str, ...] = tuple(METHODS),
    seeds: Seeds = (0, 1, 2),
    worker: Worker = "0/1",
    work: Path = Path("runs/policies-study"),
) -> None:
    """Train the cells that have no result yet, and let each act from 50 starts that no demonstration had.

    A task's demonstrations, 100 episodes of its expert, 300 of fetch-retrieve's, are recorded unless they are there.

    Args:
        tasks: names of tasks
        methods: names of methods
        work: where demonstrations and trained policies are kept
    """
    torch.set_num_threads(1)  # faster than two for networks this small
    chosen = [cell for cell in plan(tasks, seeds) if cell.method in ("expert", *methods)]
    GRID.run(chosen, lambda cell: measure(cell, work), worker)


if __name__ == "__main__":
    STUDY.main(run=run)
