"""Robot policies: regression, flow matching and iSD on the same demonstrations, network and budget, task by task.

    python benchmarks/policies.py run [--tasks pointmaze-ring ...] [--seeds 0 1 2] [--methods iSD ...] [--work FOLDER]
    python benchmarks/policies.py

`run` records the demonstrations of every task that has none in FOLDER yet (100 episodes of its expert, 300 of
fetch-retrieve's), trains every cell that has no result, lets it act from 50 starts that no demonstration had, and adds
one line to benchmarks/results/policies/cells.jsonl. A cell is a task, a method and a training seed; all cells of a task
have the same network, batch, steps and learning rate, those of one seed the same initial weights and order of the data.
Without `run` it writes benchmarks/results/policies.json, docs/figures/policies.png and studies/tables/policies.md.

Methods: regression (least squares), flow matching (by Euler's method in 16, 4, 2 and 1 calls), iSD (2 calls and 1), and
iSD from the weights of the flow-matching policy of the same seed, which has then seen twice the samples.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from digests import digest
from fewstep.data import load_dataset
from fewstep.data.demonstrations.episodes import load_demonstrations, save_demonstrations
from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.evaluation.evaluate import training_seconds
from fewstep.policies.figures import rollout_row
from fewstep.policies.policy import load_policy
from fewstep.policies.rollout import Rollout, expert_rollout, record, roll_out
from fewstep.policies.tasks.registry import TASKS as ALL_TASKS
from fewstep.policies.tasks.registry import find_task
from fewstep.recipes import recipe
from fewstep.recipes.config import RunConfig
from fewstep.training import RunFolder, Runtime, train
from policies_summary import summarise

RESULTS = Path(__file__).parent / "results" / "policies"
CELLS = RESULTS / "cells.jsonl"
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
DEMONSTRATIONS = {"fetch-retrieve": 300}
"""Episodes of the expert; 100 for a task that is not named."""
STEPS = {"pointmaze-ring": 4000, "pusht": 4000, "fetch-retrieve": 4000}
"""Training steps of 256 samples; 1,000 for a task that is not named."""


def configuration(task: str, method: str, demonstrations: Path, seed: int, initial: str) -> RunConfig:
    """The recipe, as long as the study's."""
    config = recipe(METHODS[method][0])
    images = STEPS.get(task, 1000) * config.training.batch_size
    training = replace(config.training, seed=seed, images=images, checkpoint_images=images)
    data = replace(config.data, root=str(demonstrations))
    return replace(config, data=data, training=training, initial=initial)


def demonstrations_of(task: str, work: Path) -> Path:
    """The task's demonstrations, recorded now if they are not there; others in their place are refused."""
    file, count = work / f"{task}.safetensors", DEMONSTRATIONS.get(task, 100)
    if file.is_file() and len(load_demonstrations(file)) != count:
        raise SystemExit(f"{file} does not hold the study's {count} episodes: give another folder with --work")
    if not file.is_file():
        found = record(find_task(task), count)
        (work / f"{task}.json").write_text(json.dumps({"tried": found.tried, "expert_errors": len(found.errors)}))
        save_demonstrations(found.demonstrations, file)
    return file


def expert_cell(task: str, work: Path) -> dict[str, Any]:
    """The expert at the same starts, and which routes its demonstrations took from them."""
    demonstrations = load_demonstrations(demonstrations_of(task, work))
    recorded = json.loads((work / f"{task}.json").read_text())
    found = expert_rollout(find_task(task), EPISODES)
    row = rollout_row(found, find_task(task), "expert", FIRST_TEST_SEED) | {"seed": 0, "seconds": 0.0}
    shown = {"demonstrations": len(demonstrations), "steps_shown": len(demonstrations.actions)}
    return row | shown | recorded | by_start(found)


def by_start(found: Rollout) -> dict[str, Any]:
    """Route of every episode, in the order of the starts; empty where there are none."""
    routes = [episode.route for episode in found.episodes]
    return {"route_of_start": routes} if any(routes) else {}


def cell(task: str, method: str, seed: int, work: Path, models: Path) -> list[dict[str, Any]]:
    """Train, and a row for each number of calls."""
    starts = method == "iSD from flow matching"
    initial = trained(task, "flow matching", seed, work, models) if starts else None
    folder = trained(task, method, seed, work, models, initial)
    seconds = training_seconds(RunFolder(folder))
    rows = []
    for steps in METHODS[method][1]:
        policy = load_policy(folder, steps, seed)
        found = roll_out(policy, find_task(task), EPISODES)
        row = rollout_row(found, find_task(task), method, FIRST_TEST_SEED, policy)
        rows.append(
            row | {"seed": seed, "seconds": round(seconds, 1), "settings": settings(task, method), **by_start(found)}
        )
    return rows


def trained(task: str, method: str, seed: int, work: Path, models: Path, initial: Path | None = None) -> Path:
    """The run of a cell, trained to its end, or taken as it is where it was before."""
    start = "" if initial is None else str(initial)
    config = configuration(task, method, demonstrations_of(task, work), seed, start)
    run = RunFolder(models / f"{task}-{method}-{seed}")
    train(config, load_dataset(config.data), run, Runtime(cpu=True, quiet=True, threads=1))
    return run.root


def settings(task: str, method: str) -> str:
    """The digest of what a cell trains and how it is tried: cells of other settings are not this study's."""
    config = configuration(task, method, Path(), 0, "")
    training = config.training
    return digest(
        config.data, config.model, config.network, config.objective, config.optimizer, training.images,
        training.batch_size, training.ema_power, training.ema_decay, DEMONSTRATIONS.get(task, 100), EPISODES,
    )  # fmt: skip


def plan(tasks: list[str], methods: list[str], seeds: list[int]) -> Iterator[tuple[str, str, int]]:
    """Cells, a task's seeds one after the other; flow matching before what starts from it."""
    for seed in seeds:
        for task in tasks:
            if seed == seeds[0]:
                yield task, "expert", 0
            yield from ((task, method, seed) for method in METHODS if method in methods)


def read_cells() -> list[dict[str, Any]]:
    """Every stored row of today's settings; a line that was cut off is left out."""
    found: list[dict[str, Any]] = []
    for line in CELLS.read_text().splitlines() if CELLS.is_file() else []:
        with contextlib.suppress(ValueError):
            found += json.loads(line)
    return [
        row for row in found if row["method"] == "expert" or row["settings"] == settings(row["task"], row["method"])
    ]


def run(options: argparse.Namespace) -> None:
    """Train the cells that have no result yet."""
    torch.set_num_threads(1)  # faster than two for networks this small
    RESULTS.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    models = options.models or options.work / "models"
    for task, method, seed in plan(options.tasks, options.methods, options.seeds):
        if any((row["task"], row["method"], row["seed"]) == (task, method, seed) for row in read_cells()):
            continue
        expert = method == "expert"
        rows = [expert_cell(task, options.work)] if expert else cell(task, method, seed, options.work, models)
        with CELLS.open("a") as file:
            file.write(json.dumps(rows) + "\n")
        told = ", ".join(f"{row['successes']} at {row['steps']}" for row in rows)
        print(f"{task}, {method}, seed {seed}: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["run"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(ALL_TASKS), metavar="TASK")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--work", type=Path, default=Path("runs/policies-study"), help="where demonstrations are kept")
    parser.add_argument("--models", type=Path, help="where trained policies are kept; WORK/models when not given")
    options = parser.parse_args()
    if options.command == "run":
        run(options)
    else:
        print(summarise(read_cells(), RESULTS.parent))


if __name__ == "__main__":
    main()
