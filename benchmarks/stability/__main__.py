"""Which objectives train few-step models stably, how well, and at what cost: objective by objective, cell by cell.

A cell is an objective with one setting of network, path, preconditioning, derivative, optimizer, learning rate, start
and seed; cells of one seed share the order of the data and all random numbers. Measured with the averaged weights
against held-out data. Objectives have their papers' settings as far as they carry over to so short runs: curricula and
slow averages are stretched over the run, pseudo-Huber's constant follows the dimension.

diverged: a loss, gradient or sample that is not finite. degenerate: finite, but one-step samples vary less than a
quarter of what the data vary, or more than four times (total variance of pixels). narrow: one-step samples vary within
classes less than a quarter of the data; not of flow matching, which in one step has no such variance. classless: a
classifier finds the class that was asked for less than twice as often as by chance.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import cache as cached
from functools import partial
from pathlib import Path

import torch

from benchmarks.cost.setting import take_step, warm
from benchmarks.harness import Row, Study, take_turns, write
from benchmarks.stability.measure import Reference, flow_matching_model, train_cell
from benchmarks.stability.plan import GRID, STUDIES, Cell, configuration, objectives
from benchmarks.stability.tables import COSTS, figures, tables
from fewstep.data import load_dataset
from fewstep.objectives import Companions

SHAPES = {"digits": (1, 8, 8), "fashion": (1, 28, 28)}
STUDY = Study("stability", tables, figures, GRID)


def run(
    group: str = "",
    objective: str = "",
    seeds: tuple[int, ...] = (0, 1, 2),
    worker: str = "0/1",
    cache: Path | None = None,
    models: Path = Path("runs/stability"),
) -> None:
    """Train the cells that have no result yet, in order.

    Args:
        group: only cells of this group
        objective: only cells of this objective
        seeds: only cells of these seeds
        worker: i/n takes every n-th cell, from the i-th
        cache: folder of trained feature extractors
        models: where flow-matching models go that other cells start from
    """
    torch.set_num_threads(1)
    reference = cached(lambda key: Reference(load_dataset(STUDIES[key].data), cache))

    def measure(cell: Cell) -> list[Row]:
        own = reference((cell.dataset, "unet"))
        with tempfile.TemporaryDirectory() as folder:
            initial = "" if cell.initial == "random" else str(flow_matching_model(cell, own, models))
            return [train_cell(cell, configuration(cell, initial), own, Path(folder) / "run")]

    chosen = [cell for cell in GRID.cells().values() if cell.seed in seeds and objective in ("", cell.objective)]
    GRID.run([cell for cell in chosen if group in ("", cell.group)], measure, worker)


def cost(repeats: int = 8) -> None:
    """Time a step of every objective over one of flow matching's, taking turns, in the study's own networks.

    ratio: the median over turns; low and high are its quartiles. Loss and gradient alone, on weights away from their
    zeros, with the network itself as slow average and teacher.
    """
    torch.set_num_threads(1)
    rows: list[Row] = []
    for (dataset, network), study in STUDIES.items():
        flow_map, batch = warm(study.network, SHAPES[dataset], study.batch)
        named = {(name, "exact"): each for name, each in objectives(study, "exact").items()}
        for name, each in objectives(study, "finite-difference").items():
            named |= {} if each == named[name, "exact"] else {(name, "finite-difference"): each}
        own = Companions(teacher=flow_map, ema_target=flow_map)
        jobs = {key: partial(take_step, each, flow_map, batch, own) for key, each in named.items()}
        seconds = take_turns(jobs, repeats)
        base = seconds["flow matching", "exact"]
        for (name, derivative), spent in seconds.items():
            quartiles = statistics.quantiles([a / b for a, b in zip(spent, base, strict=True)], n=4)
            low, ratio, high = (round(each, 3) for each in quartiles)
            rows.append(
                {"dataset": dataset, "network": network, "objective": name, "derivative": derivative, "ratio": ratio}
                | {"low": low, "high": high, "batch": study.batch, "seconds": round(statistics.median(spent), 5)}
            )
            print(f"{dataset:8} {network:10} {name:34} {derivative:18} {ratio:6.2f} ({low:.2f}-{high:.2f})", flush=True)
    write(COSTS, rows)


if __name__ == "__main__":
    STUDY.main(run=run, cost=cost)
