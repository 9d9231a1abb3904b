"""What the cells of the study of policies say: tables, figure, and results/policies.json."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from benchmarks.harness import FIGURES, RESULTS, Row, figure, grouped, markdown, ticks, write
from benchmarks.policies.run import GRID
from fewstep.evaluation.report.canvas import LIGHT
from fewstep.policies.rollout import wilson

COLUMNS = (
    "task", "method", "steps", "seed", "success", "episodes", "latency_ms", "mean_steps", "score", "routes", "errors",
    "seconds",
)  # fmt: skip
ORDER = ("expert", "regression", "flow matching", "iSD", "iSD from flow matching")


def figures() -> None:
    """Write policies.json and the figure."""
    rows = GRID.rows()
    write(RESULTS / "policies.json", [{name: row[name] for name in COLUMNS} for row in rows])
    draw(rows, FIGURES / "policies.png")


def tables() -> dict[str, str]:
    """A table for each task, in the order of their first cells."""
    return {task: section(rows) for task, rows in grouped(GRID.rows(), lambda row: str(row["task"])).items()}


def groups(rows: list[Row]) -> list[list[Row]]:
    """Rows of one task by method and number of calls, most calls first; seeds in order."""
    found = grouped(rows, lambda row: (ORDER.index(row["method"]), -row["steps"]))
    return [sorted(own, key=lambda row: int(row["seed"])) for _, own in sorted(found.items())]


def section(rows: list[Row]) -> str:
    """A task's table: success by seed and over all, with Wilson's interval of all episodes."""
    routes = sorted({name for row in rows for name in row["routes"]})
    heads = ("method", "calls", "success by seed", "all", "95 %", "mean length", "score", *routes, "ms a decision")
    first = next((row for row in rows if row["method"] == "expert"), None)
    note = ""
    if first is not None:
        shown, tried = f"{first['demonstrations']} demonstrations of {first['steps_shown']:,} steps", first["tried"]
        note = f"{shown}, from {tried} episodes of the expert.\n\n"
    return note + markdown(heads, [line(group, routes) for group in groups(rows)])


def line(group: list[Row], routes: list[str]) -> list[str]:
    """One method with one number of calls."""
    first, episodes = group[0], sum(row["episodes"] for row in group)
    successes = sum(row["successes"] for row in group)
    low, high = wilson(successes, episodes)
    latencies = [row["latency_ms"] for row in group if row["latency_ms"] is not None]
    lengths, scores = (float(np.mean([row[key] for row in group])) for key in ("mean_steps", "score"))
    return [
        first["method"], str(first["steps"] or "–"), ", ".join(str(row["successes"]) for row in group),
        f"{successes} / {episodes}", f"{low:.2f}–{high:.2f}", f"{lengths:.0f}", f"{scores:.2f}",
        *(", ".join(str(row["routes"].get(name, 0)) for row in group) for name in routes),
        f"{np.median(latencies):.1f}" if latencies else "–",
    ]  # fmt: skip


def draw(rows: list[Row], file: Path) -> None:
    """Success against network calls, a panel for each task."""
    tasks = grouped(rows, lambda row: str(row["task"]))
    with figure(file, len(tasks), 2, 3.2) as axes:
        for axis, (task, own) in zip(axes, tasks.items(), strict=True):
            draw_task(axis, own)
            axis.set_title(task)
        axes[0].legend()


def draw_task(axis: Axes, rows: list[Row]) -> None:
    """Mean over seeds with Wilson's interval of all episodes."""
    for place, method in enumerate(ORDER[1:]):
        points = []
        for group in groups([row for row in rows if row["method"] == method]):
            episodes, successes = (sum(row[key] for row in group) for key in ("episodes", "successes"))
            points.append((group[0]["steps"], successes / episodes, *wilson(successes, episodes)))
        if not points:
            continue
        calls, mean, low, high = (np.array(values) for values in zip(*sorted(points), strict=True))
        moved = calls * 1.04 ** (place - 1.5)  # so that intervals at equal calls stand side by side
        errors = np.stack([mean - low, high - mean]).clip(0)
        axis.errorbar(moved, mean, errors, color=LIGHT.colour(place), marker="o", markersize=4, label=method)
    axis.set_xscale("log")
    ticks(axis.xaxis, [1, 2, 4, 16])
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("network calls a decision")
    axis.set_ylabel("success")
