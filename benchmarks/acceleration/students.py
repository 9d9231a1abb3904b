"""CTM students of one teacher by method: the study's cells, and what is measured of each.

With the averaged weights, on data and noise that training does not see: RMSE per element of jumps against the teacher's
ODE, from held-out data with noise, and of samples in k calls; Frechet distance of samples to held-out data. The times
between of 2- and 4-step sampling are searched for each method, seed and moment on one half of the held-out data and
noise, and the figure is taken on the other half.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import fewstep as fs
from benchmarks.harness import RESULTS, Grid, Row, digest, train_to, trainer_of
from fewstep.evaluation.metrics.alignment import rmse
from fewstep.evaluation.metrics.features import Extractor
from fewstep.evaluation.metrics.fidelity import frechet_distance
from fewstep.flow.flow_map import at
from fewstep.flow.ode import trajectory
from fewstep.flow.times import edm_grid
from fewstep.networks.condition import Condition
from fewstep.recipes import recipe
from fewstep.training.teacher import fingerprint
from fewstep.utils.parts import kind
from fewstep.utils.random import Draws

LEVELS = (80.0, 12.9, 1.9, 0.59, 0.002)
HIGHEST, LOWEST = LEVELS[0], LEVELS[-1]
MIDDLES = (0.25, 0.4, 0.6, 0.9, 1.3, 1.9, 2.8, 4.2, 6.3, 9.5)
RHOS = (2.0, 3.0, 5.0, 7.0)
NOISE_SEED = 77_000
AT_ONCE = 2**15
"""Numbers of the samples that are drawn at once, of 64 at least: convolutions are slower on more."""


@dataclass(frozen=True)
class Plan:
    """One data set: its recipe, when and on how many samples and jumps is measured, where two steps may meet."""

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


@cache
def methods(dataset: str) -> dict[str, fs.RunConfig]:
    """Every method on a data set: the recipe, with CTM compared at the data end, uniform draws and the computed
    preconditioning, as long as the plan says, and one thing changed.
    """
    plan = PLANS[dataset]
    base = recipe(plan.recipe)
    objective = fs.CTM(steps=fs.TeacherSteps(points=18, solver="heun"), target_decay=0.99)
    analytic = replace(base.model, preconditioning=kind(fs.PreconditioningConfig, "analytic"))
    network = replace(base.network, sees_skip=False)  # type: ignore[call-arg]
    base = replace(base, model=analytic, network=network, objective=objective)
    refresh = base.training.images // 40
    base = replace(base, training=replace(base.training, images=plan.moments[-1] * base.training.batch_size))

    def model(name: str) -> fs.RunConfig:
        return replace(base, model=replace(base.model, preconditioning=kind(fs.PreconditioningConfig, name)))

    euler, cd = model("euler"), fs.CD(steps=fs.TeacherSteps(points=18, solver="heun", u="adjacent"), target_decay=0.99)
    adversarial = replace(base.objective, gan=0.2)  # type: ignore[call-arg]
    statistics: dict[str, dict[str, Any]] = {
        "raw": {"centred": False}, "not shrunk": {"shrink": False}, "l only": {"use": "l"}, "s only": {"use": "s"},
        "own statistics": {"refresh_images": refresh},
        **{f"{count} samples": {"samples": count} for count in (64, 256, 1024, 4096, 16_384)},
    }  # fmt: skip
    return {
        "euler": euler,
        "analytic": base,
        "analytic, forward": model("analytic-forward"),
        "CD, multistep": replace(euler, objective=cd),
        "euler, adversarial": replace(euler, objective=adversarial),
        "analytic, adversarial": replace(base, objective=adversarial),
    } | {f"analytic, {k}": replace(base, statistics=replace(base.statistics, **v)) for k, v in statistics.items()}


class Walks:
    """Where one teacher has arrived: students of one seed whose walks are drawn alike share them, to the bit."""

    def __init__(self) -> None:
        self.ends: dict[bytes, Tensor] = {}

    @contextmanager
    def shared(self) -> Iterator[None]:
        """What is trained within takes the walks that are known already; those under a condition are walked anew."""
        anew = fs.TeacherSteps.walk

        def known(
            steps: fs.TeacherSteps, flow_map: fs.FlowMap, x: Tensor, n: Tensor, k: Tensor, cond: Condition, teacher: Any
        ) -> Tensor:
            if any(getattr(cond, field.name) is not None for field in fields(cond)):
                return anew(steps, flow_map, x, n, k, cond, teacher)
            settled = (steps.points, steps.solver, flow_map.path, tuple(x.shape), x.dtype)
            digest = hashlib.blake2b(repr(settled).encode(), digest_size=16)
            for tensor in (x, n, k):
                digest.update(tensor.numpy())
            key = digest.digest()
            if key not in self.ends:
                self.ends[key] = anew(steps, flow_map, x, n, k, cond, teacher)
            return self.ends[key].clone()

        with patch.object(fs.TeacherSteps, "walk", known):
            yield


class Judge:
    """Held-out data in an extractor's features, and the teacher's ODE."""

    def __init__(self, teacher: fs.FlowMap, dataset: fs.Dataset, extractor: Extractor) -> None:
        self.teacher, self.dataset, self.extractor = teacher, dataset, extractor

    def draw_noise(self, count: int) -> Tensor:
        """The starts of samples, other than any of training."""
        return self.teacher.path.prior(Draws(NOISE_SEED, 1, torch.arange(count)).normal(0, self.dataset.shape))

    def features(self, indices: Tensor) -> Tensor:
        """Of held-out data."""
        return torch.cat([self.extractor.features(self.dataset.heldout.fetch(i)[0]) for i in indices.split(1000)])

    def frechet(self, samples: Tensor, real: Tensor) -> float:
        """Of samples, within the data's range, to features of real data."""
        inside = samples if self.dataset.data_range is None else samples.clamp(*self.dataset.data_range)
        return frechet_distance(self.extractor.features(inside), real)

    @torch.no_grad()
    def solution(self, x: Tensor, times: tuple[float, ...], steps: int, labels: Tensor | None = None) -> list[Tensor]:
        """The teacher's ODE from x on, at the other times."""
        grid, cond = torch.tensor(times, dtype=torch.float64), Condition(labels)
        return [*trajectory(self.teacher.denoise, self.teacher.path, x, grid, steps, cond)[1:]]


class Truth(Judge):
    """The teacher's solutions that students are measured against, and the halves that times are searched on.

    labels: of the held-out data that jumps start from; classes: of the samples, in turns. None for data without them.
    """

    @torch.no_grad()
    def __init__(self, plan: Plan, teacher: fs.FlowMap, dataset: fs.Dataset, extractor: Extractor) -> None:
        super().__init__(teacher, dataset, extractor)
        self.plan, indices = plan, torch.arange(min(plan.jumps, len(dataset.heldout)))
        x0, self.labels = dataset.heldout.fetch(indices)
        eps = Draws(NOISE_SEED, 0, indices).normal(0, dataset.shape)
        self.starts = {high: x0 + high * eps for high in LEVELS[:-1]}
        self.ends: dict[tuple[float, float], Tensor] = {}
        for i, (high, start) in enumerate(self.starts.items()):
            states = self.solution(start, LEVELS[i:], 16, self.labels)
            self.ends |= {(high, low): state for low, state in zip(LEVELS[i + 1 :], states, strict=True)}
        self.start = self.draw_noise(plan.samples)
        self.classes = torch.arange(plan.samples) % dataset.num_classes if dataset.num_classes else None
        first = slice(0, 2 * plan.jumps)
        (self.samples,) = self.solution(self.start[first], (HIGHEST, LOWEST), 40, self.classes_of(first))
        half = len(dataset.heldout) // 2
        self.halves = [self.features(part) for part in (torch.arange(half), torch.arange(half, 2 * half))]

    def classes_of(self, rows: slice) -> Tensor | None:
        """Of some of the samples."""
        return None if self.classes is None else self.classes[rows]


def walk(model: fs.FlowMap, noise: Tensor, times: list[float], gamma: float, classes: Tensor | None = None) -> Tensor:
    """k-step samples (math.md §6): jumps along `times`; with gamma = 1 to the data end and back up by fresh noise."""
    parts = []
    for own in torch.arange(len(noise)).split(max(64, AT_ONCE // noise[0].numel())):
        x, cond = noise[own], Condition(None if classes is None else classes[own])
        for i, (t, s) in enumerate(pairwise(times)):
            if gamma and s > times[-1]:
                fresh = Draws(NOISE_SEED, 2 + i, own).normal(0, tuple(x.shape[1:]))
                x = model.jump(x, at(t, x), at(times[-1], x), cond) + s * fresh
            else:
                x = model.jump(x, at(t, x), at(s, x), cond)
        parts.append(x)
    return torch.cat(parts)


@torch.no_grad()
def measure(model: fs.FlowMap, truth: Truth, gamma: float) -> list[Row]:
    """Every figure of one moment; with gamma = 1 of jumps to the data end alone."""
    rows: list[Row] = []
    for (high, low), end in truth.ends.items():
        if not gamma or low == LOWEST:
            x = truth.starts[high]
            error = rmse(model.jump(x, at(high, x), at(low, x), Condition(truth.labels)), end)
            rows.append({"measure": f"jump {high:g} -> {low:g}", "nfe": 1, "value": error})
    names = ("frechet",) if gamma else ("frechet", "sample")
    return rows + [sampled(model, truth, name, steps, gamma) for steps in (1, 2, 4) for name in names]


def sampled(model: fs.FlowMap, truth: Truth, name: str, steps: int, gamma: float) -> Row:
    """Frechet distance or error against the teacher's samples, by the times that are best on the first half of the
    samples, on the others.
    """
    count = len(truth.start if name == "frechet" else truth.samples) // 2

    def score(times: list[float], half: int) -> float:
        rows = slice(half * count, (half + 1) * count)
        drawn = walk(model, truth.start[rows], times, gamma, truth.classes_of(rows))
        return truth.frechet(drawn, truth.halves[half]) if name == "frechet" else rmse(drawn, truth.samples[rows])

    options = [edm_grid(model.path, steps, rho).tolist() for rho in RHOS]
    if steps < 4:
        options = [[HIGHEST, *between, LOWEST] for between in ([()] if steps == 1 else zip(truth.plan.middles))]
    times = min(options, key=lambda option: score(option, 0)) if len(options) > 1 else options[0]
    return {"measure": name, "nfe": steps, "value": score(times, 1), "times": [round(t, 4) for t in times]}


@dataclass(frozen=True)
class Cell:
    """A student: data set (a key of PLANS), method and seed."""

    dataset: str
    method: str
    seed: int


def settings(cell: Cell) -> str:
    """The digest of what a cell trains and how it is measured, whatever its seed and teacher."""
    return digest_of(methods(cell.dataset)[cell.method], PLANS[cell.dataset])


def digest_of(config: fs.RunConfig, plan: Plan) -> str:
    """Of what a configuration trains, whatever its seed, and how a plan measures it."""
    return digest(
        config.data, config.model, config.network, config.objective, config.optimizer, config.statistics,
        replace(config.training, seed=0), plan, LEVELS, RHOS, NOISE_SEED,
    )  # fmt: skip


def plan() -> Iterator[Cell]:
    """Euler's and the computed preconditioning on all data; every other method on digits."""
    for dataset in PLANS:
        names = methods(dataset) if dataset == "digits" else ("euler", "analytic")
        yield from (Cell(dataset, name, seed) for name in names for seed in (0, 1, 2))


GRID = Grid(RESULTS / "acceleration" / "cells.jsonl", ("dataset", "method", "seed"), plan, settings)


def train_cell(cell: Cell, teacher: Path, truth: Truth) -> Row:
    """Train one student, measuring at the plan's moments."""
    return train_student(methods(cell.dataset)[cell.method], cell.seed, teacher, truth)


def train_student(config: fs.RunConfig, seed: int, teacher: Path, truth: Truth, walks: Walks | None = None) -> Row:
    """Train a configuration's student, measuring at the plan's moments; walks: of students before it."""
    config = replace(config, teacher=str(teacher), training=replace(config.training, seed=seed))
    curve: list[Row] = []
    gamma, spent = 1.0 if isinstance(config.objective, fs.CD) else 0.0, 0.0
    with trainer_of(config, truth.dataset) as trainer:
        for moment in truth.plan.moments:
            with nullcontext() if walks is None else walks.shared():
                spent += train_to(trainer, moment)
            with trainer.learner.averaged() as model:
                curve += [{"step": moment, **row} for row in measure(model.flow_map, truth, gamma)]
    times = {} if walks is not None else {"training_seconds": round(spent, 1)}
    label = {"batch": config.training.batch_size} | times | {"teacher": fingerprint(truth.teacher)}
    return label | {"curve": curve}
