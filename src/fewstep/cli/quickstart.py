"""The main jobs: train iSD and its baselines for the same seconds, on real digits or a robot's task; measure, show."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

from fewstep.data import Dataset, load_dataset
from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.evaluation.evaluate import (
    Row,
    measure_real,
    measure_run,
    table,
    training_seconds,
    write_figures,
    yardstick,
)
from fewstep.evaluation.report.run import report, watcher
from fewstep.evaluation.rollouts import (
    draw_film,
    expert_row,
    measure_rollouts,
    record_demonstrations,
    rollout_table,
    write_rollouts,
)
from fewstep.recipes import recipe
from fewstep.recipes.config import RunConfig
from fewstep.training import Callbacks, RunFolder, Runtime, train
from fewstep.utils.errors import ConfigError

SECONDS = 85.0
POLICY_SECONDS = 100.0
POLICY_TASK = "pointmaze-ring"
POLICY_DEMONSTRATIONS, POLICY_EPISODES = 100, 50
POLICY_RUNS = {"policy-mlp": ".", "policy-flow-matching": "flow-matching", "policy-regression": "regression"}
"""Recipes of the second quickstart, and where in its folder each trains."""


def quickstart(root: Path, cache: Path, runtime: Runtime, seconds: float = SECONDS) -> Path:
    """Train for `seconds` by each method, print the figures, write figures.json and report.html in `root`.

    Started again on the same folder it goes on where it stopped. Raises what `train` raises.
    """
    _check(seconds)
    config = _limited(recipe("digits"), seconds)
    dataset = load_dataset(config.data)
    run = RunFolder(root)
    print(f"1/3  {config.recipe}: iSD-T from scratch, at most {seconds:.0f} s", flush=True)
    _train(config, dataset, run, runtime)

    spent = training_seconds(run)
    baseline = RunFolder(root / "flow-matching")
    base_config = _limited(recipe("digits-flow-matching"), max(round(spent, 1), 0.1))
    base_config = replace(base_config, training=replace(base_config.training, images=100 * config.training.images))
    if baseline.config_file.exists():
        base_config = baseline.config()
    print(f"2/3  {base_config.recipe}: the same network for the same {spent:.0f} s", flush=True)
    _train(base_config, dataset, baseline, runtime)

    print("3/3  measuring", flush=True)
    stick = yardstick(dataset, cache)
    rows: list[Row] = [
        *measure_run(run, stick),
        *measure_run(baseline, stick),
        measure_real(dataset, config.evaluation.samples, stick),
    ]
    write_figures(rows, root)
    print(table(rows))
    return report(run, title="fewstep quickstart: digits in one and two network calls")


def _check(seconds: float) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("the quickstart is one process: start it without torchrun, or train recipes with it")
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{seconds} seconds of training asked for: give a finite number above 0")


def _limited(config: RunConfig, seconds: float) -> RunConfig:
    return replace(config, training=replace(config.training, seconds=seconds))


def _train(config: RunConfig, dataset: Dataset, run: RunFolder, runtime: Runtime) -> None:
    result = train(config, dataset, run, runtime, Callbacks(watcher(run, config)))
    print(f"     {result.images:,} images in {result.seconds:.0f} s", flush=True)


def policy_quickstart(root: Path, runtime: Runtime, seconds: float = POLICY_SECONDS) -> Path:
    """The same for a robot's policy: demonstrations of the ring maze, iSD, flow matching and regression, report.html.

    Each trains for `seconds`. Started again on the same folder it goes on where it stopped. Raises what
    `record_demonstrations`, `train` and `roll_out` raise.
    """
    _check(seconds)
    root = root.resolve()
    runtime = replace(runtime, threads=runtime.threads or 1)  # the fastest for networks this small
    demonstrations = root.with_name(f"{root.name}-demos") / f"{POLICY_TASK}.safetensors"
    if not demonstrations.is_file():
        print(f"1/4  demonstrations of {POLICY_TASK}", flush=True)
        print(record_demonstrations(POLICY_TASK, POLICY_DEMONSTRATIONS, demonstrations, 0, None).splitlines()[0])
    runs = {name: RunFolder(root / folder) for name, folder in POLICY_RUNS.items()}
    rows: list[Row] = []
    for part, (name, run) in enumerate(runs.items(), 2):
        config = _limited(recipe(name), seconds)
        config = replace(config, data=replace(config.data, root=str(demonstrations)))
        print(f"{part}/4  {name}: at most {seconds:.0f} s", flush=True)
        result = train(config, load_dataset(config.data), run, runtime)
        print(f"     {result.images:,} chunks of actions in {result.seconds:.0f} s", flush=True)
        found, task, policy = measure_rollouts(run.root, (), "", POLICY_EPISODES, 0, FIRST_TEST_SEED, 25, None)
        if run.root == root:
            found.append(expert_row(task, POLICY_EPISODES, FIRST_TEST_SEED))
        write_rollouts(found, run.root)
        draw_film(policy, task, FIRST_TEST_SEED, run.root)
        rows += found
    print(rollout_table(rows))
    return report(runs["policy-mlp"], title="fewstep: a robot's policy in one network call")
