"""Does a student train faster when its jumps let the Gaussian's flow map through? CTM students by method, paired.

Students of one seed share the teacher's weights as a start, the order of the data and all random numbers; only the
preconditioning, what the network sees and where jumps are compared differ. Measures and searched step times are those
of `benchmarks.acceleration`.
"""

from itertools import chain
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

import benchmarks.skip.learnability as fits
import fewstep as fs
from benchmarks.acceleration.__main__ import curves, named
from benchmarks.acceleration.students import Truth, Walks, train_student
from benchmarks.harness import FIGURES, Cache, Row, Seeds, Study, Worker, chosen, put, rounded, show, write
from benchmarks.skip import outcome
from benchmarks.skip import scratch as from_scratch
from benchmarks.skip.cost import start_costs, step_costs
from benchmarks.skip.methods import (
    ALL,
    BASELINE,
    BEST,
    CLASSES,
    COMPONENTS,
    DATASETS,
    DRAWS,
    EVEN,
    FEW,
    FITTED,
    GRID,
    JUMP_END,
    LONG,
    ONE_CALL,
    Cell,
    loaded,
    methods,
    plain,
    plan,
    scene,
    teacher_of,
)
from benchmarks.skip.starts import UNTRAINED, draw_starts, measure_references, measure_untrained, references_table
from benchmarks.skip.starts import untrained as before_training
from fewstep.evaluation.metrics.curves import mean_curve
from fewstep.evaluation.report.comparison import Course, Panel, comparison_curves
from fewstep.training import train_run
from fewstep.training.teacher import fingerprint

SHOWN = (BASELINE, "covariance" + JUMP_END, BEST, BASELINE + DRAWS, BEST + DRAWS)
"""Methods that the figure has."""
_LENGTH = "length" + JUMP_END + DRAWS
MAIN = (
    ("analytic", BASELINE), (BASELINE + DRAWS, BASELINE), (BEST + DRAWS, BASELINE), (BEST + EVEN, BASELINE),
    ("regressed" + EVEN, BASELINE), (BEST + DRAWS + ONE_CALL, BASELINE), (BEST + DRAWS + ONE_CALL + FEW, BASELINE),
    (COMPONENTS + DRAWS, BASELINE), (COMPONENTS + DRAWS + ONE_CALL, BASELINE), (_LENGTH, BASELINE),
    (BEST + DRAWS, BASELINE + DRAWS), (BEST + EVEN, BASELINE + DRAWS), (COMPONENTS + DRAWS, BASELINE + DRAWS),
    *((name + which, BASELINE) for which in CLASSES for name in ("analytic", BEST + DRAWS)),
)  # fmt: skip
"""What the first table compares: a method and a baseline."""
Data = Annotated[Path | None, arg(help="photographs: the folder that `python benchmarks/photographs.py apart` cut")]
Dataset = Annotated[str, Positional]
Names = Annotated[tuple[str, ...], arg(name="methods")]


def rows() -> list[Row]:
    """Every method beside Euler's; those that draw the walk first beside Euler's with the published draws too."""
    names = {dataset: list(methods(dataset)) for dataset in DATASETS}
    drawn = {dataset: [name for name in methods(dataset) if DRAWS in name or EVEN in name] for dataset in DATASETS}
    found = outcome.acceleration(GRID.rows(), tuple(DATASETS), names, BASELINE)
    return found + outcome.acceleration(GRID.rows(), tuple(DATASETS), drawn, BASELINE + DRAWS)


def tables() -> dict[str, str]:
    found, own = {}, rows()
    found["Steps saved"] = outcome.summary(own, [(dataset, *pair) for dataset in DATASETS for pair in MAIN])
    for dataset in DATASETS:
        found[f"Ratio of steps to Euler's, {dataset}"] = outcome.table(own, dataset)
        found[f"Ratio of steps to Euler's with the published draws, {dataset}"] = outcome.table(
            own, dataset, BASELINE + DRAWS
        )
    for dataset in DATASETS:
        found[f"At the end, {dataset}"] = outcome.ends(own, dataset)
    for dataset in LONG:
        falling = dataset.endswith("-falling")
        how = "With a rate that falls to nothing" if falling else "Trained nine times as long"
        found[f"{how}, {plain(dataset)}"] = outcome.lasting(GRID.rows(), dataset, last=falling)
    found["What foretells the ratio"] = outcome.foretold(own, fits.known(tuple(DATASETS)))
    found["Before the first step"] = before_training()
    found["Fréchet distance of the teacher and of training data"] = references_table()
    found["From scratch"] = from_scratch.table()
    return found | fits.tables(FITTED)


def draw() -> None:
    """Learning curves of some methods, a row of panels for each data set; acceleration.json."""
    write(outcome.ACCELERATION, rounded(rows()))
    panels = []
    for dataset in DATASETS:
        cells = chosen(GRID.rows(), dataset=dataset)
        batch = methods(dataset)[BASELINE].training.batch_size
        for key in (outcome.Key(measure, calls) for measure in outcome.MEASURES for calls in (1, 2)) if cells else ():
            courses = []
            for method in SHOWN:
                found = curves(cells, method, *key).values()
                if found:
                    mean = mean_curve([[(step * batch, value) for step, value in each] for each in found])
                    courses.append(Course(method, mean.images, mean.mean, mean.low, mean.high))
            panels.append(Panel(f"{dataset}: {named(*key)}", tuple(courses)))
    if panels:
        (FIGURES / "skip.png").write_bytes(comparison_curves(panels, columns=4))


STUDY = Study("skip", tables, draw, GRID)


def run(
    dataset: Dataset,
    teacher: Path,
    names: Names = (),
    seeds: Seeds = (0, 1, 2, 3, 4),
    data: Data = None,
    worker: Worker = "0/1",
    cache: Cache = None,
    shared: bool = False,
) -> None:
    """Train the students of a data set that have no result yet, of the methods named, or all that the study has.

    shared: students of a seed share the teacher's walks, which are kept in memory; training is not timed then.
    DATASET is mixture, digits, fashion or photographs; digits-classes; mixture-long or digits-long; mixture-falling.
    TEACHER is the run folder of the trained teacher.
    """
    if dataset not in ALL:
        raise SystemExit(f"no data set {dataset}; data sets: {', '.join(ALL)}")
    if unknown := sorted(set(names) - set(methods(dataset))):
        raise SystemExit(f"no method {', '.join(unknown)}; methods: {', '.join(methods(dataset))}")
    if shared and dataset == "digits-classes":
        raise SystemExit("digits-classes: walks under a class are not shared; leave --shared out")
    if problem := outcome.strangers(chosen(GRID.rows(), dataset=dataset), fingerprint(fs.load(teacher).flow_map)):
        raise SystemExit(f"{teacher}: {problem}")
    truth = Truth(ALL[dataset], *scene(dataset, teacher, data, cache))
    cells = [Cell(dataset, name, seed) for seed in seeds for name in names or methods(dataset)]
    if not names:
        planned = set(plan())
        cells = [cell for cell in cells if cell in planned]
    walks: dict[int, Walks] = {}

    def student(cell: Cell) -> list[Row]:
        if shared and cell.seed not in walks:
            walks.clear()  # those of the seed before
            walks[cell.seed] = Walks()
        return [train_student(methods(dataset)[cell.method], cell.seed, teacher, truth, walks.get(cell.seed))]

    GRID.run(cells, student, worker)


def learnability(
    dataset: Dataset,
    teacher: Path,
    names: Annotated[tuple[str, ...], arg(name="forms")] = (),
    data: Data = None,
    worker: Worker = "0/1",
) -> None:
    """Fit every form of a jump by plain regression on stored trajectories, and keep its errors.

    DATASET is mixture, digits, digits-transformer, fashion or photographs, TEACHER the run folder of its teacher.
    """
    part, workers = (int(number) for number in worker.split("/"))
    known = list(names or fits.forms(dataset))
    fits.run(dataset, teacher, loaded(dataset, data), names, lambda name: known.index(name) % workers == part)


def cost(dataset: Dataset, teacher: Path, names: Names = (), data: Data = None, rounds: int = 15) -> None:
    """The time of a step of every method, or of some, over that of Euler's, in turns in one process.

    `--methods start` measures what is taken of the teacher before the first step instead, in steps of Euler's.
    """
    loading = loaded(dataset, data)
    found = (
        start_costs(dataset, teacher, loading, rounds)
        if names == ("start",)
        else step_costs(dataset, teacher, loading, rounds, names)
    )
    put(outcome.COST, rounded(found), "dataset", "method")
    show(found)


def starts(dataset: Dataset, teacher: Path, data: Data = None, steps: int = 300) -> None:
    """Draw what a jump gives before the first step, after 1 % and after 10 % of the steps, from the same noise."""
    draw_starts(dataset, teacher, loaded(dataset, data), steps, FIGURES / f"skip_starts_{dataset}.png")


def untrained(
    dataset: Dataset, teacher: Path, data: Data = None, cache: Cache = None, references: bool = False
) -> None:
    """Measure students of every form before their first step; references: the teacher and training data alone."""
    truth = Truth(ALL[dataset], *scene(dataset, teacher, data, cache))
    rows = measure_references(dataset, truth)
    for row in rows if references else chain(rows, measure_untrained(dataset, teacher, truth)):
        put(UNTRAINED, rounded([row]), "dataset", "method", "measure", "nfe")
        show([row])


def scratch(work: Annotated[Path, Positional], worker: Worker = "0/1") -> None:
    """Train the runs from scratch that have no result yet; WORK holds demonstrations and feature extractors."""
    from_scratch.GRID.run(from_scratch.plan(), lambda cell: from_scratch.measure(cell, work), worker)


def teacher(dataset: Dataset, folder: Annotated[Path, Positional], data: Data = None) -> None:
    """Train the teacher of a data set in FOLDER."""
    train_run(teacher_of(dataset), loaded(dataset, data), fs.RunFolder(folder), fs.Runtime(threads=1))


if __name__ == "__main__":
    STUDY.main(
        run=run,
        learnability=learnability,
        cost=cost,
        starts=starts,
        untrained=untrained,
        scratch=scratch,
        teacher=teacher,
    )
