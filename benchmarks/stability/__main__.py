"""Which objectives train few-step models stably, how well, and at what cost: objective by objective, cell by cell.

docs/studies/stability.md says what a cell is, what it is measured by, and what counts as a failure.
"""

import statistics
import tempfile
from functools import cache as cached
from functools import partial
from pathlib import Path

import torch

from benchmarks.cost.setting import take_step, warm
from benchmarks.harness import Cache, Row, Seeds, Study, Worker, show, take_turns, time_ratio, write
from benchmarks.stability.measure import Reference, flow_matching_model, train_cell
from benchmarks.stability.plan import GRID, STUDIES, Cell, configuration, objectives
from benchmarks.stability.tables import COSTS, draw, tables
from fewstep import Companions, load_dataset

SHAPES = {"digits": (1, 8, 8), "fashion": (1, 28, 28)}
STUDY = Study("stability", tables, draw, GRID)


def run(
    group: str = "",
    objective: str = "",
    seeds: Seeds = (0, 1, 2),
    worker: Worker = "0/1",
    cache: Cache = None,
    models: Path = Path("runs/stability"),
) -> None:
    """Train the cells that have no result yet, in order.

    Args:
        group: only cells of this group
        objective: only cells of this objective
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

    Loss and gradient alone, on weights away from their zeros, with the network itself as slow average and teacher.
    """
    torch.set_num_threads(1)
    rows: list[Row] = []
    for (dataset, network), study in STUDIES.items():
        flow_map, batch = warm(study.network, SHAPES[dataset], study.batch)
        named = {(name, "exact"): each for name, each in objectives(study, "exact").items()}
        for name, each in objectives(study, "finite-difference").items():
            named |= {} if each == named[name, "exact"] else {(name, "finite-difference"): each}
        own = Companions(teacher=flow_map, ema_target=flow_map)
        spent = take_turns(
            {key: partial(take_step, each, flow_map, batch, own) for key, each in named.items()}, repeats
        )
        for (name, derivative), own_times in spent.items():
            labels = {"dataset": dataset, "network": network, "objective": name, "derivative": derivative}
            ratio = time_ratio(own_times, spent["flow matching", "exact"])
            rows.append(labels | ratio | {"batch": study.batch, "seconds": round(statistics.median(own_times), 5)})
            show(rows[-1:])
    write(COSTS, rows)


if __name__ == "__main__":
    STUDY.main(run=run, cost=cost)
