"""What the cells say: how many times fewer steps and seconds each method needs than Euler's, and what foretells it."""

import math
from statistics import fmean
from typing import NamedTuple

from scipy.stats import spearmanr

from benchmarks.acceleration.__main__ import curves
from benchmarks.harness import RESULTS, Row, chosen, markdown, read
from benchmarks.skip.cost import BEFORE, form_of
from benchmarks.skip.methods import BASELINE
from fewstep.evaluation.metrics.curves import common_target, speedup, time_to

ACCELERATION = RESULTS / "acceleration.json"
COST = RESULTS / "skip_cost.json"
MEASURES = {"sample": "error", "frechet": "Fréchet distance"}
BAR, LEAST = 2.0, 1.5
"""The ratio that is asked for, and where its interval may begin."""


class Key(NamedTuple):
    """A measure at a number of calls."""

    measure: str
    nfe: int


KEYS = tuple(Key(measure, calls) for measure in MEASURES for calls in (1, 2, 4))


def compared(cells: list[Row], baseline: str, method: str, key: Key) -> Row | None:
    """Ratio of steps to the worst final value of both, over the seeds that both have; None without any.

    bound: ">" where the method is there at its first measured moment, so that the ratio and its interval are lower
    bounds; "<" where the baseline is.
    """
    both = [curves(cells, name, *key) for name in (baseline, method)]
    slow, fast = ({seed: own[seed] for seed in both[0].keys() & both[1].keys()} for own in both)
    if not slow:
        return None
    target = common_target([*slow.values(), *fast.values()])
    found = speedup(slow, fast, [target])
    steps = [[time_to(curve, target) or curve[-1][0] for curve in own.values()] for own in (slow, fast)]
    early = [min(times) <= next(iter(slow.values()))[0][0] for times in steps]
    return {
        "measure": key.measure, "nfe": key.nfe, "ratio": found.ratio, "low": found.low, "high": found.high,
        "bound": "<" * early[0] + ">" * early[1], "seeds": len(slow),
        "steps_euler": fmean(steps[0]), "steps_method": fmean(steps[1]),
        "final_euler": fmean(curve[-1][1] for curve in slow.values()),
        "final_method": fmean(curve[-1][1] for curve in fast.values()),
    }  # fmt: skip


def strangers(cells: list[Row], teacher: str) -> str:
    """What is wrong where stored students have another teacher: students of two teachers are no pairs."""
    others = sorted({row["teacher"] for row in cells} - {teacher})
    kept = "give theirs, or take their rows out of skip.jsonl and train all students anew"
    return f"this is teacher {teacher}, stored students have {', '.join(others)}: {kept}" if others else ""


def acceleration(
    cells: list[Row], datasets: tuple[str, ...], methods: dict[str, list[str]], baseline: str
) -> list[Row]:
    """Rows of every data set, method and measure against a baseline.

    seconds_ratio: the same of seconds, with a step's measured cost (step_cost, over the baseline's) and that of what is
    measured of the teacher before the first step (start, in steps of the baseline's), though that is kept for all
    students of a teacher.
    """
    cost = {(row["dataset"], row["method"]): row["ratio"] for row in read(COST)}
    rows = []
    for dataset in datasets:
        own, slow = chosen(cells, dataset=dataset), cost.get((dataset, baseline), 1.0 if baseline == BASELINE else None)
        for method in methods[dataset]:
            fast = cost.get((dataset, method))
            for key in KEYS if method != baseline else ():
                if found := compared(own, baseline, method, key):
                    label = {"dataset": dataset, "method": method, "against": baseline}
                    before = cost.get((dataset, form_of(method) + BEFORE), 0.0)
                    rows.append(
                        label | found | in_seconds(found, fast and slow and fast / slow, before / (slow or 1.0))
                    )
    return rows


def in_seconds(found: Row, step_cost: float | None, start: float) -> Row:
    """step_cost, start and seconds_ratio of a ratio of steps; None where a step's cost is not measured."""
    slow = found["steps_euler"]
    ratio = slow / (slow / found["ratio"] * step_cost + start) if step_cost else None
    return {"step_cost": step_cost, "start": start, "seconds_ratio": ratio}


def cost_of(row: Row) -> tuple[str, str]:
    """A step's time over the baseline's, and the steps of the baseline's that the start takes."""
    return (f"{row['step_cost']:.2f}" if row["step_cost"] else "", f"{row['start']:.0f}" if row["start"] else "–")


def shown(row: Row | None) -> str:
    """A ratio with its interval, bold where it is at the bar with three seeds; a dash where both are there at once."""
    if row is None:
        return ""
    if row["bound"] == "<>":
        return "–"
    low = row["low"]
    text = f"{row['bound']} {row['ratio']:.2f}".strip() + ("" if low is None else f" ({low:.2f}–{row['high']:.2f})")
    there = row["ratio"] >= BAR and (low or 0.0) > LEAST and row["seeds"] >= 3 and row["bound"] != "<"
    return f"**{text}**" if there else text


def table(rows: list[Row], dataset: str, against: str = BASELINE) -> str:
    """Of a data set, a line for each method."""
    own = chosen(rows, dataset=dataset, against=against)
    lines = []
    for method in dict.fromkeys(row["method"] for row in own):
        of_method = {Key(row["measure"], row["nfe"]): row for row in chosen(own, method=method)}
        first, seeds = next(iter(of_method.values())), max(row["seeds"] for row in of_method.values())
        lines.append((method, *(shown(of_method.get(key)) for key in KEYS), *cost_of(first), seeds))
    heads = [f"{MEASURES[key.measure]}, {key.nfe}" for key in KEYS]
    return markdown(("method", *heads, "a step's time", "start, steps", "seeds"), lines)


def summary(rows: list[Row], compared: list[tuple[str, str, str]]) -> str:
    """A line for each (data set, method, baseline): ratios of steps, and the ratio of a step's time."""
    lines = []
    for dataset, method, against in compared:
        own = {
            Key(row["measure"], row["nfe"]): row
            for row in chosen(rows, dataset=dataset, method=method, against=against)
        }
        if own:
            first, seeds = next(iter(own.values())), max(row["seeds"] for row in own.values())
            cells = [shown(own.get(key)) for key in KEYS]
            lines.append((dataset, method, against, *cells, *cost_of(first), seeds))
    heads = [f"{MEASURES[key.measure]}, {key.nfe}" for key in KEYS]
    return markdown(("data", "method", "against", *heads, "a step's time", "start, steps", "seeds"), lines)


def ends(rows: list[Row], dataset: str) -> str:
    """Of a data set, last values: Euler's and the method's over the seeds that both have, the better one bold."""
    own = chosen(rows, dataset=dataset, against=BASELINE)
    lines = []
    for method in dict.fromkeys(row["method"] for row in own):
        cells = []
        for key in KEYS:
            for row in chosen(own, method=method, measure=key.measure, nfe=key.nfe):
                first, second = (f"{row[name]:#.3g}" for name in ("final_euler", "final_method"))
                better = [f"**{first}**", second] if float(first) < float(second) else [first, f"**{second}**"]
                cells.append(" / ".join([first, second] if first == second else better))
        lines.append((method, *cells))
    return markdown(("method", *(f"{MEASURES[key.measure]}, {key.nfe}" for key in KEYS)), lines)


def lasting(cells: list[Row], dataset: str, last: bool = False) -> str:
    """Of a data set, every method's mean over seeds after each number of steps, or after the last."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in chosen(cells, dataset=dataset)):
        found = [list(curves(chosen(cells, dataset=dataset), method, *key).values()) for key in KEYS]
        for i, (step, _) in list(enumerate(found[0][0]))[-1 if last else 0 :]:
            values = [f"{fmean(curve[i][1] for curve in each):#.3g}" for each in found]
            lines.append((method, f"{step:,}", *values, len(found[0])))
    return markdown(("method", "steps", *(f"{MEASURES[key.measure]}, {key.nfe}" for key in KEYS), "seeds"), lines)


def foretold(rows: list[Row], known: dict[tuple[str, str], dict[str, float]]) -> str:
    """Spearman's rank correlation of what is known before training with the ratios, over data sets and methods.

    known: of (data set, method) the values by name. Larger is better for each of them.
    """
    names = list(dict.fromkeys(name for values in known.values() for name in values))
    lines = []
    for name in names:
        cells = []
        for key in KEYS:
            pairs = [
                (known[where][name], math.log(row["ratio"]))
                for row in chosen(rows, measure=key.measure, nfe=key.nfe, against=BASELINE)
                if name in known.get(where := (row["dataset"], row["method"]), {})
            ]
            cells.append(
                f"{spearmanr(*zip(*pairs, strict=True)).statistic:.2f} ({len(pairs)})" if len(pairs) > 3 else ""
            )
        lines.append((name, *cells))
    return markdown(("known before", *(f"{MEASURES[key.measure]}, {key.nfe}" for key in KEYS)), lines)
