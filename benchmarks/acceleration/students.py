"""CTM students of one teacher by method: the study's cells, and what is measured of each.

Measured with the averaged weights, on data and noise that training does not see:
  jump T -> S     RMSE per element of the student's jump against the teacher's ODE, from held-out data with noise
  sample, k calls the same along k steps from noise
  the same with one of two jumps taken by the teacher's ODE: what the other costs alone, at the times that the search
                   chose and, for the first, at a fixed one
  frechet, k calls Frechet distance of k-step samples to held-out data
The times between of 2- and 4-step sampling are searched for each method, seed and moment on one half of the held-out
data and noise, and the figure is taken on the other half.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, Grid, Row, Store, digest
from fewstep.data import Dataset
from fewstep.evaluation.metrics.alignment import rmse
from fewstep.evaluation.metrics.features import Extractor
from fewstep.evaluation.metrics.fidelity import frechet_distance
from fewstep.flow.flow_map import FlowMap, at
from fewstep.flow.ode import trajectory
from fewstep.flow.preconditioning import PreconditioningConfig
from fewstep.flow.times import edm_grid
from fewstep.networks.condition import Condition
from fewstep.objectives import CD, CTM, TeacherSteps
from fewstep.recipes import recipe
from fewstep.recipes.config import RunConfig
from fewstep.sampling.pipeline import Pipeline
from fewstep.training import Callbacks, RunFolder, Runtime
from fewstep.training.loop import Trainer
from fewstep.training.teacher import fingerprint
from fewstep.utils.parts import kind
from fewstep.utils.random import Draws

LEVELS = (80.0, 12.9, 1.9, 0.59, 0.002)
MIDDLE = 1.9
FIRST_JUMP = f"sample, 80 -> {MIDDLE:g} alone"
MIDDLES = (0.25, 0.4, 0.6, 0.9, 1.3, 1.9, 2.8, 4.2, 6.3, 9.5)
RHOS = (2.0, 3.0, 5.0, 7.0)
NOISE_SEED = 77_000


@dataclass(frozen=True)
class Plan:
    """One data set's study: its recipe, length, and how much is measured."""

    recipe: str
    moments: tuple[int, ...]
    samples: int
    jumps: int
    middles: tuple[float, ...] = MIDDLES


PLANS = {
    "mixture": Plan("ctm-mixture", (25, 50, 100, 150, 200, 300, 400, 600, 900), 4000, 1000),
    "digits": Plan("ctm-digits", (25, 50, 100, 150, 200, 300, 400, 600), 1180, 500),
    "digits-long": Plan("ctm-digits", (200, 400, 600, 900, 1300, 1800), 1180, 500, (0.06, 0.1, 0.16, *MIDDLES)),
    "fashion": Plan("ctm-fashion-mnist", (50, 100, 150, 200, 300, 400, 600, 800), 800, 128, MIDDLES[1::2]),
}


def methods(base: RunConfig) -> dict[str, RunConfig]:
    """Every method of the study as the recipe with one thing changed."""

    def model(name: str) -> RunConfig:
        return replace(base, model=replace(base.model, preconditioning=kind(PreconditioningConfig, name)))

    def statistics(**changes: object) -> RunConfig:
        return replace(base, statistics=replace(base.statistics, **changes))  # type: ignore[arg-type]

    def adversarial(config: RunConfig) -> RunConfig:
        assert isinstance(config.objective, CTM)
        return replace(config, objective=replace(config.objective, gan=0.2))

    cd = CD(steps=TeacherSteps(points=18, solver="heun", u="adjacent"), target_decay=0.99)
    found = {
        "euler": model("euler"),
        "analytic": base,
        "analytic, raw": statistics(centred=False),
        "analytic, not shrunk": statistics(shrink=False),
        "analytic, forward": model("analytic-forward"),
        "analytic, l only": statistics(use="l"),
        "analytic, s only": statistics(use="s"),
        "analytic, own statistics": statistics(refresh_images=base.training.images // 40),
        "CD, multistep": replace(model("euler"), objective=cd),
        "euler, adversarial": adversarial(model("euler")),
        "analytic, adversarial": adversarial(base),
    }
    for count in (64, 256, 1024, 4096, 16_384):
        found[f"analytic, {count} samples"] = statistics(samples=count)
    return found


class Truth:
    """The teacher's solutions that students are measured against, and the halves that times are searched on."""

    @torch.no_grad()
    def __init__(self, plan: Plan, dataset: Dataset, teacher: FlowMap, extractor: Extractor) -> None:
        self.plan, self.dataset, self.teacher, self.extractor = plan, dataset, teacher, extractor
        indices = torch.arange(min(plan.jumps, len(dataset.heldout)))
        x0, labels = dataset.heldout.fetch(indices)
        eps = Draws(NOISE_SEED, 0, indices).normal(0, dataset.shape)
        self.cond = Condition(labels)
        self.starts: dict[float, Tensor] = {}
        self.ends: dict[tuple[float, float], Tensor] = {}
        for i, high in enumerate(LEVELS[:-1]):
            grid = torch.tensor(LEVELS[i:], dtype=torch.float64)
            self.starts[high] = x0 + high * eps
            states = trajectory(teacher.denoise, teacher.path, self.starts[high], grid, steps=16, cond=self.cond)
            self.ends |= {(high, low): state for low, state in zip(LEVELS[i + 1 :], states[1:], strict=True)}
        noise_indices = torch.arange(plan.samples)
        count = max(dataset.num_classes, 1)
        self.labels = noise_indices % count if dataset.num_classes else None
        self.noise = teacher.path.prior(Draws(NOISE_SEED, 1, noise_indices).normal(0, dataset.shape))
        few = torch.arange(min(2 * plan.jumps, plan.samples))
        grid = torch.tensor([LEVELS[0], LEVELS[-1]], dtype=torch.float64)
        cond = Condition(None if self.labels is None else self.labels[few])
        self.samples = trajectory(teacher.denoise, teacher.path, self.noise[few], grid, steps=40, cond=cond)[-1]
        half = len(dataset.heldout) // 2
        self.halves = [self.features(part) for part in (torch.arange(half), torch.arange(half, 2 * half))]

    def features(self, indices: Tensor) -> Tensor:
        return torch.cat([self.extractor.features(self.dataset.heldout.fetch(i)[0]) for i in indices.split(1000)])

    def frechet(self, samples: Tensor, half: int) -> float:
        shown = samples if self.dataset.data_range is None else samples.clamp(*self.dataset.data_range)
        return frechet_distance(self.extractor.features(shown), self.halves[half])


def walk(model: FlowMap, noise: Tensor, labels: Tensor | None, times: Tensor, gamma: float) -> Tensor:
    """k-step samples (math.md §6): jumps along `times`; with gamma = 1 to the data end and back up by fresh noise."""
    parts = []
    for rows in torch.arange(len(noise)).split(500):
        x, cond = noise[rows], Condition(None if labels is None else labels[rows])
        for i, (t, s) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
            if gamma and s > float(times[-1]):
                x = model.jump(x, at(t, x), at(float(times[-1]), x), cond)
                x = x + s * Draws(NOISE_SEED, 2 + i, rows).normal(0, tuple(x.shape[1:]))
            else:
                x = model.jump(x, at(t, x), at(s, x), cond)
        parts.append(x)
    return torch.cat(parts)


def schedules(model: FlowMap, plan: Plan, steps: int) -> list[Tensor]:
    """The falling times among which a k-step sampler may choose."""
    first, last = LEVELS[0], LEVELS[-1]
    if steps == 1:
        return [torch.tensor([first, last], dtype=torch.float64)]
    if steps == 2:
        return [torch.tensor([first, middle, last], dtype=torch.float64) for middle in plan.middles]
    return [edm_grid(model.path, steps, rho) for rho in RHOS]


@torch.no_grad()
def measure(model: FlowMap, truth: Truth, gamma: float, jumps_anywhere: bool) -> list[Row]:
    """Every figure of one moment."""
    rows: list[Row] = []
    for (high, low), end in truth.ends.items():
        if not jumps_anywhere and low != LEVELS[-1]:
            continue
        x = truth.starts[high]
        error = rmse(model.jump(x, at(high, x), at(low, x), truth.cond), end)
        rows.append({"measure": f"jump {high:g} -> {low:g}", "nfe": 1, "value": error})
    many = len(truth.noise) // 2
    few = len(truth.samples) // 2
    if jumps_anywhere:
        rows.append({"measure": FIRST_JUMP, "nfe": 2, "value": alone(model, truth, few, MIDDLE, 0)})
    for steps in (1, 2, 4):
        rows += sampled(model, truth, steps, gamma, many, few)
    return rows


def alone(model: FlowMap, truth: Truth, few: int, middle: float, which: int) -> float:
    """What a 2-step sampler that stops at `middle` loses by one jump alone (0: the first): the ODE takes the other."""
    rows = slice(few, 2 * few)
    x, cond = truth.noise[rows], Condition(None if truth.labels is None else truth.labels[rows])
    for i, (t, s) in enumerate(((LEVELS[0], middle), (middle, LEVELS[-1]))):
        if i == which:
            x = model.jump(x, at(t, x), at(s, x), cond)
        else:
            grid = torch.tensor([t, s], dtype=torch.float64)
            x = trajectory(truth.teacher.denoise, truth.teacher.path, x, grid, steps=16, cond=cond)[-1]
    return rmse(x, truth.samples[rows])


def sampled(model: FlowMap, truth: Truth, steps: int, gamma: float, many: int, few: int) -> list[Row]:
    """Frechet distance and, for the deterministic sampler, error against the teacher's samples, times searched."""

    def draw(times: Tensor, rows: slice) -> Tensor:
        labels = None if truth.labels is None else truth.labels[rows]
        return walk(model, truth.noise[rows], labels, times, gamma)

    def best(score: Callable[[Tensor], float]) -> Tensor:
        options = schedules(model, truth.plan, steps)
        return options[0] if len(options) == 1 else min(options, key=score)

    times = best(lambda option: truth.frechet(draw(option, slice(0, many)), 0))
    value = truth.frechet(draw(times, slice(many, 2 * many)), 1)
    rows: list[Row] = [
        {"measure": "frechet", "nfe": steps, "value": value, "times": [round(t, 4) for t in times.tolist()]}
    ]
    if gamma:
        return rows

    def error(option: Tensor, rows: slice) -> float:
        return rmse(draw(option, rows), truth.samples[rows])

    times = best(lambda option: error(option, slice(0, few)))
    found = error(times, slice(few, 2 * few))
    rows.append({"measure": "sample", "nfe": steps, "value": found, "times": [round(t, 4) for t in times.tolist()]})
    if steps == 2:
        for which, name in enumerate(("first", "last")):
            value = alone(model, truth, few, float(times[1]), which)
            rows.append({"measure": f"sample, {name} jump alone", "nfe": 2, "value": value})
    return rows


@dataclass(frozen=True)
class Cell:
    """A student: data set (a key of PLANS), method and seed."""

    dataset: str
    method: str
    seed: int


@cache
def chosen(dataset: str) -> dict[str, RunConfig]:
    """Every method on a data set, for as long as its plan says."""
    plan, base = PLANS[dataset], recipe(PLANS[dataset].recipe)
    found = methods(base)
    for name, config in found.items():
        images = plan.moments[-1] * config.training.batch_size
        found[name] = replace(config, training=replace(config.training, images=images))
    return found


@cache
def settings(dataset: str, method: str) -> str:
    """The digest of what a cell trains and how it is measured, whatever its seed and teacher."""
    config = chosen(dataset)[method]
    training = replace(config.training, seed=0)
    return digest(
        config.data, config.model, config.network, config.objective, config.optimizer, config.statistics, training,
        PLANS[dataset], LEVELS, MIDDLE, RHOS, NOISE_SEED,
    )  # fmt: skip


def plan() -> Iterator[Cell]:
    """Euler's and the computed preconditioning on all data; every other method on digits."""
    for dataset in PLANS:
        names = chosen(dataset) if dataset == "digits" else ("euler", "analytic")
        yield from (Cell(dataset, name, seed) for name in names for seed in (0, 1, 2))


STORE = Store(RESULTS / "acceleration" / "cells.jsonl", ("dataset", "method", "seed"))
TEACHERS = Store(RESULTS / "acceleration" / "teachers.jsonl", ("dataset",))
GRID = Grid(STORE, plan, asdict, lambda cell: settings(cell.dataset, cell.method))


def train_cell(cell: Cell, teacher: Path, truth: Truth) -> Row:
    """Train one student, measuring at the plan's moments."""
    config = replace(chosen(cell.dataset)[cell.method], teacher=str(teacher))
    config = replace(config, training=replace(config.training, seed=cell.seed))
    curve: list[Row] = []
    gamma = 1.0 if isinstance(config.objective, CD) else 0.0

    def watch(pipeline: Pipeline, step: int) -> None:
        curve.extend({"step": step, **row} for row in measure(pipeline.flow_map, truth, gamma, not gamma))

    with (
        tempfile.TemporaryDirectory() as folder,
        Trainer(
            config, truth.dataset, RunFolder(Path(folder) / "run"), Runtime(cpu=True, quiet=True), Callbacks()
        ) as trainer,
    ):
        started, spent = time.perf_counter(), 0.0
        trainer.learner.flow_map.train()
        for moment in truth.plan.moments:
            before = time.perf_counter()
            while trainer.step < moment:
                trainer.take_step()
            spent += time.perf_counter() - before
            trainer.show(watch)
        found = {
            "batch": config.training.batch_size, "training_seconds": round(spent, 1),
            "seconds": round(time.perf_counter() - started, 1), "curve": curve,
        }  # fmt: skip
        if trainer.teacher is not None:
            found["teacher"] = fingerprint(trainer.teacher)
        statistics = trainer.learner.statistics
        if statistics is not None:
            found |= {"statistics_seconds": round(statistics.seconds, 2), "statistics_samples": statistics.samples}
    return found
