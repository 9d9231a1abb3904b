"""The cells of the study of policies: their settings, and how one is trained and tried."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import fewstep as fs
from benchmarks.harness import RESULTS, Grid, Row, digest
from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.evaluation.evaluate import training_seconds
from fewstep.policies.figures import rollout_row
from fewstep.policies.rollout import expert_rollout, record
from fewstep.policies.tasks.registry import find_task
from fewstep.recipes import recipe

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


def measure(cell: Cell, work: Path) -> list[Row]:
    """Train, and a row for each number of calls; the expert's has what its demonstrations are."""
    task = find_task(cell.task)
    if cell.method == "expert":
        shown, found = fs.load_demonstrations(demonstrations_of(cell.task, work)), expert_rollout(task, EPISODES)
        counts = {"seconds": 0.0, "demonstrations": len(shown), "steps_shown": len(shown.actions)}
        recorded = json.loads((work / f"{cell.task}.json").read_text())
        return [rollout_row(found, task, "expert", FIRST_TEST_SEED) | counts | recorded]
    starts = cell.method == "iSD from flow matching"
    folder = trained(cell, work, str(trained(replace(cell, method="flow matching"), work)) if starts else "")
    seconds, rows = round(training_seconds(fs.RunFolder(folder)), 1), []
    for steps in METHODS[cell.method][1]:
        policy = fs.load_policy(folder, steps, cell.seed)
        row = rollout_row(fs.roll_out(policy, task, EPISODES), task, cell.method, FIRST_TEST_SEED, policy)
        rows.append(row | {"seconds": seconds})
    return rows


def trained(cell: Cell, work: Path, initial: str = "") -> Path:
    """The run of a cell, trained to its end, or taken as it is where it was before."""
    config = configuration(cell.task, cell.method, demonstrations_of(cell.task, work), cell.seed, initial)
    run = fs.RunFolder(work / "models" / f"{cell.task}-{cell.method}-{cell.seed}")
    fs.train(config, fs.load_dataset(config.data), run, fs.Runtime(cpu=True, quiet=True, threads=1))
    return run.root


def settings(cell: Cell) -> str:
    """The digest of what a cell trains and how it is tried; empty for the expert, who trains nothing."""
    if cell.method == "expert":
        return ""
    config = configuration(cell.task, cell.method, Path(), 0, "")
    own = config.training
    return digest(
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


GRID = Grid(RESULTS / "policies" / "cells.jsonl", ("task", "method", "seed"), plan, settings)
