"""Which objectives train few-step models stably, how well, and at what cost: objective by objective, cell by cell.

docs/studies/stability.md says what a cell is, what it is measured by, and what counts as a failure.
"""

import math
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cache as cached
from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes

import benchmarks.harness as h
import fewstep as fs
from benchmarks.cost.step import take_step, warm
from benchmarks.stability.measure import FAILURES, Reference, flow_matching_model, judged, train_cell
from benchmarks.stability.plan import CHANGED, GRID, MIXED, OWN_PATH, STUDIES, Cell, configuration, objectives
from fewstep.evaluation.metrics.curves import time_to
from fewstep.evaluation.report.canvas import LIGHT

COSTS = h.RESULTS / "stability" / "cost.json"
USUAL = {name: value for name, value in asdict(Cell("", "")).items() if name not in ("group", "objective", "seed")}
AFTER = " (after a flow-matching run of the same length)"
CHANGES: dict[str, dict[str, str]] = {
    "path: trig, against linear": {"path": "trig", "preconditioning": "trig"},
    "derivative: finite-difference, against exact": {"derivative": "finite-difference"},
    f"initial: flow matching{AFTER}, against random": {"initial": "flow matching"},
    **{f"optimizer: {name}, against adamw": {"optimizer": name} for name in CHANGED},
    **{f"{c} preconditioning, {p} path, against linear on linear": {"path": p, "preconditioning": c} for p, c in MIXED},
    "Inner scaling of the trigonometric path on the linear one, against none": {"scaling": "unit"},
}
"""Tables of one setting changed against the usual one."""
RATES, KINDS = 4, ("linear", "trig", "euler")
POWERS = [2.0**k for k in range(1, 7)]
TARGETS = {"digits": 12.0, "fashion": 38.5}
"""The Frechet distance in two calls whose cost is stated: flow matching takes four calls for it."""


def step_ratio(cell: h.Row) -> float | None:
    """A step's time over one of flow matching, by the steps of `cost`."""
    same = h.chosen(h.read(COSTS), **{key: cell[key] for key in ("dataset", "network", "objective")})
    found = {row["derivative"]: float(row["ratio"]) for row in same}
    return found.get(cell["derivative"], found.get("exact"))


def tables() -> dict[str, str]:
    """All tables, in the page's order."""
    found = [judged(row) for row in GRID.rows()]
    usual, wrong, again = at(found), ", time unit", replace(GRID, file=GRID.file.with_name("again.jsonl")).rows()
    trig = at(found, path="trig", preconditioning="trig")
    mistaken = [row | {"objective": row["objective"].removesuffix(wrong)} for row in trig if wrong in row["objective"]]
    right = [row for row in trig if row["objective"] in {each["objective"] for each in mistaken}]
    return {
        "Runs": f"{len(found)} runs; {GRID.missing()} of the plan are not there yet.",
        "All objectives, digits, MLP, learning rate 0.003": quality_table(usual),
        "Trained again on another processor, and the diagonal's own ODE": h.markdown(
            ("objective", "runs", "1 call", "2 calls", "4 calls", "its ODE, 16 steps of Heun"),
            [(name, len(own), *quality(own, 1, 2, 4, "ode")) for name, own in by_objective(again)],
        ),
        "Learning rates over a factor of 30": rates_table(at(found, lr=None)),
        "Digits, unet": quality_table(at(found, network="unet")),
        "Digits, dit": quality_table(at(found, network="dit")),
        "Fashion-MNIST, unet": quality_table(at(found, dataset="fashion", network="unet")),
        **{title: paired_table(usual, at(found, **changed)) for title, changed in CHANGES.items()},
        "MeanFlow by path and preconditioning, 1 and 2 calls": h.markdown(
            ("path", *KINDS),
            [(path, *(meanflow(found, path=path, preconditioning=kind) for kind in KINDS)) for path in KINDS[:2]],
        ),
        "Trig: the published code's time unit, against the right one": paired_table(right, mistaken),
        "Runs that fail, over the settings tried (not the same for all rows)": h.markdown(
            ("objective", "runs", *FAILURES),
            [(name, len(own), *(count(own, kind, ".0%") for kind in FAILURES)) for name, own in by_objective(found)],
        ),
    }


def at(cells: Iterable[h.Row], **settings: object) -> list[h.Row]:
    """Cells at the usual setting but for these; None for any value. CT's and ECT's usual path is EDM's."""

    def fits(cell: h.Row) -> bool:
        wanted = USUAL | OWN_PATH.get(cell["objective"], {}) | settings
        return all(value is None or cell[key] == value for key, value in wanted.items())

    return [cell for cell in cells if fits(cell)]


def by_objective(cells: Iterable[h.Row], best: str = "") -> list[tuple[str, list[h.Row]]]:
    """(objective, its cells), by name; `best`: by the mean of that column."""
    found = sorted(h.grouped(cells, lambda cell: str(cell["objective"])).items())
    return sorted(found, key=lambda item: typical(item[1], best)) if best else found


def quality_table(cells: list[h.Row]) -> str:
    """One row an objective: failures, quality by calls, gradient norms, cost."""
    heads = (
        "objective", "runs", *FAILURES, "1 call", "2 calls", "4 calls", "accuracy, 1 call",
        "variance within classes", "gradient q50", "q99", "q99 / q50", "step cost",
        f"steps of flow matching to {TARGETS[cells[0]['dataset']] if cells else 0:g} in 2 calls",
    )  # fmt: skip
    rows = []
    for name, own in by_objective(cells, "frechet_2"):
        q50, q99, cost = typical(own, "grad_q50"), typical(own, "grad_q99"), step_ratio(own[0])
        failures, norms = [count(own, kind) for kind in FAILURES], (f"{q50:.2g}", f"{q99:.2g}", f"{q99 / q50:.1f}")
        spreads = spread(own, "accuracy_1", 3), spread(own, "within_1", 2)
        price = "" if cost is None else f"{cost:.2f}"
        rows.append((name, len(own), *failures, *quality(own, 1, 2, 4), *spreads, *norms, price, cost_to(own, cost)))
    last = [row for cell in cells for row in cell["curve"] if (row["step"], row["nfe"]) == (cell["steps"], 32)]
    long = f"\n\nFlow matching in 32 calls: {h.interval([row['frechet'] for row in last], 1)}." if last else ""
    return h.markdown(heads, rows) + long


def quality(cells: list[h.Row], *calls: int | str) -> list[str]:
    """Frechet distances in so many calls."""
    return [spread(cells, f"frechet_{count}") for count in calls]


def meanflow(cells: list[h.Row], **settings: str) -> str:
    """MeanFlow's mean distances in one call and in two."""
    own = h.chosen(at(cells, **settings), objective="MeanFlow")
    return f"{typical(own, 'frechet_1'):.1f} / {typical(own, 'frechet_2'):.1f}"


def count(cells: list[h.Row], kind: str, form: str = "") -> str:
    """How many cells fail in this way, or which share of them, of those that say."""
    said = [cell[kind] for cell in cells if cell[kind] is not None]
    if not said:
        return "–"
    shown = format(sum(said) / len(said) if form else sum(said), form)
    return shown + (f" of {len(said)}" if len(said) < len(cells) else "")


def rates_table(cells: list[h.Row]) -> str:
    """Two-call distance by learning rate, and the worst over the best."""
    rates, rows = sorted({cell["lr"] for cell in cells}), []
    for name, own in by_objective(cells):
        by_rate = [h.chosen(own, lr=lr) for lr in rates]
        means = [typical(found, "frechet_2") for found in by_rate]
        whole = len(rates) == RATES and all(map(math.isfinite, means)) and len({*map(len, by_rate)}) == 1
        worst = f"{max(means) / min(means):.1f}" if whole else ""
        if sum(map(bool, by_rate)) > 1:
            rows.append((name, *(spread(found, "frechet_2") for found in by_rate), worst, failed(own)))
    return h.markdown(("objective, 2 calls", *(f"{lr:g}" for lr in rates), "worst / best", "failed"), rows)


def failed(cells: list[h.Row]) -> str:
    """How many fail in any way, of how many."""
    return f"{sum(any(cell[kind] for kind in FAILURES) for cell in cells)} / {len(cells)}"


def paired_table(before: list[h.Row], after: list[h.Row]) -> str:
    """A row for each objective: `after`, and its distances over those of the same seed `before` where there are."""
    rows = []
    for name, own in by_objective(after):
        usual = {cell["seed"]: cell for cell in before if cell["objective"] == name}
        pairs = [(usual[cell["seed"]], cell) for cell in own if cell["seed"] in usual]
        keys = ("frechet_1", "frechet_2", "frechet_4")
        factors = (h.interval([b[key] / a[key] for a, b in pairs if a[key] and b[key]]) for key in keys)
        rows.append((name, *quality(own, 1, 2), *factors, failed(own)))
    return h.markdown(("objective", "1 call", "2 calls", "factor at 1 call", "at 2", "at 4", "failed"), rows)


def typical(cells: list[h.Row], key: str) -> float:
    """The mean over seeds; infinite where a run has no value."""
    values = [cell[key] for cell in cells]
    return math.inf if not values or None in values else statistics.fmean(values)


def spread(cells: list[h.Row], key: str, digits: int = 1) -> str:
    """Mean (smallest to largest) of the runs that have a value."""
    return h.interval([cell[key] for cell in cells if cell.get(key) is not None], digits)


def cost_to(cells: list[h.Row], cost: float | None) -> str:
    """Steps until the two-call distance stays below that of TARGETS, times a step's cost; from runs that reach it."""
    if cost is None:
        return ""
    found = []
    for cell in cells:
        points = h.chosen(cell["curve"], nfe=2)
        curve = [(row["step"], row["frechet"]) for row in points if row["frechet"] is not None]
        steps = time_to(curve, TARGETS[cell["dataset"]]) if curve else None
        found += [] if steps is None else [steps * cost]
    return f"{statistics.fmean(found):,.0f}" if len(found) == len(cells) else f"not in {len(cells) - len(found)} runs"


def draw() -> None:
    """Quality by objective and calls, gradient norms, and sensitivity to the learning rate."""
    found = [judged(row) for row in GRID.rows()]
    ranked = by_objective(at(found), "frechet_2")
    with h.figure(h.FIGURES / "stability.png", 3, 3, height=4.2) as axes:
        for y, (_, own) in enumerate(ranked):
            for cell in own:
                norms = cell["grad_q50"], cell["grad_q99"]
                axes[1].plot(norms, [y, y], color=LIGHT.colour(0), alpha=0.6, marker="|")
        for i, nfe in enumerate((1, 2, 4)):
            points = [(cell[f"frechet_{nfe}"], y) for y, (_, own) in enumerate(ranked) for cell in own]
            shown = [(value, y + 0.22 * (i - 1)) for value, y in points if value is not None]
            axes[0].plot(*zip(*shown, strict=True), "o", color=LIGHT.colour(i), markersize=4, label=f"{nfe} calls")
        for axis, title in zip(axes, ("Frechet distance", "Gradient norm, q50 to q99"), strict=False):
            axis.set(xscale="log", title=title)
            axis.set_yticks(range(len(ranked)), [name for name, _ in ranked], fontsize=7)
            axis.invert_yaxis()
        h.ticks(axes[0].xaxis, POWERS)
        axes[0].legend(fontsize=7)
        draw_rates(axes[2], at(found, lr=None))


def draw_rates(axis: Axes, cells: list[h.Row]) -> None:
    lines = {name: h.grouped(own, lambda cell: cell["lr"]) for name, own in by_objective(cells)}
    for i, (name, by_rate) in enumerate((name, own) for name, own in lines.items() if len(own) > 1):
        points = sorted((lr, typical(own, "frechet_2")) for lr, own in by_rate.items())
        sound = [(lr, value) for lr, value in points if math.isfinite(value)]
        if sound:
            style, colour = ("-", "--", ":")[i // 6 % 3], LIGHT.colour(i % 6)
            axis.plot(*zip(*sound, strict=True), style, color=colour, marker="o", markersize=3, label=name)
    axis.set(xscale="log", yscale="log", ylim=(1.5, None), title="2 calls, by learning rate")  # room for the legend
    h.ticks(axis.yaxis, POWERS)
    axis.legend(fontsize=6, ncols=2)


STUDY = h.Study("stability", tables, draw, GRID)


def run(
    group: str = "",
    objective: str = "",
    seeds: h.Seeds = (0, 1, 2),
    worker: h.Worker = "0/1",
    cache: h.Cache = None,
    models: Path = Path("runs/stability"),
) -> None:
    """Train the cells that have no result yet, of one group or objective or of all, in order.

    Flow-matching models that other cells start from are kept in MODELS.
    """
    torch.set_num_threads(1)
    reference = cached(lambda key: Reference(fs.load_dataset(STUDIES[key].data), cache))

    def measure(cell: Cell) -> list[h.Row]:
        own = reference((cell.dataset, "unet"))
        with tempfile.TemporaryDirectory() as folder:
            initial = "" if cell.initial == "random" else str(flow_matching_model(cell, own, models))
            return [train_cell(cell, configuration(cell, initial), own, Path(folder) / "run")]

    chosen = [cell for cell in GRID.cells().values() if cell.seed in seeds and objective in ("", cell.objective)]
    GRID.run([cell for cell in chosen if group in ("", cell.group)], measure, worker)


def cost(repeats: int = 8) -> None:
    """Time a step of every objective over one of flow matching's, taking turns, in the study's own networks.

    Loss and gradient alone, on weights away from their zeros, with the network itself as slow average and teacher.
    """
    torch.set_num_threads(1)
    rows: list[h.Row] = []
    for (dataset, network), study in STUDIES.items():
        flow_map, batch = warm(study.network, study.shape, study.batch)
        own = fs.Companions(teacher=flow_map, ema_target=flow_map)
        named = {(name, "exact"): each for name, each in objectives(study, "exact").items()}
        for name, each in objectives(study, "finite-difference").items():
            named |= {} if each == named[name, "exact"] else {(name, "finite-difference"): each}
        spent = h.take_turns(
            {key: partial(take_step, job, flow_map, batch, own) for key, job in named.items()}, repeats
        )
        for (name, derivative), times in spent.items():
            labels = {"dataset": dataset, "network": network, "objective": name, "derivative": derivative}
            rows.append(labels | h.time_ratio(times, spent["flow matching", "exact"]))
            h.show(rows[-1:])
    h.write(COSTS, rows)


if __name__ == "__main__":
    STUDY.main(run=run, cost=cost)
