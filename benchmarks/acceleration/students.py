"""CTM students of one teacher by method: the study's cells, and what is measured of each.

Measured with the averaged weights, on data and noise that training does not see:
  jump T -> S     RMSE per element of the student's jump against the teacher's ODE, from held-out data with noise
  sample, k calls the same along k steps from noise
  frechet, k calls Frechet distance of k-step samples to held-out data
The times between of 2- and 4-step sampling are searched for each method, seed and moment on one half of the held-out
data and noise, and the figure is taken on the other half.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, Grid, Row, digest, train_to, trainer_of
from fewstep import CD, CTM, Condition, Dataset, FlowMap, Pipeline, PreconditioningConfig, RunConfig, TeacherSteps
from fewstep.evaluation.metrics.alignment import rmse
from fewstep.evaluation.metrics.features import Extractor
from fewstep.evaluation.metrics.fidelity import frechet_distance
from fewstep.flow.flow_map import at
from fewstep.flow.ode import trajectory
from fewstep.flow.times import edm_grid
from fewstep.recipes import recipe
from fewstep.training.teacher import fingerprint
from fewstep.utils.parts import kind
from fewstep.utils.random import Draws

LEVELS = (80.0, 12.9, 1.9, 0.59, 0.002)
HIGHEST, LOWEST = LEVELS[0], LEVELS[-1]
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
    return {
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
        **{f"analytic, {count} samples": statistics(samples=count) for count in (64, 256, 1024, 4096, 16_384)},
    }


class Judge:
    """Held-out data in an extractor's features, and the teacher's ODE."""

    def __init__(self, teacher: FlowMap, dataset: Dataset, extractor: Extractor) -> None:
        self.teacher, self.dataset, self.extractor = teacher, dataset, extractor

    def draw_noise(self, count: int) -> Tensor:
        """The starts of samples, other than any of training."""
        return self.teacher.path.prior(Draws(NOISE_SEED, 1, torch.arange(count)).normal(0, self.dataset.shape))

    def features(self, indices: Tensor) -> Tensor:
        """Of held-out data."""
        return torch.cat([self.extractor.features(self.dataset.heldout.fetch(i)[0]) for i in indices.split(1000)])

    def features_of(self, samples: Tensor) -> Tensor:
        """Of samples, within the data's range."""
        inside = samples if self.dataset.data_range is None else samples.clamp(*self.dataset.data_range)
        return self.extractor.features(inside)

    @torch.no_grad()
    def solution(self, x: Tensor, times: tuple[float, ...], steps: int, cond: Condition | None = None) -> list[Tensor]:
        """The teacher's ODE from x on, at the other times."""
        grid, cond = torch.tensor(times, dtype=torch.float64), cond or Condition()
        return [*trajectory(self.teacher.denoise, self.teacher.path, x, grid, steps=steps, cond=cond)[1:]]


class Truth(Judge):
    """The teacher's solutions that students are measured against, and the halves that times are searched on."""

    @torch.no_grad()
    def __init__(self, plan: Plan, teacher: FlowMap, dataset: Dataset, extractor: Extractor) -> None:
        super().__init__(teacher, dataset, extractor)
        self.plan = plan
        indices = torch.arange(min(plan.jumps, len(dataset.heldout)))
        x0, labels = dataset.heldout.fetch(indices)
        eps = Draws(NOISE_SEED, 0, indices).normal(0, dataset.shape)
        self.cond = Condition(labels)
        self.starts = {high: x0 + high * eps for high in LEVELS[:-1]}
        self.ends: dict[tuple[float, float], Tensor] = {}
        for i, (high, start) in enumerate(self.starts.items()):
            states = self.solution(start, LEVELS[i:], 16, self.cond)
            self.ends |= {(high, low): state for low, state in zip(LEVELS[i + 1 :], states, strict=True)}
        self.labels = torch.arange(plan.samples) % dataset.num_classes if dataset.num_classes else None
        self.start = self.draw_noise(plan.samples)
        few = slice(min(2 * plan.jumps, plan.samples))
        (self.samples,) = self.solution(self.start[few], (HIGHEST, LOWEST), 40, self.asked(few))
        half = len(dataset.heldout) // 2
        self.halves = [self.features(part) for part in (torch.arange(half), torch.arange(half, 2 * half))]

    def asked(self, rows: slice | Tensor) -> Condition:
        """The classes of some of the samples."""
        return Condition(None if self.labels is None else self.labels[rows])

    def frechet(self, samples: Tensor, half: int) -> float:
        return frechet_distance(self.features_of(samples), self.halves[half])


def walk(model: FlowMap, truth: Truth, rows: slice, times: Tensor, gamma: float) -> Tensor:
    """k-step samples (math.md §6): jumps along `times`; with gamma = 1 to the data end and back up by fresh noise."""
    parts, last = [], float(times[-1])
    noise, asked = truth.start[rows], truth.asked(rows)
    for own in torch.arange(len(noise)).split(500):
        x, cond = noise[own], asked[own]
        for i, (t, s) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
            again = gamma and s > last
            x = model.jump(x, at(t, x), at(last if again else s, x), cond)
            if again:
                x = x + s * Draws(NOISE_SEED, 2 + i, own).normal(0, tuple(x.shape[1:]))
        parts.append(x)
    return torch.cat(parts)


def schedules(model: FlowMap, plan: Plan, steps: int) -> list[Tensor]:
    """The falling times among which a k-step sampler may choose."""
    if steps == 4:
        return [edm_grid(model.path, steps, rho) for rho in RHOS]
    between = [()] if steps == 1 else [(middle,) for middle in plan.middles]
    return [torch.tensor([HIGHEST, *times, LOWEST], dtype=torch.float64) for times in between]


@torch.no_grad()
def measure(model: FlowMap, truth: Truth, gamma: float) -> list[Row]:
    """Every figure of one moment; with gamma = 1 of jumps to the data end alone."""
    rows: list[Row] = []
    for (high, low), end in truth.ends.items():
        if not gamma or low == LOWEST:
            x = truth.starts[high]
            error = rmse(model.jump(x, at(high, x), at(low, x), truth.cond), end)
            rows.append({"measure": f"jump {high:g} -> {low:g}", "nfe": 1, "value": error})
    return rows + [row for steps in (1, 2, 4) for row in sampled(model, truth, steps, gamma)]


def sampled(model: FlowMap, truth: Truth, steps: int, gamma: float) -> list[Row]:
    """Frechet distance and, for the deterministic sampler, error against the teacher's samples, times searched."""

    def figure(measure: str, count: int, score: Callable[[Tensor, slice, int], float]) -> Row:
        """By the times that are best on the first `count` samples, on as many others."""
        options = schedules(model, truth.plan, steps)
        times = min(options, key=lambda option: score(option, slice(count), 0)) if len(options) > 1 else options[0]
        value = score(times, slice(count, 2 * count), 1)
        return {"measure": measure, "nfe": steps, "value": value, "times": [round(t, 4) for t in times.tolist()]}

    def distance(times: Tensor, rows: slice, half: int) -> float:
        return truth.frechet(walk(model, truth, rows, times, gamma), half)

    def error(times: Tensor, rows: slice, half: int) -> float:
        return rmse(walk(model, truth, rows, times, gamma), truth.samples[rows])

    rows = [figure("frechet", len(truth.start) // 2, distance)]
    return rows if gamma else [*rows, figure("sample", len(truth.samples) // 2, error)]


@dataclass(frozen=True)
class Cell:
    """A student: data set (a key of PLANS), method and seed."""

    dataset: str
    method: str
    seed: int


@cache
def chosen(dataset: str) -> dict[str, RunConfig]:
    """Every method on a data set, for as long as its plan says."""
    base, last = recipe(PLANS[dataset].recipe), PLANS[dataset].moments[-1]

    def lasting(config: RunConfig) -> RunConfig:
        return replace(config, training=replace(config.training, images=last * config.training.batch_size))

    return {name: lasting(config) for name, config in methods(base).items()}


@cache
def settings(dataset: str, method: str) -> str:
    """The digest of what a cell trains and how it is measured, whatever its seed and teacher."""
    config = chosen(dataset)[method]
    training = replace(config.training, seed=0)
    return digest(
        config.data, config.model, config.network, config.objective, config.optimizer, config.statistics, training,
        PLANS[dataset], LEVELS, RHOS, NOISE_SEED,
    )  # fmt: skip


def plan() -> Iterator[Cell]:
    """Euler's and the computed preconditioning on all data; every other method on digits."""
    for dataset in PLANS:
        names = chosen(dataset) if dataset == "digits" else ("euler", "analytic")
        yield from (Cell(dataset, name, seed) for name in names for seed in (0, 1, 2))


LABEL = ("dataset", "method", "seed")
GRID = Grid(RESULTS / "acceleration" / "cells.jsonl", LABEL, plan, lambda cell: settings(cell.dataset, cell.method))


def train_cell(cell: Cell, teacher: Path, truth: Truth) -> Row:
    """Train one student, measuring at the plan's moments."""
    config = replace(chosen(cell.dataset)[cell.method], teacher=str(teacher))
    config = replace(config, training=replace(config.training, seed=cell.seed))
    curve: list[Row] = []
    gamma, started, spent = 1.0 if isinstance(config.objective, CD) else 0.0, time.perf_counter(), 0.0

    def watch(pipeline: Pipeline, step: int) -> None:
        curve.extend({"step": step, **row} for row in measure(pipeline.flow_map, truth, gamma))

    with trainer_of(config, truth.dataset) as trainer:
        for moment in truth.plan.moments:
            spent += train_to(trainer, moment)
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
