"""Does the skip help training from scratch, above all short runs? Whole runs of several lengths, paired by seed."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fewstep as fs
from benchmarks.harness import QUIET, RESULTS, Grid, Row, chosen, digest, interval, markdown
from benchmarks.policies.__main__ import demonstrations_of
from fewstep.evaluation.metrics.features import default_extractor
from fewstep.evaluation.metrics.fidelity import frechet_distance
from fewstep.flow.preconditioning.skip import SkipPreconditioningConfig
from fewstep.policies.tasks.registry import find_task
from fewstep.recipes import fitted, recipe
from fewstep.recipes.config import RunConfig
from fewstep.training import train_run

TASK, EPISODES, SAMPLES = "pointmaze-ring", 100, 2000
LENGTHS = {
    "digits, iSD-T": (25_600, 51_200, 204_800),
    "digits, MeanFlow": (25_600, 51_200),
    "actions, iSD": (12_800, 51_200),
}
"""Images or chunks of each run: its schedule is as long as the run."""
RECIPES = {"digits, iSD-T": "digits", "digits, MeanFlow": "digits-meanflow", "actions, iSD": "policy-mlp"}
METHODS: dict[str, dict[str, Any] | None] = {"without": None, "covariance": {}, "covariance, seen": {}}
CALLS = (1, 2)


@dataclass(frozen=True)
class Cell:
    """A run: setting (a key of LENGTHS), method, length in images, seed."""

    setting: str
    method: str
    images: int
    seed: int


def configuration(cell: Cell) -> RunConfig:
    """The recipe of the setting, as long as the cell, with a skip or without."""
    base = config = recipe(RECIPES[cell.setting])
    settings = METHODS[cell.method]
    if settings is not None:
        skip = SkipPreconditioningConfig(base=config.model.preconditioning, **settings)
        network = replace(config.network, sees_skip=cell.method.endswith("seen"))  # type: ignore[call-arg]
        config = replace(config, model=replace(config.model, preconditioning=skip), network=network)
    images = dict.fromkeys(("images", "checkpoint_images", "sample_images"), cell.images)
    return fitted(replace(config, training=replace(config.training, seed=cell.seed, **images)), base)


def plan() -> Iterator[Cell]:
    """Three seeds of each."""
    for setting, lengths in LENGTHS.items():
        yield from (Cell(setting, name, n, seed) for n in lengths for seed in range(3) for name in METHODS)


def settings(cell: Cell) -> str:
    """The digest of what a cell trains and how it is measured, whatever its seed."""
    config = configuration(replace(cell, seed=0))
    return digest(
        config.data, config.model, config.network, config.objective, config.optimizer, config.training, TASK, EPISODES,
        SAMPLES,
    )  # fmt: skip


GRID = Grid(RESULTS / "skip_scratch.jsonl", ("setting", "method", "images", "seed"), plan, settings)


def measure(cell: Cell, work: Path) -> list[Row]:
    """Train, and the Frechet distance to held-out data, or the share of episodes that reach their goal, by calls."""
    config = configuration(cell)
    if cell.setting.startswith("actions"):
        config = replace(config, data=replace(config.data, root=str(demonstrations_of(TASK, work))))
    dataset = fs.load_dataset(config.data)
    with tempfile.TemporaryDirectory() as folder:
        run = fs.RunFolder(Path(folder) / "run")
        result = train_run(config, dataset, run, replace(QUIET, threads=1))
        measured = _success(run) if dataset.policy is not None else _frechet(run, dataset, work)
    return [{"seconds": round(result.seconds, 1)} | measured]


def _success(run: fs.RunFolder) -> Row:
    found = {}
    for calls in CALLS:
        episodes = fs.roll_out(fs.load_policy(run.root, calls, 0), find_task(TASK), EPISODES).episodes
        found[f"calls {calls}"] = sum(episode.success for episode in episodes) / len(episodes)
    return found


def _frechet(run: fs.RunFolder, dataset: fs.Dataset, work: Path) -> Row:
    extractor, pipeline = default_extractor(dataset, cache=work), run.pipeline()
    real = extractor.features(dataset.heldout.fetch(torch.arange(len(dataset.heldout)))[0])
    return {
        f"calls {calls}": frechet_distance(
            extractor.features(pipeline.generate(SAMPLES, steps=calls).samples.clamp(-1, 1)), real
        )
        for calls in CALLS
    }


def table() -> str:
    """A line for each length: every method in one and two calls, mean and range over seeds."""
    rows, lines = GRID.rows(), []
    for setting, lengths in LENGTHS.items():
        digits = 2 if setting.startswith("actions") else 1
        for images in lengths:
            own = chosen(rows, setting=setting, images=images)
            cells = [
                interval([row[f"calls {calls}"] for row in chosen(own, method=name)], digits, "–")
                for calls in CALLS
                for name in METHODS
            ]
            lines += [(setting, f"{images:,}", *cells)] if own else []
    heads = [f"{name}, {calls} call{'s' * (calls > 1)}" for calls in CALLS for name in METHODS]
    return markdown(("setting", "images", *heads), lines)
