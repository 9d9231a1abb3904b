"""What the cells of benchmarks/policies.py say: policies.json, the tables of studies/tables/policies.md, a figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fewstep.evaluation.report.canvas import LIGHT, figure_style, make_panels, to_png
from fewstep.policies.rollout import wilson
from fewstep.utils.files import write_atomically

DOCS = Path(__file__).parents[1] / "docs"
PAGE, FIGURE = DOCS / "studies" / "tables" / "policies.md", DOCS / "figures" / "policies.png"
BEGIN, END = "<!-- tables: python benchmarks/policies.py -->", "<!-- end of tables -->"
Row = dict[str, Any]
COLUMNS = (
    "task", "method", "steps", "seed", "success", "episodes", "latency_ms", "mean_steps", "score", "routes", "errors",
    "seconds",
)  # fmt: skip
ORDER = ("expert", "regression", "flow matching", "iSD", "iSD from flow matching")


def summarise(rows: list[Row], folder: Path) -> str:
    """Write policies.json, the figure and the page's tables; the tables."""
    shown = [{name: row[name] for name in COLUMNS} for row in rows]
    write_atomically(folder / "policies.json", json.dumps(shown, indent=1) + "\n")
    tables = "\n\n".join(section(task, [row for row in rows if row["task"] == task]) for task in tasks_of(rows))
    if rows:
        write_atomically(FIGURE, figure(rows))
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    write_atomically(PAGE, f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}")
    return tables


def tasks_of(rows: list[Row]) -> list[str]:
    """Tasks in the order of their first cells."""
    return list(dict.fromkeys(row["task"] for row in rows))


def grouped(rows: list[Row]) -> list[list[Row]]:
    """Rows of one task by method and number of calls, most calls first; seeds in order."""
    keys = sorted({(ORDER.index(row["method"]), -row["steps"]) for row in rows})
    return [
        sorted((r for r in rows if (r["method"], r["steps"]) == (ORDER[method], -steps)), key=lambda r: int(r["seed"]))
        for method, steps in keys
    ]


def section(task: str, rows: list[Row]) -> str:
    """A task's table: success by seed and over all, with Wilson's interval of all episodes."""
    routes = sorted({name for row in rows for name in row["routes"]})
    heads = ["method", "calls", "success by seed", "all", "95 %", "mean length", "score"]
    heads += [*routes, "ms a decision"]
    lines = [line(group, routes) for group in grouped(rows)]
    first = next((row for row in rows if row["method"] == "expert"), None)
    note = ""
    if first is not None:
        shown, tried = f"{first['demonstrations']} demonstrations of {first['steps_shown']:,} steps", first["tried"]
        note = f"{shown}, from {tried} episodes of the expert.\n\n"
    table = [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines)]
    return f"### {task}\n\n{note}" + "\n".join(table)


def line(group: list[Row], routes: list[str]) -> list[str]:
    """One method with one number of calls."""
    first, episodes = group[0], sum(row["episodes"] for row in group)
    successes = sum(row["successes"] for row in group)
    low, high = wilson(successes, episodes)
    latencies = [row["latency_ms"] for row in group if row["latency_ms"] is not None]
    lengths, scores = (float(np.mean([row[key] for row in group])) for key in ("mean_steps", "score"))
    return [
        first["method"],
        str(first["steps"] or "–"),
        ", ".join(str(row["successes"]) for row in group),
        f"{successes} / {episodes}",
        f"{low:.2f}–{high:.2f}",
        f"{lengths:.0f}",
        f"{scores:.2f}",
        *(", ".join(str(row["routes"].get(name, 0)) for row in group) for name in routes),
        f"{np.median(latencies):.1f}" if latencies else "–",
    ]


def figure(rows: list[Row]) -> bytes:
    """Success against network calls, a panel for each task."""
    tasks = tasks_of(rows)
    with rc_context(figure_style(LIGHT)):
        drawn, axes = make_panels(len(tasks), 2, 3.2)
        for axis, task in zip(axes, tasks, strict=True):
            draw_task(axis, [row for row in rows if row["task"] == task])
            axis.set_title(task)
        axes[0].legend()
        return to_png(drawn)


def draw_task(axis: Axes, rows: list[Row]) -> None:
    """Mean over seeds with Wilson's interval of all episodes."""
    for place, method in enumerate(ORDER[1:]):
        points = []
        for group in grouped([row for row in rows if row["method"] == method]):
            episodes, successes = (sum(row[key] for row in group) for key in ("episodes", "successes"))
            points.append((group[0]["steps"], successes / episodes, *wilson(successes, episodes)))
        if not points:
            continue
        calls, mean, low, high = (np.array(values) for values in zip(*sorted(points), strict=True))
        moved = calls * 1.04 ** (place - 1.5)  # so that intervals at equal calls stand side by side
        errors = np.stack([mean - low, high - mean]).clip(0)
        axis.errorbar(moved, mean, errors, color=LIGHT.colour(place), marker="o", markersize=4, label=method)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator([1, 2, 4, 16]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("network calls a decision")
    axis.set_ylabel("success")
