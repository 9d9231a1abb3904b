"""Does a student train faster when its jumps let the Gaussian's flow map through? CTM students by method, paired.

Students of one seed share the teacher's weights as a start, the order of the data and all random numbers; only the
preconditioning, what the network sees and where jumps are compared differ. Measures, searched step times and ratios are
those of `benchmarks.acceleration`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

import benchmarks.skip.learnability as fits
import fewstep as fs
from benchmarks.acceleration.__main__ import at_end, compare, curves, measured_against, named, ratio
from benchmarks.acceleration.students import PLANS, Plan, Truth, digest_of, train_student
from benchmarks.acceleration.students import methods as of_acceleration
from benchmarks.harness import FIGURES, RESULTS, Cache, Grid, Seeds, Study, Worker, chosen, markdown
from fewstep.evaluation.metrics.curves import mean_curve
from fewstep.evaluation.report.comparison import Course, Panel, comparison_curves
from fewstep.flow.preconditioning.skip import SkipPreconditioningConfig

DATASETS: dict[str, Plan] = {
    "mixture": PLANS["mixture"],
    "digits": PLANS["digits"],
    "fashion": replace(PLANS["fashion"], moments=(25, 50, 100, 150, 200, 300)),
}
CALLS = [(measure, calls) for measure in ("sample", "frechet") for calls in (1, 2, 4)]
BASELINE = "euler"
FAMILIES: dict[str, dict[str, Any]] = {
    "covariance": {},
    "regressed": {"family": "regressed"},
    "components": {"family": "regressed-components"},
    "length": {"family": "regressed-length"},
}
"""The skip's families: the Gaussian's map, and what a teacher's trajectories say, as one number, along each component,
and with the Gaussian's lengths."""
JUMP_END = ", jump end"
"""Of a method's name: jumps are compared where they end, not at the data end."""


@cache
def methods(dataset: str) -> dict[str, fs.RunConfig]:
    """Every method on a data set: Euler's as published, with one or two things changed. U-Nets see their skip."""
    plan, known = DATASETS[dataset], of_acceleration(dataset)
    euler = known["euler"]
    euler = replace(euler, training=replace(euler.training, images=plan.moments[-1] * euler.training.batch_size))

    def skip(seen: bool, **settings: Any) -> fs.RunConfig:
        model = replace(euler.model, preconditioning=SkipPreconditioningConfig(**settings))
        return replace(euler, model=model, network=replace(euler.network, sees_skip=seen))  # type: ignore[call-arg]

    seen = isinstance(euler.network, fs.UNetConfig)
    forms = {BASELINE: euler, "analytic": replace(euler, model=known["analytic"].model)}
    forms |= {name: skip(seen, **settings) for name, settings in FAMILIES.items()}
    forms |= {} if seen else {"covariance, seen": skip(True)}
    at_end = replace(euler.objective, compare="jump-end")  # type: ignore[call-arg]
    return forms | {name + JUMP_END: replace(form, objective=at_end) for name, form in forms.items()}


@dataclass(frozen=True)
class Cell:
    """A student: data set (a key of DATASETS), method and seed."""

    dataset: str
    method: str
    seed: int


def settings(cell: Cell) -> str:
    """The digest of what a cell trains and how it is measured, whatever its seed and teacher."""
    return digest_of(methods(cell.dataset)[cell.method], DATASETS[cell.dataset])


def plan() -> Iterator[Cell]:
    """Five seeds of the small networks, three of the U-Nets."""
    for dataset in DATASETS:
        seeds = range(5 if dataset in ("mixture", "digits") else 3)
        yield from (Cell(dataset, name, seed) for seed in seeds for name in methods(dataset))


GRID = Grid(RESULTS / "skip.jsonl", ("dataset", "method", "seed"), plan, settings)


def tables() -> dict[str, str]:
    found = {}
    for dataset in DATASETS:
        cells = chosen(GRID.rows(), dataset=dataset)
        names = [name for name in methods(dataset) if name != BASELINE and chosen(cells, method=name)]
        rows = {name: [compare(cells, BASELINE, name, *key) for key in CALLS] for name in names}
        heads = [named(*key).replace("Fréchet distance", "Fréchet").replace("sample error", "error") for key in CALLS]
        found[f"Ratio of steps to Euler's, {dataset}"] = markdown(
            ("method", *heads, "seeds"),
            [(name, *map(ratio, own), str(len(curves(cells, name, *CALLS[0])))) for name, own in rows.items()],
        )
        found[f"At the end, Euler's and the method's, {dataset}"] = markdown(
            ("method", *heads),
            [(name, *(at_end(key[0], row) for key, row in zip(CALLS, own, strict=True))) for name, own in rows.items()],
        )
    return found | fits.tables((*DATASETS,))


def draw() -> None:
    """Learning curves of every method, a row of panels for each data set."""
    panels = []
    for dataset, own in DATASETS.items():
        cells = chosen(GRID.rows(), dataset=dataset)
        batch = methods(dataset)[BASELINE].training.batch_size
        for measure in CALLS[:2] + CALLS[3:5] if cells and own else []:
            courses = []
            for method in methods(dataset):
                found = curves(cells, method, *measure).values()
                if found:
                    mean = mean_curve([[(step * batch, value) for step, value in each] for each in found])
                    courses.append(Course(method, mean.images, mean.mean, mean.low, mean.high))
            panels.append(Panel(f"{dataset}: {named(*measure)}", tuple(courses)))
    if panels:
        (FIGURES / "skip.png").write_bytes(comparison_curves(panels, columns=4))


STUDY = Study("skip", tables, draw, GRID)


def run(
    dataset: Annotated[str, Positional],
    teacher: Path,
    names: Annotated[tuple[str, ...], arg(name="methods")] = (),
    seeds: Seeds = (0, 1, 2, 3, 4),
    worker: Worker = "0/1",
    cache: Cache = None,
) -> None:
    """Train the students of a data set that have no result yet.

    DATASET is mixture, digits or fashion, TEACHER the run folder of the trained teacher.
    """
    if unknown := sorted(set(names) - set(methods(dataset))):
        raise SystemExit(f"no method {', '.join(unknown)}; methods: {', '.join(methods(dataset))}")
    truth = Truth(DATASETS[dataset], *measured_against(dataset, teacher, cache))
    cells = [Cell(dataset, name, seed) for seed in seeds for name in names or methods(dataset)]
    GRID.run(cells, lambda cell: [train_student(methods(dataset)[cell.method], cell.seed, teacher, truth)], worker)


def learnability(
    dataset: Annotated[str, Positional],
    teacher: Path,
    names: Annotated[tuple[str, ...], arg(name="forms")] = (),
    worker: Worker = "0/1",
) -> None:
    """Fit every form of a jump by plain regression on stored trajectories, and keep its errors.

    DATASET is mixture, digits or fashion, TEACHER the run folder of the trained teacher.
    """
    part, workers = (int(number) for number in worker.split("/"))
    known = list(names or fits.forms(dataset))
    fits.run(dataset, teacher, names, lambda name: known.index(name) % workers == part)


if __name__ == "__main__":
    STUDY.main(run=run, learnability=learnability)
