"""Does a computed preconditioning train faster? CTM students of one teacher, by method and seed, paired.

Students of one seed share the teacher's weights as a start, the order of the data and all random numbers; only the
method differs. A ratio of 2 means half the steps to equal quality, to the worst final value among all runs of both
methods, which every run reaches: the ratio is symmetric. Time counts until a curve stays there.
"""

import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from tyro.conf import Positional, arg

from benchmarks.acceleration import anatomy as parts
from benchmarks.acceleration.students import GRID, LEVELS, PLANS, Cell, Truth, methods, train_cell
from benchmarks.harness import FIGURES, Cache, Row, Seeds, Study, Worker, chosen, grouped, markdown, put, read, show
from fewstep import load, load_dataset
from fewstep.evaluation.metrics.curves import common_target, mean_curve, speedup
from fewstep.evaluation.metrics.features import default_extractor
from fewstep.evaluation.report.comparison import Course, Panel, comparison_curves
from fewstep.evaluation.report.numbers import NOTHING, number
from fewstep.recipes import recipe

INTERMEDIATE = "all jumps to levels in between"
BETWEEN = (INTERMEDIATE, 1)
UNSTEADY = tuple((f"jump {jump}", 1) for jump in ("80 -> 12.9", "80 -> 1.9", "12.9 -> 1.9"))
"""Jumps whose curves rise before they fall."""
ABOVE = (*UNSTEADY, *((f"jump {start} -> 0.59", 1) for start in (80, 12.9, 1.9)))
CALLS = [(measure, calls) for measure in ("sample", "frechet") for calls in (1, 2, 4)]
SHOWN = (("jump 80 -> 0.002", 1), ("jump 0.59 -> 0.002", 1), BETWEEN, *ABOVE, *CALLS)
AT_END = (*ABOVE, ("sample", 2), ("frechet", 2), ("frechet", 4))
ABLATIONS = (
    "16384 samples", "4096 samples", "1024 samples", "64 samples", "not shrunk", "own statistics", "s only", "raw",
    "l only", "forward",
)  # fmt: skip
OTHERS = ("euler", "analytic", "euler, adversarial", "analytic, adversarial", "CD, multistep")
KEYS = ("g", "needed", "output_rmse", "rmse")
Curve = list[tuple[float, float]]


def curves(cells: list[Row], method: str, measure: str, nfe: int) -> dict[int, Curve]:
    """Seed -> [(step, value)] of one data set's cells; INTERMEDIATE: root mean square over jumps that
    stop above the data end.
    """
    found: dict[int, Curve] = {}
    for cell in chosen(cells, method=method):
        values: dict[int, list[float]] = {}
        for row in chosen(cell["curve"], nfe=nfe):
            above = row["measure"].startswith("jump") and not row["measure"].endswith(f"-> {LEVELS[-1]:g}")
            if above if measure == INTERMEDIATE else row["measure"] == measure:
                values.setdefault(row["step"], []).append(row["value"])
        if values:
            found[cell["seed"]] = [(step, math.hypot(*own) / len(own) ** 0.5) for step, own in values.items()]
    return found


def compare(cells: list[Row], baseline: str, method: str, measure: str, nfe: int) -> Row | None:
    """How many times fewer steps `method` takes than `baseline` over the seeds that both have, on one data set.

    at_start: runs that are at the target at their first moment, whose time is only known to be no longer; where there
    are any, the ratio and its ends are None. final: means of the last values, the baseline's first. None where a method
    lacks the measure, or a run ends without a finite value.
    """
    both = [curves(cells, name, measure, nfe) for name in (baseline, method)]
    seeds = both[0].keys() & both[1].keys()
    slow, fast = ({seed: own[seed] for seed in seeds} for own in both)
    target = common_target([*slow.values(), *fast.values()]) if seeds else math.nan
    if not math.isfinite(target):
        return None
    found = speedup(slow, fast, [target])
    known = (None, None, None) if found.at_start else (found.ratio, found.low, found.high)
    final = [fmean(curve[-1][1] for curve in own.values()) for own in (slow, fast)]
    return dict(zip(("ratio", "low", "high"), known, strict=True)) | {"at_start": found.at_start, "final": final}


def tables() -> dict[str, str]:
    """The page's tables."""
    cells = {dataset: chosen(GRID.rows(), dataset=dataset) for dataset in PLANS}
    digits = cells["digits"]
    main = {(key, name): compare(own, "euler", "analytic", *key) for key in SHOWN for name, own in cells.items()}
    ablated = {name: compare(digits, "analytic", f"analytic, {name}", *BETWEEN) for name in ABLATIONS}
    paces = {f"{name}, adversarial": compare(digits, name, f"{name}, adversarial", *BETWEEN) for name in parts.BOTH}
    ends = {
        (name, nfe): fmean(own[-1][1] for own in curves(digits, name, "frechet", nfe).values())
        for name in OTHERS
        for nfe in (1, 2, 4)
    }
    return {
        "Ratio of steps, Euler over computed": markdown(
            ("ratio of steps", *PLANS),
            [(named(*key) + " *" * (key in UNSTEADY), *(ratio(main[key, d]) for d in PLANS)) for key in SHOWN],
        ),
        "Error at the end, Euler and computed": markdown(
            ("error at the end, Euler / computed", *PLANS),
            [(named(*key), *(at_end(key[0], main[key, d]) for d in PLANS)) for key in AT_END],
        ),
        "Ablations on digits": markdown(
            ("variant", "error", "ratio to the default"),
            [(name, f"{row['final'][1]:#.3g}", ratio(row)) for name, row in ablated.items() if row],
        ),
        "Other methods on digits": markdown(
            ("Fréchet distance", "1 call", "2 calls", "4 calls", "jumps to levels in between, ratio to without"),
            [
                (name, *(number(ends[name, nfe]) for nfe in (1, 2, 4)), ratio(paces[name]) if name in paces else "")
                for name in OTHERS
            ],
        ),
        "From Euler's to the computed preconditioning, mixture": anatomy_table(
            chosen(read(parts.ANATOMY), dataset="mixture")
        ),
        "Every last jump from every first, digits": two_call_table(chosen(read(parts.ANATOMY), dataset="digits")),
    }


def named(measure: str, nfe: int) -> str:
    """A measure as the page calls it."""
    calls = "" if measure.startswith(("jump", "all")) else f", {nfe} call{'s' if nfe > 1 else ''}"
    return measure.replace("->", "→").replace("frechet", "Fréchet distance").replace("sample", "sample error") + calls


def ratio(row: Row | None) -> str:
    """The ratio and its interval; a dash where there is none."""
    if row is None or row["ratio"] is None:
        return NOTHING
    return f"{row['ratio']:.2f}" + ("" if row["low"] is None else f" ({row['low']:.2f}–{row['high']:.2f})")


def at_end(measure: str, row: Row | None) -> str:
    """Both methods' last values, the better one bold."""
    if row is None:
        return NOTHING
    first, second = (format(value, "#.3g" if measure == "frechet" else ".3g") for value in row["final"])
    if float(first) == float(second):
        return f"{first} / {second}"
    return f"**{first}** / {second}" if float(first) < float(second) else f"{first} / **{second}**"


def anatomy_table(rows: list[Row]) -> str:
    """Of jumps that stop above the data end: how figures change between the two methods, means over seeds."""
    heads = ("`g` falls by", "the network must give more by", "the network's error grows by", "the jump's error")
    lines = []
    for high, low in ((80, 1.9), *parts.JUMPS):
        own = {key: chosen(rows, student=key, components="1-16", **{"from": high, "to": low}) for key in parts.BOTH}
        euler, computed = ({key: fmean(row[key] for row in own[name]) for key in KEYS} for name in parts.BOTH)
        change = {key: computed[key] / euler[key] for key in KEYS}
        lines.append((f"{high:g} → {low:g}", *(f"{1 / v if key == 'g' else v:.2f}" for key, v in change.items())))
    return markdown(("jump", *heads), lines)


def two_call_table(rows: list[Row]) -> str:
    """Frechet distance, a mean over seeds, by the two jumps; "teacher" is its ODE."""
    lasts, lines = ("teacher", *parts.BOTH), []
    for (kind, first), own in grouped(rows, lambda row: (row["kind"], row.get("first"))).items():
        values = ([row["frechet"] for row in chosen(own, last=last)] for last in lasts)
        shown = (f"{fmean(each):.2f}" if each else "" for each in values)
        lines += [(first + ", stretched" * (kind == "stretched"), *shown)] if first else []
    return markdown(("first jump by", *(f"last jump by {last}" for last in lasts)), lines)


def draw() -> None:
    """Learning curves of Euler and analytic, a row of panels for each data set."""
    panels = []
    for dataset in PLANS:
        cells = chosen(GRID.rows(), dataset=dataset)
        for measure in (BETWEEN, ("sample", 2), ("frechet", 1), ("frechet", 2)):
            courses = []
            for method in ("euler", "analytic"):
                found = curves(cells, method, *measure).values()
                mean = mean_curve([[(step * cells[0]["batch"], value) for step, value in own] for own in found])
                courses.append(Course(method, mean.images, mean.mean, mean.low, mean.high))
            panels.append(Panel(f"{dataset}: {named(*measure)}", tuple(courses)))
    (FIGURES / "acceleration.png").write_bytes(comparison_curves(panels, columns=4))


STUDY = Study("acceleration", tables, draw, GRID)


def measured_against(dataset: str, teacher: Path, cache: Path | None) -> tuple[Any, ...]:
    """The teacher, the data, and the features of a classifier of the same data with their classes."""
    data = recipe(PLANS[dataset].recipe).data
    extractor = default_extractor(load_dataset(replace(data, labels=True)), cache=cache)
    return load(teacher).flow_map, load_dataset(data), extractor


def run(
    dataset: Annotated[str, Positional],
    teacher: Path,
    names: Annotated[tuple[str, ...], arg(name="methods")] = ("euler", "analytic"),
    seeds: Seeds = (0, 1, 2),
    worker: Worker = "0/1",
    cache: Cache = None,
) -> None:
    """Train the students of a data set that have no result yet.

    DATASET is mixture, digits, digits-long or fashion, TEACHER the run folder of the trained teacher.
    """
    if unknown := sorted(set(names) - set(methods(dataset))):
        raise SystemExit(f"no method {', '.join(unknown)}; methods: {', '.join(methods(dataset))}")
    truth = Truth(PLANS[dataset], *measured_against(dataset, teacher, cache))
    cells = [Cell(dataset, name, seed) for seed in seeds for name in names]
    GRID.run(cells, lambda cell: [train_cell(cell, teacher, truth)], worker)


def anatomy(
    dataset: Annotated[str, Positional], teacher: Path, models: Path, seeds: Seeds = (0,), cache: Cache = None
) -> None:
    """Why is the Frechet distance of two calls worse with the computed preconditioning? Take two-call samples apart.

    Of DATASET, digits or mixture. Students' weights are kept in MODELS; one that is there is not trained again.
    """
    scene = parts.Scene(parts.SUBJECTS[dataset], *measured_against(dataset, teacher, cache))
    for seed in seeds:
        rows = parts.take_apart(scene, teacher, seed, models / dataset / f"seed-{seed}")
        show(rows)
        put(parts.ANATOMY, rows, "dataset", "seed")


if __name__ == "__main__":
    STUDY.main(run=run, anatomy=anatomy)
