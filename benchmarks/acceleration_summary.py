"""The table and the figure of benchmarks/acceleration.py, from the students that are stored.

Each method is compared with what it changes one thing of: `BASELINES`. A ratio of 2 means half the steps to equal
quality, to the worst final value among all runs of both methods, which every run reaches: the ratio is symmetric. Time
counts until a curve stays there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.evaluation.metrics import common_target, speedup, time_to
from fewstep.evaluation.metrics.curves import mean_curve
from fewstep.evaluation.report.comparison import Course, Panel, Table, aligned, comparison_curves

RESULTS = Path(__file__).parent / "results" / "acceleration"
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "acceleration.png"
DATASETS = ("mixture", "digits", "digits-long", "fashion")
INTERMEDIATE = "jumps to levels above the end"
LEVELS = (80.0, 12.9, 1.9, 0.59, 0.002)
BASELINES = {
    "analytic": ("euler", "CD, multistep"),
    "euler, adversarial": ("euler",),
    "analytic, adversarial": ("euler, adversarial", "analytic"),
    "CD, multistep": (),
    "euler": ("CD, multistep",),
}
"""What a method is compared with; an ablation of "analytic" that is not named, with that and with Euler."""


def read_cells() -> list[dict[str, Any]]:
    """Every stored student."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    return [cell for cell in found if "curve" in cell]


def curves_of(cell: dict[str, Any]) -> dict[tuple[str, int], list[tuple[float, float]]]:
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


def compare_methods(cells: list[dict[str, Any]], baseline: str, method: str) -> list[dict[str, Any]]:
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


def comparisons(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of every data set and pair."""
    rows = []
    for dataset in DATASETS:
        own = [cell for cell in cells if cell["dataset"] == dataset]
        for baseline, method in pairs(list({cell["method"] for cell in own})):
            rows += compare_methods(own, baseline, method)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    heads = ("data", "method", "against", "measure", "NFE", "ratio", "interval", "seeds", "final", "at start")
    lines = []
    for row in rows:
        first, second = ("euler", "analytic") if "final_euler" in row else ("baseline", "method")
        interval = "" if row["low"] is None else f"{row['low']:.2f} .. {row['high']:.2f}"
        final = f"{row[f'final_{first}']:.3g} / {row[f'final_{second}']:.3g}"
        names = (row["dataset"], row["method"], row["baseline"], row["measure"], str(row["nfe"]))
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append((*names, ratio, interval, str(row["seeds"]), final, str(row["at_start"])))
    return aligned([Table(heads, tuple(lines))])


def summary() -> None:
    """Print the table, write acceleration.json and the figure."""
    cells = read_cells()
    rows = comparisons(cells)
    (RESULTS.parent / "acceleration.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    FIGURE.write_bytes(figure(cells))


def figure(cells: list[dict[str, Any]]) -> bytes:
    """Learning curves of Euler and analytic, a row of panels for each data set."""
    panels = []
    for dataset in DATASETS:
        for measure, nfe in ((INTERMEDIATE, 1), ("sample", 2), ("frechet", 1), ("frechet", 2)):
            courses = []
            for method in ("euler", "analytic"):
                own = [c for c in cells if c["dataset"] == dataset and c["method"] == method]
                curves = [[(s * c["batch"], v) for s, v in curves_of(c)[measure, nfe]] for c in own]
                if curves:
                    mean = mean_curve(curves)
                    courses.append(Course(method, mean.images, mean.mean, mean.low, mean.high))
            calls = "" if measure == INTERMEDIATE else f", {nfe} call" + ("s" if nfe > 1 else "")
            if courses:
                panels.append(Panel(f"{dataset}: {measure}{calls}", tuple(courses)))
    return comparison_curves(panels, columns=4)
