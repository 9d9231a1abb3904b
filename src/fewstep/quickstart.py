"""The main job: train iSD-T and its baseline on real digits for the same seconds, measure both, show them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from fewstep.config import RunConfig
from fewstep.data import Dataset, load_dataset
from fewstep.errors import ConfigError
from fewstep.measuring import Row, measure_real, measure_run, table, training_seconds, write_figures, yardstick
from fewstep.recipes import recipe
from fewstep.runs import report, watcher
from fewstep.training import Attendants, Machine, RunFolder, train

SECONDS = 85.0


def quickstart(root: Path, cache: Path, machine: Machine, seconds: float = SECONDS) -> Path:
    """Train for `seconds` by each method, print the figures, write figures.json and report.html in `root`.

    Started again on the same folder it goes on where it stopped. Raises what `train` raises.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("the quickstart is one process: start it without torchrun, or train recipes with it")
    if seconds <= 0:
        raise ConfigError(f"{seconds} seconds of training asked for: give more than 0")
    config = _limited(recipe("digits"), seconds)
    dataset = load_dataset(config.data)
    run = RunFolder(root)
    print(f"1/3  {config.recipe}: iSD-T from scratch, at most {seconds:.0f} s", flush=True)
    _train(config, dataset, run, machine)

    spent = training_seconds(run)
    baseline = RunFolder(root / "flow-matching")
    base_config = _limited(recipe("digits-flow-matching"), max(round(spent, 1), 0.1))
    base_config = replace(base_config, training=replace(base_config.training, images=100 * config.training.images))
    if baseline.config_file.exists():
        base_config = baseline.config()
    print(f"2/3  {base_config.recipe}: the same network for the same {spent:.0f} s", flush=True)
    _train(base_config, dataset, baseline, machine)

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


def _limited(config: RunConfig, seconds: float) -> RunConfig:
    return replace(config, training=replace(config.training, seconds=seconds))


def _train(config: RunConfig, dataset: Dataset, run: RunFolder, machine: Machine) -> None:
    result = train(config, dataset, run, machine, Attendants(watcher(run, config)))
    print(f"     {result.images:,} images in {result.seconds:.0f} s", flush=True)
