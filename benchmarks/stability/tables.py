"""What the stored cells of the stability study say: tables, figure, and results/stability.json."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from functools import cache

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.harness import FIGURES, RESULTS, Row, grouped, interval, markdown, read
from benchmarks.stability.plan import GRID
from fewstep.evaluation.metrics.curves import time_to
from fewstep.evaluation.report.canvas import LIGHT, figure_style, make_panels, to_png
from fewstep.utils.files import write_atomically

COSTS = RESULTS / "stability" / "cost.json"
COLUMNS = (
    "objective", "network", "path", "preconditioning", "derivative", "optimizer", "initial", "lr", "seed", "dataset",
    "scaling", "diverged", "degenerate", "narrow", "classless", "frechet_1", "frechet_2", "frechet_4", "accuracy_1",
    "spread_1", "within_1", "frechet_ode", "grad_q50", "grad_q99", "steps", "batch", "samples", "sample_seed",
    "extractor", "group",
)  # fmt: skip
USUAL = {
    "dataset": "digits", "network": "mlp", "path": "linear", "preconditioning": "linear", "derivative": "exact",
    "optimizer": "adamw", "initial": "random", "lr": 3e-3, "scaling": "",
}  # fmt: skip
CLASSES, RATES = 10, 4
FAILURES = ("diverged", "degenerate", "narrow", "classless")
NARROW = 0.25
"""Variance within classes, over the data's, below which one-step samples are near their classes' means."""
TARGETS = {"digits": 12.0, "fashion": 38.5}
"""The Frechet distance in two calls whose cost is stated: flow matching takes four calls for it."""


def judged(cell: Row) -> Row:
    """The cell with what counts as degenerate, narrow and classless today, whenever it was stored.

    Flow matching, whose one step is the class's mean by what it is, is never narrow. None where a cell does not say.
    """
    cell = {"scaling": "", **cell}
    if cell["diverged"]:
        return cell | dict.fromkeys(FAILURES[1:], False)
    within = cell.get("within_1")
    narrow = None if within is None else within < NARROW
    return cell | {
        "degenerate": not 0.25 <= cell["spread_1"] <= 4.0,
        "narrow": False if cell["objective"] == "flow matching" else narrow,
        "classless": cell["accuracy_1"] < 2 / CLASSES,
    }


@cache
def costs() -> dict[tuple[str, ...], float]:
    """The steps of `cost`, by data set, network, objective and derivative."""
    names = ("dataset", "network", "objective", "derivative")
    return {tuple(row[name] for name in names): row["ratio"] for row in read(COSTS)}


def step_ratio(cell: Row) -> float | None:
    """A step's time over one of flow matching."""
    key = cell["dataset"], cell["network"], cell["objective"]
    return costs().get((*key, cell["derivative"]), costs().get((*key, "exact")))


def figures() -> None:
    """Write results/stability.json and the figure."""
    cells = [judged(row) for row in GRID.rows()]
    rows = [{name: cell.get(name) for name in COLUMNS} | {"step_ratio": step_ratio(cell)} for cell in cells]
    write_atomically(RESULTS / "stability.json", "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    write_atomically(FIGURES / "stability.png", figure(cells))


def tables() -> dict[str, str]:
    """All tables, in the page's order."""
    cells = [judged(row) for row in GRID.rows()]
    found = {
        "Runs": f"{len(cells)} runs; {GRID.missing()} of the plan are not there yet.",
        "All objectives, digits, MLP, learning rate 0.003": quality_table(at(cells)),
        "The diagonal's own ODE, digits, MLP, learning rate 0.003": ode_table(at(cells)),
        "Learning rates over a factor of 30": rates_table(at(cells, lr=None)),
        "Digits, unet": quality_table(at(cells, network="unet")),
        "Digits, dit": quality_table(at(cells, network="dit")),
        "Fashion-MNIST, unet": quality_table(at(cells, dataset="fashion", network="unet")),
    }
    for name, value in (
        ("path", "trig"), ("derivative", "finite-difference"), ("initial", "flow matching"),
        ("optimizer", "no clip"), ("optimizer", "beta2 0.999"), ("optimizer", "muon"),
    ):  # fmt: skip
        changed = {name: value} | ({"preconditioning": "trig"} if name == "path" else {})
        note = " (after a flow-matching run of the same length)" if name == "initial" else ""
        found[f"{name}: {value}{note}, against {USUAL[name]}"] = paired_table(cells, changed)
    for path, own in (("linear", "euler"), ("linear", "trig"), ("trig", "linear"), ("trig", "euler")):
        changed = {"path": path, "preconditioning": own}
        found[f"{own} preconditioning, {path} path, against linear on linear"] = paired_table(cells, changed)
    unit = paired_table(cells, {"scaling": "unit"})
    found["Inner scaling of the trigonometric path on the linear one, against none"] = unit
    found["Trig: the published code's time unit, against the right one"] = time_unit_table(cells)
    found["Runs that fail, over the settings tried (not the same for all rows)"] = failures_table(cells)
    return found


def time_unit_table(cells: list[Row]) -> str:
    trig, wrong = at(cells, path="trig", preconditioning="trig"), ", time unit"
    after = [cell | {"objective": cell["objective"].removesuffix(wrong)} for cell in trig if wrong in cell["objective"]]
    return pairs_table([cell for cell in trig if cell["objective"] in {each["objective"] for each in after}], after)


def at(cells: Iterable[Row], **settings: object) -> list[Row]:
    """Cells at the usual setting but for these; None for any value. CT's and ECT's usual path is EDM's."""
    found = []
    for cell in cells:
        own = {"path": "edm", "preconditioning": "bcm"} if cell["objective"] in ("CT", "ECT") else {}
        wanted = USUAL | own | settings
        found += [cell] if all(value is None or cell[key] == value for key, value in wanted.items()) else []
    return found


def by_objective(cells: Iterable[Row]) -> dict[str, list[Row]]:
    return grouped(cells, lambda cell: str(cell["objective"]))


def quality_table(cells: list[Row]) -> str:
    """One row an objective: failures, quality by calls, gradient norms, cost."""
    heads = (
        "objective", "runs", *FAILURES, "1 call", "2 calls", "4 calls", "accuracy, 1 call",
        "variance within classes", "gradient q50", "q99", "q99 / q50", "step cost",
        f"steps of flow matching to {TARGETS[cells[0]['dataset']] if cells else 0:g} in 2 calls",
    )  # fmt: skip
    rows = []
    for name, own in sorted(by_objective(cells).items(), key=lambda item: typical(item[1], "frechet_2")):
        q50, q99 = typical(own, "grad_q50"), typical(own, "grad_q99")
        cost = step_ratio(own[0])
        rows.append(
            (
                name, str(len(own)), *(count(own, kind) for kind in FAILURES),
                *(spread(own, f"frechet_{n}") for n in (1, 2, 4)), spread(own, "accuracy_1", 3),
                spread(own, "within_1", 2),
                f"{q50:.2g}", f"{q99:.2g}", f"{q99 / q50:.1f}", "" if cost is None else f"{cost:.2f}",
                cost_to(own, cost),
            )
        )  # fmt: skip
    long = [
        row["frechet"] for cell in cells for row in cell["curve"] if (row["step"], row["nfe"]) == (cell["steps"], 32)
    ]
    return markdown(heads, rows) + (f"\n\nFlow matching in 32 calls: {interval(long, 1)}." if long else "")


def count(cells: list[Row], kind: str, form: str = "") -> str:
    """How many cells fail in this way, or which share of them, of those that say."""
    said = [cell[kind] for cell in cells if cell[kind] is not None]
    if not said:
        return "–"
    shown = format(sum(said) / len(said) if form else sum(said), form)
    return shown + (f" of {len(said)}" if len(said) < len(cells) else "")


def ode_table(cells: list[Row]) -> str:
    """What few calls cost over the diagonal's own ODE, where that was measured."""
    rows = []
    told = [cell for cell in cells if cell.get("frechet_ode") is not None]
    for name, own in sorted(by_objective(told).items(), key=lambda item: typical(item[1], "frechet_ode")):
        rows.append((name, str(len(own)), *(spread(own, f"frechet_{n}") for n in (1, 2, 4, "ode"))))
    return markdown(("objective", "runs", "1 call", "2 calls", "4 calls", "its ODE, 16 steps of Heun"), rows)


def rates_table(cells: list[Row]) -> str:
    """Two-call distance by learning rate, and the worst over the best."""
    rates = sorted({cell["lr"] for cell in cells})
    rows = []
    for name, own in sorted(by_objective(cells).items()):
        by_rate = {lr: [cell for cell in own if cell["lr"] == lr] for lr in rates}
        if sum(map(bool, by_rate.values())) < 2:
            continue
        means = [typical(found, "frechet_2") for found in by_rate.values()]
        failed = sum(any(cell[kind] for kind in FAILURES) for cell in own)
        whole = len(rates) == RATES and all(map(math.isfinite, means)) and len({*map(len, by_rate.values())}) == 1
        worst = f"{max(means) / min(means):.1f}" if whole else ""
        rows.append(
            (name, *(spread(found, "frechet_2") for found in by_rate.values()), worst, f"{failed} / {len(own)}")
        )
    heads = ("objective, 2 calls", *(f"{lr:g}" for lr in rates), "worst / best", "failed")
    return markdown(heads, rows)


def paired_table(cells: list[Row], changed: Mapping[str, str]) -> str:
    """Cells with one setting changed against those of the same objective and seed without."""
    return pairs_table(at(cells), at(cells, **changed))


def pairs_table(before: list[Row], after: list[Row]) -> str:
    """A row for each objective: `after`, and its distances over those of the same objective and seed `before`, where
    there are any.
    """
    rows = []
    for name, own in sorted(by_objective(after).items()):
        usual = {cell["seed"]: cell for cell in before if cell["objective"] == name}
        pairs = [(usual[cell["seed"]], cell) for cell in own if cell["seed"] in usual]
        shown = []
        for nfe in (1, 2, 4):
            key = f"frechet_{nfe}"
            shown.append(interval([b[key] / a[key] for a, b in pairs if a[key] and b[key]]))
        failed = sum(any(cell[kind] for kind in FAILURES) for cell in own)
        rows.append((name, spread(own, "frechet_1"), spread(own, "frechet_2"), *shown, f"{failed} / {len(own)}"))
    heads = ("objective", "1 call", "2 calls", "factor at 1 call", "at 2", "at 4", "failed")
    return markdown(heads, rows)


def failures_table(cells: list[Row]) -> str:
    """Over every cell of an objective, whatever its setting."""
    rows = []
    for name, own in sorted(by_objective(cells).items()):
        rows.append((name, str(len(own)), *(count(own, kind, ".0%") for kind in FAILURES)))
    return markdown(("objective", "runs", *FAILURES), rows)


def typical(cells: list[Row], key: str) -> float:
    """The mean over seeds; infinite where a run has no value."""
    values = [cell[key] for cell in cells]
    return math.inf if not values or None in values else statistics.fmean(values)


def spread(cells: list[Row], key: str, digits: int = 1) -> str:
    """Mean (smallest to largest) of the runs that have a value."""
    values = [cell[key] for cell in cells if cell.get(key) is not None]
    return interval(values, digits)


def cost_to(cells: list[Row], cost: float | None) -> str:
    """Steps until the two-call distance stays below that of TARGETS, times a step's cost; from runs that reach it."""
    if cost is None:
        return ""
    found = []
    for cell in cells:
        curve = [
            (row["step"], row["frechet"]) for row in cell["curve"] if row["nfe"] == 2 and row["frechet"] is not None
        ]
        steps = time_to(curve, TARGETS[cell["dataset"]]) if curve else None
        found += [] if steps is None else [steps * cost]
    return f"{statistics.fmean(found):,.0f}" if len(found) == len(cells) else f"not in {len(cells) - len(found)} runs"


def figure(cells: list[Row]) -> bytes:
    """Quality by objective and calls, gradient norms, and sensitivity to the learning rate."""
    with rc_context(figure_style(LIGHT)):
        drawing, axes = make_panels(3, 3, height=4.2)
        ranked = sorted(by_objective(at(cells)).items(), key=lambda item: typical(item[1], "frechet_2"))
        names = [name for name, _ in ranked]
        draw_quality(axes[0], [own for _, own in ranked], names)
        draw_norms(axes[1], [own for _, own in ranked], names)
        draw_rates(axes[2], at(cells, lr=None))
        return to_png(drawing)


def draw_quality(axis: Axes, groups: list[list[Row]], names: list[str]) -> None:
    for i, nfe in enumerate((1, 2, 4)):
        points = [(cell[f"frechet_{nfe}"], y) for y, own in enumerate(groups) for cell in own]
        shown = [(value, y + 0.22 * (i - 1)) for value, y in points if value is not None]
        axis.plot(*zip(*shown, strict=True), "o", color=LIGHT.colour(i), markersize=4, label=f"{nfe} calls")
    axis.set_xscale("log")
    ticks(axis.xaxis)
    axis.set_title("Frechet distance")
    axis.legend(fontsize=7)
    name_rows(axis, names)


def draw_norms(axis: Axes, groups: list[list[Row]], names: list[str]) -> None:
    for y, own in enumerate(groups):
        for cell in own:
            axis.plot([cell["grad_q50"], cell["grad_q99"]], [y, y], color=LIGHT.colour(0), alpha=0.6, marker="|")
    axis.set_xscale("log")
    axis.set_title("Gradient norm, q50 to q99")
    name_rows(axis, names)


def ticks(axis: Axis) -> None:
    """Plain numbers at powers of 2."""
    axis.set_major_locator(FixedLocator([2.0**k for k in range(1, 7)]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def name_rows(axis: Axes, names: list[str]) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.invert_yaxis()


def draw_rates(axis: Axes, cells: list[Row]) -> None:
    lines = {name: grouped(own, lambda cell: cell["lr"]) for name, own in by_objective(cells).items()}
    kept = {name: by_rate for name, by_rate in lines.items() if len(by_rate) > 1}
    for i, (name, by_rate) in enumerate(sorted(kept.items())):
        points = sorted((lr, typical(own, "frechet_2")) for lr, own in by_rate.items())
        sound = [(lr, value) for lr, value in points if math.isfinite(value)]
        if sound:
            style, colour = ("-", "--", ":")[i // 6 % 3], LIGHT.colour(i % 6)
            axis.plot(*zip(*sound, strict=True), style, color=colour, marker="o", markersize=3, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(bottom=1.5)  # room for the legend
    ticks(axis.yaxis)
    axis.set_title("2 calls, by learning rate")
    if kept:
        axis.legend(fontsize=6, ncols=2)
