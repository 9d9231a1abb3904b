"""Robot policies: regression, flow matching and iSD on the same demonstrations, network and budget, task by task.

A cell is a task, a method and a training seed; all cells of a task have the same network, batch, steps and learning
rate, those of one seed the same initial weights and order of the data. "iSD from flow matching" starts from the
flow-matching policy of its seed, and has then seen twice the samples.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from matplotlib.axes import Axes

import benchmarks.harness as h
import fewstep as fs
from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.evaluation.evaluate import training_seconds
from fewstep.evaluation.report.canvas import LIGHT
from fewstep.policies.figures import rollout_row
from fewstep.policies.rollout import expert_rollout, record, wilson
from fewstep.policies.tasks.registry import find_task
from fewstep.recipes import recipe
from fewstep.training import train_run

TASKS = (
    "metaworld-pick-place", "pointmaze-ring", "pusht", "metaworld-peg-insert-side", "fetch-pick-and-place",
    "fetch-retrieve",
)  # fmt: skip
METHODS: dict[str, tuple[str, tuple[int, ...]]] = {
    "regression": ("policy-regression", (1,)),
    "flow matching": ("policy-flow-matching", (16, 4, 2, 1)),
    "iSD": ("policy-mlp", (2, 1)),
    "iSD from flow matching": ("policy-mlp", (2, 1)),
}
EPISODES = 50
DEMONSTRATIONS = {task: 300 if task == "fetch-retrieve" else 100 for task in TASKS}
"""Episodes of the expert."""
LONG = ("pointmaze-ring", "pusht", "fetch-retrieve")
"""Tasks of 4,000 training steps of 256 samples; the others have 1,000."""
SUMMED = (("expert", 0), ("regression", 1), *(("flow matching", n) for n in (1, 2, 16)), ("iSD", 1), ("iSD", 2))
ORDER = ("expert", "regression", "flow matching", "iSD", "iSD from flow matching")


@dataclass(frozen=True)
class Cell:
    """A task, a method ("expert" has no seed but 0) and a training seed."""

    task: str
    method: str
    seed: int


def configuration(task: str, method: str, demonstrations: Path, seed: int, initial: str) -> fs.RunConfig:
    """The recipe, as long as the study's."""
    config = recipe(METHODS[method][0])
    images = (4000 if task in LONG else 1000) * config.training.batch_size
    training = replace(config.training, seed=seed, images=images, checkpoint_images=images)
    return replace(config, data=replace(config.data, root=str(demonstrations)), training=training, initial=initial)


def demonstrations_of(task: str, work: Path) -> Path:
    """The task's demonstrations, recorded now if they are not there; others in their place are refused."""
    file, count = work / f"{task}.safetensors", DEMONSTRATIONS[task]
    if file.is_file() and len(fs.load_demonstrations(file)) != count:
        raise SystemExit(f"{file} does not hold the study's {count} episodes: give another folder with --work")
    if not file.is_file():
        found = record(find_task(task), count)
        work.mkdir(parents=True, exist_ok=True)
        (work / f"{task}.json").write_text(json.dumps({"tried": found.tried, "expert_errors": len(found.errors)}))
        fs.save_demonstrations(found.demonstrations, file)
    return file


def measure(cell: Cell, work: Path) -> list[h.Row]:
    """Train, and a row for each number of calls; the expert's has what its demonstrations are."""
    task = find_task(cell.task)
    if cell.method == "expert":
        shown, found = fs.load_demonstrations(demonstrations_of(cell.task, work)), expert_rollout(task, EPISODES)
        counts = {"seconds": 0.0, "demonstrations": len(shown), "steps_shown": len(shown.actions)}
        recorded = json.loads((work / f"{cell.task}.json").read_text())
        return [rollout_row(found, task, "expert", FIRST_TEST_SEED) | counts | recorded]
    starts = cell.method == "iSD from flow matching"
    folder = trained(cell, work, str(trained(replace(cell, method="flow matching"), work)) if starts else "")
    seconds = {"seconds": round(training_seconds(fs.RunFolder(folder)), 1)}
    policies = [fs.load_policy(folder, steps, cell.seed) for steps in METHODS[cell.method][1]]
    found = [(fs.roll_out(policy, task, EPISODES), policy) for policy in policies]
    return [rollout_row(own, task, cell.method, FIRST_TEST_SEED, policy) | seconds for own, policy in found]


def trained(cell: Cell, work: Path, initial: str = "") -> Path:
    """The run of a cell, trained to its end, or taken as it is where it was before."""
    config = configuration(cell.task, cell.method, demonstrations_of(cell.task, work), cell.seed, initial)
    run = fs.RunFolder(work / "models" / f"{cell.task}-{cell.method}-{cell.seed}")
    train_run(config, fs.load_dataset(config.data), run, fs.Runtime(cpu=True, quiet=True, threads=1))
    return run.root


def settings(cell: Cell) -> str:
    """The digest of what a cell trains and how it is tried; empty for the expert, who trains nothing."""
    if cell.method == "expert":
        return ""
    config = configuration(cell.task, cell.method, Path(), 0, "")
    own = config.training
    return h.digest(
        config.data, config.model, config.network, config.objective, config.optimizer, own.images, own.batch_size,
        own.ema_power, own.ema_decay, DEMONSTRATIONS[cell.task], EPISODES,
    )  # fmt: skip


def plan(tasks: tuple[str, ...] = TASKS, seeds: tuple[int, ...] = (0, 1, 2)) -> Iterator[Cell]:
    """Cells, a task's seeds one after the other; flow matching before what starts from it."""
    for seed in seeds:
        for task in tasks:
            if seed == seeds[0]:
                yield Cell(task, "expert", 0)
            yield from (Cell(task, method, seed) for method in METHODS)


GRID = h.Grid(h.RESULTS / "policies" / "cells.jsonl", ("task", "method", "seed"), plan, settings)


def tables() -> dict[str, str]:
    """A table for each task, in the order of their first cells, and one of all."""
    tasks = h.grouped(GRID.rows(), lambda row: str(row["task"]))
    return {task: section(rows) for task, rows in tasks.items()} | {"All tasks": summary(tasks)}


def summary(tasks: dict[str, list[h.Row]]) -> str:
    """Successes and Wilson's interval of all episodes, a line for each task."""
    names, lines = (f"{method}, {calls} call{'s' * (calls != 1)}" for method, calls in SUMMED), []
    for task, rows in tasks.items():
        found = (pooled(h.chosen(rows, method=method, steps=calls)) for method, calls in SUMMED)
        lines.append((task, *(f"{good} / {count} ({low:.2f}–{high:.2f})" for good, count, (low, high) in found)))
    return h.markdown(("task", *names), lines)


def groups(rows: list[h.Row]) -> list[list[h.Row]]:
    """Rows of one task by method and number of calls, most calls first; seeds in order."""
    found = h.grouped(rows, lambda row: (ORDER.index(row["method"]), -row["steps"]))
    return [sorted(own, key=lambda row: int(row["seed"])) for _, own in sorted(found.items())]


def pooled(group: list[h.Row]) -> tuple[int, int, tuple[float, float]]:
    """Successes and episodes of all seeds, and Wilson's interval of them."""
    successes, episodes = (sum(row[key] for row in group) for key in ("successes", "episodes"))
    return successes, episodes, wilson(successes, episodes)


def section(rows: list[h.Row]) -> str:
    """A task's table: success by seed and over all, with Wilson's interval of all episodes."""
    routes = sorted({name for row in rows for name in row["routes"]})
    heads = ("method", "calls", "success by seed", "all", "95 %", "mean length", "score", *routes, "ms a decision")
    form = "{demonstrations} demonstrations of {steps_shown:,} steps, from {tried} episodes of the expert.\n\n"
    note = "".join(form.format(**row) for row in h.chosen(rows, method="expert"))
    return note + h.markdown(heads, [line(group, routes) for group in groups(rows)])


def line(group: list[h.Row], routes: list[str]) -> list[object]:
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


def draw(file: Path = h.FIGURES / "policies.png") -> None:
    """Success against network calls, a panel for each task."""
    tasks = h.grouped(GRID.rows(), lambda row: str(row["task"]))
    with h.figure(file, len(tasks), 2, 3.2) as axes:
        for axis, (task, rows) in zip(axes, tasks.items(), strict=True):
            draw_task(axis, rows)
            axis.set_title(task)
        axes[0].legend()


def draw_task(axis: Axes, rows: list[h.Row]) -> None:
    """Mean over seeds with Wilson's interval of all episodes."""
    for place, method in enumerate(ORDER[1:]):
        points = []
        for group in groups(h.chosen(rows, method=method)):
            successes, episodes, (low, high) = pooled(group)
            points.append((group[0]["steps"], mean := successes / episodes, mean - low, high - mean))
        if points:
            calls, means, *errors = np.array(sorted(points)).T
            moved = calls * 1.04 ** (place - 1.5)  # so that intervals at equal calls stand side by side
            colour = LIGHT.colour(place)
            axis.errorbar(moved, means, np.clip(errors, 0, None), color=colour, marker="o", markersize=4, label=method)
    axis.set(xscale="log", ylim=(-0.03, 1.03), xlabel="network calls a decision", ylabel="success")
    h.ticks(axis.xaxis, [1, 2, 4, 16])


STUDY = h.Study("policies", tables, draw, GRID)


def run(
    tasks: tuple[str, ...] = TASKS,
    methods: tuple[str, ...] = tuple(METHODS),
    seeds: h.Seeds = (0, 1, 2),
    worker: h.Worker = "0/1",
    work: Path = Path("runs/policies-study"),
) -> None:
    """Train the cells that have no result yet, and let each act from 50 starts that no demonstration had.

    A task's demonstrations, 100 episodes of its expert, 300 of fetch-retrieve's, are recorded unless they are in WORK,
    where trained policies are kept too.
    """
    torch.set_num_threads(1)  # faster than two for networks this small
    chosen = [cell for cell in plan(tasks, seeds) if cell.method in ("expert", *methods)]
    GRID.run(chosen, lambda cell: measure(cell, work), worker)


if __name__ == "__main__":
    STUDY.main(run=run)
