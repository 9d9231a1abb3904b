"""Does a computed preconditioning train faster? CTM students of one teacher, by method and seed, paired.

Students of one seed share the teacher's weights as a start, the order of the data and all random numbers; only the
method differs.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from benchmarks.acceleration import anatomy as parts
from benchmarks.acceleration.students import GRID, PLANS, TEACHERS, Cell, Truth, chosen, train_cell
from benchmarks.acceleration.tables import figures, tables
from benchmarks.harness import Cache, Seeds, Study, Worker
from fewstep.data.sources import load_dataset
from fewstep.evaluation.metrics.features import default_extractor
from fewstep.recipes import recipe
from fewstep.training import load

STUDY = Study("acceleration", tables, figures, GRID)


def run(
    dataset: Annotated[str, Positional],
    teacher: Path,
    methods: tuple[str, ...] = ("euler", "analytic"),
    seeds: Seeds = (0, 1, 2),
    worker: Worker = "0/1",
    cache: Cache = None,
) -> None:
    """Train the students of a data set that have no result yet.

    Args:
        dataset: mixture, digits, digits-long or fashion
        teacher: run folder of the trained teacher
        methods: names of methods
    """
    unknown = sorted(set(methods) - set(chosen(dataset)))
    if unknown:
        raise SystemExit(f"no method {', '.join(unknown)}; methods: {', '.join(chosen(dataset))}")
    plan, data = PLANS[dataset], recipe(PLANS[dataset].recipe).data
    extractor = default_extractor(load_dataset(replace(data, labels=True)), cache=cache)
    truth = Truth(plan, load_dataset(data), load(teacher).flow_map, extractor)
    if (dataset,) not in TEACHERS.names():
        floor = {"frechet": truth.frechet(truth.samples, 1), "samples": len(truth.samples)}
        TEACHERS.add([{"dataset": dataset, **floor, "extractor": extractor.name}])
    cells = [Cell(dataset, name, seed) for seed in seeds for name in methods]
    GRID.run(cells, lambda cell: [train_cell(cell, teacher, truth)], worker)
    figures()


def anatomy(
    dataset: Annotated[str, Positional],
    teacher: Path,
    models: Path,
    seeds: Seeds = (0,),
    cache: Cache = None,
) -> None:
    """Why is the Frechet distance of two calls worse with the computed preconditioning? Take two-call samples apart.

    Args:
        dataset: digits, mixture or fashion
        teacher: run folder of the trained teacher
        models: folder for the students' weights; one that is there is not trained again
    """
    data = recipe(parts.SUBJECTS[dataset].recipe).data
    extractor = default_extractor(load_dataset(replace(data, labels=True)), cache=cache)
    scene = parts.Scene(parts.SUBJECTS[dataset], load(teacher).flow_map, load_dataset(data), extractor)
    for seed in seeds:
        parts.store(dataset, seed, parts.take_apart(scene, teacher, seed, models / dataset / f"seed-{seed}"))


if __name__ == "__main__":
    STUDY.main(run=run, anatomy=anatomy)
