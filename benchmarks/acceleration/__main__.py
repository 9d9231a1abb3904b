"""Does a computed preconditioning train faster? CTM students of one teacher, by method and seed, paired.

Students of one seed share the teacher's weights as a start, the order of the data and all random numbers; only the
method differs.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from benchmarks.acceleration import anatomy as parts
from benchmarks.acceleration.students import GRID, PLANS, Cell, Truth, chosen, train_cell
from benchmarks.acceleration.tables import draw, tables
from benchmarks.harness import Cache, Seeds, Study, Worker
from fewstep import load, load_dataset
from fewstep.evaluation.metrics.features import default_extractor
from fewstep.recipes import recipe

STUDY = Study("acceleration", tables, draw, GRID)


def measured_against(recipe_name: str, teacher: Path, cache: Path | None) -> tuple[Any, ...]:
    """The teacher, the data, and the features of a classifier of the same data with their classes."""
    data = recipe(recipe_name).data
    extractor = default_extractor(load_dataset(replace(data, labels=True)), cache=cache)
    return load(teacher).flow_map, load_dataset(data), extractor


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
    if unknown := sorted(set(methods) - set(chosen(dataset))):
        raise SystemExit(f"no method {', '.join(unknown)}; methods: {', '.join(chosen(dataset))}")
    truth = Truth(PLANS[dataset], *measured_against(PLANS[dataset].recipe, teacher, cache))
    cells = [Cell(dataset, name, seed) for seed in seeds for name in methods]
    GRID.run(cells, lambda cell: [train_cell(cell, teacher, truth)], worker)


def anatomy(
    dataset: Annotated[str, Positional], teacher: Path, models: Path, seeds: Seeds = (0,), cache: Cache = None
) -> None:
    """Why is the Frechet distance of two calls worse with the computed preconditioning? Take two-call samples apart.

    Args:
        dataset: digits or mixture
        teacher: run folder of the trained teacher
        models: folder for the students' weights; one that is there is not trained again
    """
    subject = parts.SUBJECTS[dataset]
    scene = parts.Scene(subject, *measured_against(subject.recipe, teacher, cache))
    for seed in seeds:
        parts.store(dataset, seed, parts.take_apart(scene, teacher, seed, models / dataset / f"seed-{seed}"))


if __name__ == "__main__":
    STUDY.main(run=run, anatomy=anatomy)
