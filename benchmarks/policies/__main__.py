"""Robot policies: regression, flow matching and iSD on the same demonstrations, network and budget, task by task.

A cell is a task, a method and a training seed; all cells of a task have the same network, batch, steps and learning
rate, those of one seed the same initial weights and order of the data. Methods: regression (least squares), flow
matching (by Euler's method in 16, 4, 2 and 1 calls), iSD (2 calls and 1), and iSD from the weights of the flow-matching
policy of the same seed, which has then seen twice the samples.
"""

from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from matplotlib.axes import Axes

from benchmarks.harness import FIGURES, Row, Seeds, Study, Worker, chosen, figure, grouped, markdown, ticks
from benchmarks.policies.run import GRID, METHODS, TASKS, measure, plan
from fewstep.evaluation.report.canvas import LIGHT
from fewstep.policies.rollout import wilson

SUMMED = (("flow matching", 1), ("flow matching", 2), ("flow matching", 16), ("iSD", 1), ("iSD", 2))
ORDER = ("expert", "regression", "flow matching", "iSD", "iSD from flow matching")


def tables() -> dict[str, str]:
    """A table for each task, in the order of their first cells, and one of all."""
    tasks = grouped(GRID.rows(), lambda row: str(row["task"]))
    return {task: section(rows) for task, rows in tasks.items()} | {"All tasks": summary(tasks)}


def summary(tasks: dict[str, list[Row]]) -> str:
    """Successes and Wilson's interval of all episodes, a line for each task."""
    names = ("expert", "regression", *(f"{method}, {calls} call{'s' * (calls > 1)}" for method, calls in SUMMED))
    lines = []
    for task, rows in tasks.items():
        found = [chosen(rows, method=name) for name in names[:2]]
        found += [chosen(rows, method=method, steps=calls) for method, calls in SUMMED]
        shown = [(*pooled(own)[:2], *pooled(own)[2]) for own in found]
        lines.append((task, *(f"{good} / {count} ({low:.2f}–{high:.2f})" for good, count, low, high in shown)))
    return markdown(("task", *names), lines)


def groups(rows: list[Row]) -> list[list[Row]]:
    """Rows of one task by method and number of calls, most calls first; seeds in order."""
    found = grouped(rows, lambda row: (ORDER.index(row["method"]), -row["steps"]))
    return [sorted(own, key=lambda row: int(row["seed"])) for _, own in sorted(found.items())]


def pooled(group: list[Row]) -> tuple[int, int, tuple[float, float]]:
    """Successes and episodes of all seeds, and Wilson's interval of them."""
    successes, episodes = (sum(row[key] for row in group) for key in ("successes", "episodes"))
    return successes, episodes, wilson(successes, episodes)


def section(rows: list[Row]) -> str:
    """A task's table: success by seed and over all, with Wilson's interval of all episodes."""
    routes = sorted({name for row in rows for name in row["routes"]})
    heads = ("method", "calls", "success by seed", "all", "95 %", "mean length", "score", *routes, "ms a decision")
    form = "{demonstrations} demonstrations of {steps_shown:,} steps, from {tried} episodes of the expert.\n\n"
    note = "".join(form.format(**row) for row in chosen(rows, method="expert"))
    return note + markdown(heads, [line(group, routes) for group in groups(rows)])


def line(group: list[Row], routes: list[str]) -> list[object]:
    """One method with one number of calls."""
    successes, episodes, (low, high) = pooled(group)
    latencies = [row["latency_ms"] for row in group if row["latency_ms"] is not None]
    length, score = (fmean(row[key] for row in group) for key in ("mean_steps", "score"))
    return [
        group[0]["method"], group[0]["steps"] or "–", ", ".join(str(row["successes"]) for row in group),
        f"{successes} / {episodes}", f"{low:.2f}–{high:.2f}", f"{length:.0f}", f"{score:.2f}",
        *(", ".join(str(row["routes"].get(name, 0)) for row in group) for name in routes),
        f"{median(latencies):.1f}" if latencies else "–",
    ]  # fmt: skip


def draw(file: Path = FIGURES / "policies.png") -> None:
    """Success against network calls, a panel for each task."""
    tasks = grouped(GRID.rows(), lambda row: str(row["task"]))
    with figure(file, len(tasks), 2, 3.2) as axes:
        for axis, (task, rows) in zip(axes, tasks.items(), strict=True):
            draw_task(axis, rows)
            axis.set_title(task)
        axes[0].legend()


def draw_task(axis: Axes, rows: list[Row]) -> None:
    """Mean over seeds with Wilson's interval of all episodes."""
    for place, method in enumerate(ORDER[1:]):
        points = []
        for group in groups(chosen(rows, method=method)):
            successes, episodes, (low, high) = pooled(group)
            points.append((group[0]["steps"], mean := successes / episodes, mean - low, high - mean))
        if points:
            calls, means, *errors = np.array(sorted(points)).T
            moved = calls * 1.04 ** (place - 1.5)  # so that intervals at equal calls stand side by side
            colour = LIGHT.colour(place)
            axis.errorbar(moved, means, np.clip(errors, 0, None), color=colour, marker="o", markersize=4, label=method)
    axis.set(xscale="log", ylim=(-0.03, 1.03), xlabel="network calls a decision", ylabel="success")
    ticks(axis.xaxis, [1, 2, 4, 16])


STUDY = Study("policies", tables, draw, GRID)


def run(
    tasks: tuple[str, ...] = TASKS,
    methods: tuple[str, ...] = tuple(METHODS),
    seeds: Seeds = (0, 1, 2),
    worker: Worker = "0/1",
    work: Path = Path("runs/policies-study"),
) -> None:
    """Train the cells that have no result yet, and let each act from 50 starts that no demonstration had.

    A task's demonstrations, 100 episodes of its expert, 300 of fetch-retrieve's, are recorded unless they are there.

    Args:
        tasks: names of tasks
        methods: names of methods
        work: where demonstrations and trained policies are kept
    """
    torch.set_num_threads(1)  # faster than two for networks this small
    chosen = [cell for cell in plan(tasks, seeds) if cell.method in ("expert", *methods)]
    GRID.run(chosen, lambda cell: measure(cell, work), worker)


if __name__ == "__main__":
    STUDY.main(run=run)
