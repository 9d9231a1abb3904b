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
from fewstep.recipes import recipe
from fewstep.training import train_run

UNET = fs.UNetConfig(width=32, multipliers=(1, 2), blocks=1, attention=(), embedding_width=128)
"""A convolutional student of digits that two cores train in minutes."""
DATASETS: dict[str, Plan] = {
    "mixture": PLANS["mixture"],
    "digits": PLANS["digits"],
    "digits-unet": replace(PLANS["digits"], moments=(25, 50, 100, 200, 300)),
}
CALLS = [(measure, calls) for measure in ("sample", "frechet") for calls in (1, 2, 4)]
BASELINE = "euler"
FAMILIES = ("regressed", "regressed-components", "regressed-length")


@cache
def methods(dataset: str) -> dict[str, fs.RunConfig]:
    """Every method on a data set: Euler's as published, with one or two things changed."""
    plan = DATASETS[dataset]
    euler = of_acceleration("mixture" if dataset == "mixture" else "digits")["euler"]
    euler = replace(euler, training=replace(euler.training, images=plan.moments[-1] * euler.training.batch_size))
    if dataset == "digits-unet":
        euler = replace(euler, network=UNET)
    at_end = replace(euler.objective, compare="jump-end")  # type: ignore[call-arg]

    def skip(base: fs.RunConfig, seen: bool, **settings: Any) -> fs.RunConfig:
        model = replace(base.model, preconditioning=SkipPreconditioningConfig(**settings))
        return replace(base, model=model, network=replace(base.network, sees_skip=seen))  # type: ignore[call-arg]

    compared = replace(euler, objective=at_end)
    found = {
        BASELINE: euler,
        "euler, jump end": compared,
        "skip": skip(euler, seen=False),
        "skip, jump end": skip(compared, seen=False),
        "skip seen": skip(euler, seen=True),
        "skip seen, jump end": skip(compared, seen=True),
    }
    if dataset == "digits-unet":
        found["cosine skip seen"] = skip(euler, seen=True, basis="cosine")
    for family in FAMILIES:
        found[family] = skip(euler, seen=False, family=family)
        found[f"{family}, jump end"] = skip(compared, seen=False, family=family)
        found[f"{family} seen, jump end"] = skip(compared, seen=True, family=family)
    return found


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
    """Five seeds of the small networks, three of the U-Net."""
    for dataset in DATASETS:
        seeds = range(3 if dataset == "digits-unet" else 5)
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
    return found | fits.tables((*DATASETS, "fashion"))


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

    DATASET is mixture, digits or digits-unet, TEACHER the run folder of the trained teacher.
    """
    if unknown := sorted(set(names) - set(methods(dataset))):
        raise SystemExit(f"no method {', '.join(unknown)}; methods: {', '.join(methods(dataset))}")
    source = "mixture" if dataset == "mixture" else "digits"
    truth = Truth(DATASETS[dataset], *measured_against(source, teacher, cache))
    cells = [Cell(dataset, name, seed) for seed in seeds for name in names or methods(dataset)]
    GRID.run(cells, lambda cell: [train_student(methods(dataset)[cell.method], cell.seed, teacher, truth)], worker)


def learnability(
    dataset: Annotated[str, Positional],
    teacher: Path,
    names: Annotated[tuple[str, ...], arg(name="forms")] = (),
    worker: Worker = "0/1",
) -> None:
    """Fit every form of a jump by plain regression on stored trajectories, and keep its errors.

    DATASET is mixture, digits, digits-unet or fashion, TEACHER the run folder of the trained teacher.
    """
    part, workers = (int(number) for number in worker.split("/"))
    network = UNET if dataset == "digits-unet" else None
    known = list(names or fits.forms(dataset, network))
    fits.run(dataset, teacher, network, names, lambda name: known.index(name) % workers == part)


def teacher(folder: Annotated[Path, Positional]) -> None:
    """Train the U-Net that students of digits-unet are distilled from, `edm-digits` with another network, in FOLDER."""
    config = replace(recipe("edm-digits"), recipe="edm-digits-unet", network=UNET)
    train_run(config, fs.load_dataset(config.data), fs.RunFolder(folder), fs.Runtime(threads=1))


if __name__ == "__main__":
    STUDY.main(run=run, learnability=learnability, teacher=teacher)
