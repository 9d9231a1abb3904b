"""`fewstep quickstart`: iSD and flow matching for the same seconds on real digits, and a student of the latter."""

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from fewstep.data.base import Dataset
from fewstep.data.sources import load_dataset
from fewstep.evaluation.evaluate import build_evaluator, measure_real, measure_run, training_seconds
from fewstep.evaluation.figures import Row, format_table, write_figures
from fewstep.evaluation.report.run import report, watcher
from fewstep.recipes import fitted, recipe
from fewstep.recipes.config import RunConfig
from fewstep.training import Callbacks, RunFolder, Runtime, train_run
from fewstep.utils.cache import cache_folder
from fewstep.utils.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """Train iSD-T and flow matching on real digits for the same seconds, distil the latter, write a report."""

    out: Path = Path("runs/quickstart")
    """Folder of the run; started again on it, the command goes on where it stopped."""
    seconds: float = 85.0
    """Longest training time of each of the two methods; the student of the second has half of it."""
    runtime: Runtime = field(default_factory=Runtime)


def run(options: Options) -> None:
    """Run the quickstart in its folder."""
    print(f"Report: {quickstart(options.out, cache_folder(), options.runtime, options.seconds)}")


def quickstart(root: Path, cache: Path, runtime: Runtime, seconds: float) -> Path:
    """Train for `seconds` by each method and half of them for the student; figures.json and report.html in `root`.

    Started again on the same folder it goes on where it stopped. Raises what `train` raises.
    """
    check_seconds(seconds)
    config = limited(recipe("digits"), seconds)
    dataset = load_dataset(config.data)
    run = RunFolder(root)
    print(f"1/4  {config.recipe}: iSD-T from scratch, at most {seconds:.0f} s", flush=True)
    _train(config, dataset, run, runtime)

    spent = training_seconds(run)
    baseline = RunFolder(root / "flow-matching")
    base_config = limited(recipe("digits-flow-matching"), max(round(spent, 1), 0.1))
    base_config = replace(base_config, training=replace(base_config.training, images=100 * config.training.images))
    if baseline.config_file.exists():
        base_config = baseline.config()
    print(f"2/4  {base_config.recipe}: the same network for the same {spent:.0f} s", flush=True)
    _train(base_config, dataset, baseline, runtime)

    student = RunFolder(root / "student")
    student_config = limited(replace(recipe("ctm-flow-matching"), teacher=str(baseline.root)), max(spent / 2, 0.1))
    if student.config_file.exists():
        student_config = student.config()
    print(f"3/4  {student_config.recipe}: distilled from that, for {spent / 2:.0f} s", flush=True)
    _train(student_config, dataset, student, runtime)

    print("4/4  measuring", flush=True)
    evaluator = build_evaluator(dataset, cache)
    rows: list[Row] = [
        *measure_run(run, evaluator),
        *measure_run(baseline, evaluator),
        *measure_run(student, evaluator),
        measure_real(dataset, config.evaluation.samples, evaluator),
    ]
    write_figures(rows, root)
    print(format_table(rows, dataset, evaluator))
    return report(run, title="fewstep quickstart: digits in one and two network calls")


def check_seconds(seconds: float) -> None:
    """Raise ConfigError under several processes, or unless the time is finite and positive."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("the quickstart is one process: start it without torchrun, or train recipes with it")
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{seconds} seconds of training asked for: give a finite number above 0")


def limited(config: RunConfig, seconds: float) -> RunConfig:
    """The same run, ended after so many seconds of training."""
    return fitted(replace(config, training=replace(config.training, seconds=seconds)), config)


def _train(config: RunConfig, dataset: Dataset, run: RunFolder, runtime: Runtime) -> None:
    result = train_run(config, dataset, run, runtime, Callbacks(watcher(run, config)))
    print(f"     {result.images:,} images in {result.seconds:.0f} s", flush=True)
