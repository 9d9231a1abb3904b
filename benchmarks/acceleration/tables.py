"""The tables and the figure of the acceleration study, and results/acceleration.json.

Each method is compared with what it changes one thing of: `BASELINES`. A ratio of 2 means half the steps to equal
quality, to the worst final value among all runs of both methods, which every run reaches: the ratio is symmetric. Time
counts until a curve stays there.
"""

import math
import statistics
from collections.abc import Sequence

from benchmarks.acceleration.students import GRID, LEVELS
from benchmarks.harness import FIGURES, RESULTS, Row, chosen, markdown, read, write
from fewstep.evaluation.metrics.curves import common_target, mean_curve, speedup, time_to
from fewstep.evaluation.report.comparison import Course, Panel, comparison_curves
from fewstep.evaluation.report.numbers import NOTHING

COMPARED = RESULTS / "acceleration.json"
ANATOMY = RESULTS / "acceleration_anatomy.json"
DATASETS = ("mixture", "digits", "digits-long", "fashion")
INTERMEDIATE = "jumps to levels above the end"
BASELINES = {
    "analytic": ("euler", "CD, multistep"),
    "euler, adversarial": ("euler",),
    "analytic, adversarial": ("euler, adversarial", "analytic"),
    "CD, multistep": (),
    "euler": ("CD, multistep",),
}
"""What a method is compared with; an ablation of "analytic" that is not named, with that and with Euler."""


def curves_of(cell: Row) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """(measure, calls) -> [(steps, value)], with the RMS over all jumps that stop above the data end as one more."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    squares: dict[int, list[float]] = {}
    for row in cell["curve"]:
        found.setdefault((row["measure"], row["nfe"]), []).append((row["step"], row["value"]))
        name = row["measure"]
        if name.startswith("jump") and not name.endswith(f"-> {LEVELS[-1]:g}"):
            squares.setdefault(row["step"], []).append(row["value"] ** 2)
    if squares:
        found[INTERMEDIATE, 1] = [(step, (sum(v) / len(v)) ** 0.5) for step, v in sorted(squares.items())]
    return found


def geometric_mean(values: list[float | None]) -> float:
    """Of numbers of steps, all known: every curve reaches the common target."""
    return math.exp(sum(math.log(value) for value in values if value is not None) / len(values))


def compare_methods(cells: list[Row], baseline: str, method: str) -> list[Row]:
    """Rows of one data set: how many times fewer steps `method` takes than `baseline`, by measure and calls.

    at_start: runs that are at the target at their first moment, whose time is only known to be no longer; where there
    are any, the ratio and its ends are None. steps_*: of
    either method, geometric means over seeds; final_*: means of the last values. Measures that only one method has,
    and seeds, are left out; so is a measure at which a run ends without a finite value.
    """
    own_cells = [cell for cell in cells if cell["method"] in (baseline, method)]
    if len({cell.get("teacher") for cell in own_cells}) > 1:
        raise SystemExit(
            f"{baseline} and {method} on {cells[0]['dataset']} have different teachers: run one of them anew"
        )
    groups = {
        name: {cell["seed"]: curves_of(cell) for cell in own_cells if cell["method"] == name}
        for name in (baseline, method)
    }
    measures = set.intersection(*(set(curves) for group in groups.values() for curves in group.values()))
    seeds = sorted(set.intersection(*(set(group) for group in groups.values())))
    own = ("euler", "analytic") if (baseline, method) == ("euler", "analytic") else ("baseline", "method")
    rows = []
    for measure, nfe in sorted(measures) if seeds else ():
        slow, fast = ({seed: groups[name][seed][measure, nfe] for seed in seeds} for name in (baseline, method))
        target = common_target([*slow.values(), *fast.values()])
        if not math.isfinite(target):
            continue
        found = speedup(slow, fast, [target])
        steps = [geometric_mean([time_to(curves[seed], target) for seed in seeds]) for curves in (slow, fast)]
        known = (None, None, None) if found.at_start else (found.ratio, found.low, found.high)
        last = [sum(curves[seed][-1][1] for seed in seeds) / len(seeds) for curves in (slow, fast)]
        rows.append(
            {
                "dataset": cells[0]["dataset"], "method": method, "baseline": baseline, "measure": measure, "nfe": nfe,
                **dict(zip(("ratio", "low", "high"), known, strict=True)), "seeds": len(seeds), "target": target,
                f"steps_{own[0]}": steps[0], f"steps_{own[1]}": steps[1], "at_start": found.at_start,
                f"final_{own[0]}": last[0], f"final_{own[1]}": last[1],
            }
        )  # fmt: skip
    return rows


def pairs(methods: Sequence[str]) -> list[tuple[str, str]]:
    """(baseline, method) of every comparison among the methods that are there."""
    wanted = ((other, method) for method in sorted(methods) for other in BASELINES.get(method, ("analytic", "euler")))
    return [(other, method) for other, method in wanted if other in methods]


def comparisons(cells: list[Row]) -> list[Row]:
    """The rows of every data set and pair."""
    rows = []
    for dataset in DATASETS:
        own = chosen(cells, dataset=dataset)
        for baseline, method in pairs(list({cell["method"] for cell in own})):
            rows += compare_methods(own, baseline, method)
    return rows


SHOWN = (
    ("jump 80 -> 0.002", 1), ("jump 0.59 -> 0.002", 1), (INTERMEDIATE, 1), ("jump 80 -> 12.9", 1),
    ("jump 80 -> 1.9", 1), ("jump 12.9 -> 1.9", 1), ("jump 80 -> 0.59", 1), ("jump 12.9 -> 0.59", 1),
    ("jump 1.9 -> 0.59", 1), ("sample", 1), ("sample", 2), ("sample", 4), ("frechet", 1), ("frechet", 2),
    ("frechet", 4),
)  # fmt: skip
UNSTEADY = SHOWN[3:6]
"""Jumps whose curves rise before they fall."""
AT_END = (*SHOWN[3:9], ("sample", 2), ("frechet", 2), ("frechet", 4))
ABLATIONS = {
    "analytic, 16384 samples": "16,384 samples in place of 256", "analytic, 4096 samples": "4,096 samples",
    "analytic, 1024 samples": "1,024 samples", "analytic, 64 samples": "64 samples",
    "analytic, not shrunk": "not shrunk", "analytic, own statistics": "the student's own statistics, refreshed",
    "analytic, s only": "`s` only", "analytic, raw": "raw (about zero)", "analytic, l only": "`l` only",
    "analytic, forward": "forward form",
}  # fmt: skip


def tables() -> dict[str, str]:
    """The page's tables, and every row."""
    rows = read(COMPARED)
    against_euler = chosen(rows, baseline="euler", method="analytic")
    main = {(row["dataset"], row["measure"], row["nfe"]): row for row in against_euler}
    ablated = chosen(rows, dataset="digits", measure=INTERMEDIATE, baseline="analytic")
    return {
        "Ratio of steps, Euler over computed": markdown(
            ("ratio of steps", *DATASETS),
            [
                (named(*key) + (" *" if key in UNSTEADY else ""), *(ratio(main.get((d, *key))) for d in DATASETS))
                for key in SHOWN
            ],
        ),
        "Error at the end, Euler and computed": markdown(
            ("error at the end, Euler / computed", *DATASETS),
            [(named(*key), *(at_end(main[d, *key]) for d in DATASETS)) for key in AT_END],
        ),
        "Ablations on digits": ablation_table({row["method"]: row for row in ablated}),
        "Every last jump from every first, digits": two_call_table(read(ANATOMY)),
        "Every comparison": markdown(HEADS, [line(row) for row in rows]),
    }


def named(measure: str, nfe: int) -> str:
    """A measure as the page calls it."""
    if measure == INTERMEDIATE:
        return "all jumps to levels in between"
    calls = f", {nfe} call{'s' if nfe > 1 else ''}"
    return measure.replace("->", "→") if "jump" in measure else measure.replace("frechet", "Fréchet distance") + calls


def ratio(row: Row | None) -> str:
    """The ratio and its interval; a dash where there is none."""
    if row is None or row["ratio"] is None:
        return NOTHING
    return f"{row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f})"


def at_end(row: Row) -> str:
    """Both methods' last values, the better one bold."""
    form = "#.3g" if row["measure"] == "frechet" else ".3g"
    first, second = (format(row[f"final_{name}"], form) for name in ("euler", "analytic"))
    if float(first) == float(second):
        return f"{first} / {second}"
    return f"**{first}** / {second}" if float(first) < float(second) else f"{first} / **{second}**"


def ablation_table(rows: dict[str, Row]) -> str:
    """Variants of the computed preconditioning against it, over all jumps to levels in between."""
    found = [(ABLATIONS[name], f"{rows[name]['final_method']:#.3g}", ratio(rows[name])) for name in ABLATIONS]
    return markdown(("variant", "error", "ratio to the default"), found)


def two_call_table(rows: list[Row]) -> str:
    """Frechet distance at the last moment, a mean over seeds, by the two jumps; of the anatomy."""
    lasts = {"teacher": "last jump by the teacher's ODE", "euler": "Euler", "analytic": "computed"}
    own = chosen(rows, dataset="digits", step=600)

    def cells(kind: str, key: str, first: str) -> list[str]:
        found = []
        for last in lasts:
            values = [row["frechet"] for row in chosen(own, kind=kind, last=last, **{key: first})]
            shown = f"{statistics.fmean(values):.2f}" if values else ""
            found.append(f"**{shown}**" if first == last != "teacher" and kind == "two calls" else shown)
        return found

    firsts = {"teacher": "the teacher's ODE", "euler": "Euler", "analytic": "computed"}
    found = [(name, *cells("two calls", "first", first)) for first, name in firsts.items()]
    found += [(f"{firsts[name]}, stretched", *cells("corrected", "leading", name)) for name in ("euler", "analytic")]
    found.append(("computed `f`, Euler's `g`", *cells("two calls", "first", "exchanged")))
    found.append(("computed, loss reweighted", *cells("two calls", "first", "reweighted")))
    return markdown(("first jump by", *lasts.values()), found)


HEADS = ("data", "method", "against", "measure", "NFE", "ratio", "interval", "seeds", "final", "at start")


def line(row: Row) -> tuple[str, ...]:
    """A comparison."""
    first, second = ("euler", "analytic") if "final_euler" in row else ("baseline", "method")
    interval = "" if row["low"] is None else f"{row['low']:.2f} .. {row['high']:.2f}"
    final = f"{row[f'final_{first}']:.3g} / {row[f'final_{second}']:.3g}"
    names = (row["dataset"], row["method"], row["baseline"], row["measure"], str(row["nfe"]))
    times = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    return (*names, times, interval, str(row["seeds"]), final, str(row["at_start"]))


def figures() -> None:
    """Write acceleration.json and the figure."""
    write(COMPARED, comparisons(GRID.rows()))
    (FIGURES / "acceleration.png").write_bytes(figure(GRID.rows()))


def figure(cells: list[Row]) -> bytes:
    """Learning curves of Euler and analytic, a row of panels for each data set."""
    panels = []
    for dataset in DATASETS:
        for measure, nfe in ((INTERMEDIATE, 1), ("sample", 2), ("frechet", 1), ("frechet", 2)):
            courses = []
            for method in ("euler", "analytic"):
                own = chosen(cells, dataset=dataset, method=method)
                curves = [[(s * c["batch"], v) for s, v in curves_of(c)[measure, nfe]] for c in own]
                if curves:
                    mean = mean_curve(curves)
                    courses.append(Course(method, mean.images, mean.mean, mean.low, mean.high))
            calls = "" if measure == INTERMEDIATE else f", {nfe} call" + ("s" if nfe > 1 else "")
            if courses:
                panels.append(Panel(f"{dataset}: {measure}{calls}", tuple(courses)))
    return comparison_curves(panels, columns=4)
