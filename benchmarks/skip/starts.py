"""What students' jumps give early on: Euler's, Analytic-Precond's and the skip's, from the same noise."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import fewstep as fs
from benchmarks.acceleration.students import HIGHEST, LOWEST, Truth, sampled
from benchmarks.harness import RESULTS, Row, chosen, figure, markdown, read, train_to, trainer_of
from benchmarks.skip.methods import ALL, BASELINE, CALLS, FAMILIES, methods
from fewstep.data.draws import even_draw
from fewstep.flow.flow_map import at
from fewstep.flow.ode import trajectory
from fewstep.sampling.images import image_grid, to_uint8, visible_scale
from fewstep.utils.random import Draws

SHOWN = ("euler", "analytic", "regressed, jump end", "covariance, jump end")
"""Methods, in the order of the rows' blocks: three rows each, then the teacher's ODE."""
UNTRAINED = RESULTS / "skip_untrained.json"
"""Rows {dataset, method, measure, nfe, value, times} of students before their first step."""
FORMS = (BASELINE, "analytic", *FAMILIES)
TEACHER, DATA = "the teacher's ODE", "training data"
SEED = 91_000
COUNT = 12


@torch.no_grad()
def one_call(model: fs.FlowMap, noise: Tensor) -> Tensor:
    """X(noise, t_max, t_min)."""
    path = model.path
    return model.jump(noise, at(path.t_max, noise), at(path.t_min, noise))


def draw_starts(dataset: str, teacher: Path, data: fs.Dataset, steps: int, file: Path) -> None:
    """A row of samples in one call after 0 steps, 1 % and 10 % of `steps`, of each method; below, the teacher's."""
    flow_map = fs.load(teacher).flow_map
    noise = flow_map.path.prior(Draws(SEED, 0, torch.arange(COUNT)).normal(0, data.shape))
    rows: dict[str, Tensor] = {}
    for name in SHOWN:
        config = replace(methods(dataset)[name], teacher=str(teacher))
        with trainer_of(config, data) as trainer:
            for moment in (0, max(1, steps // 100), steps // 10):
                train_to(trainer, moment)
                rows[f"{name}\n{moment} steps"] = one_call(trainer.learner.flow_map, noise)
    times = torch.tensor([flow_map.path.t_max, flow_map.path.t_min], dtype=torch.float64)
    with torch.no_grad():
        rows["the teacher's ODE"] = [*trajectory(flow_map.denoise, flow_map.path, noise, times, steps=40)][-1]
    with figure(file, len(rows), 1, 0.4) as axes:
        for axis, (name, images) in zip(axes, rows.items(), strict=True):
            pixels = to_uint8(images.clamp(-1, 1), (-1.0, 1.0))
            axis.imshow(image_grid(pixels, COUNT, scale=visible_scale(pixels)))
            axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            for spine in axis.spines.values():
                spine.set_visible(False)
    print(file)


@torch.no_grad()
def measure_references(dataset: str, truth: Truth) -> Iterator[Row]:
    """Fréchet distance of the teacher's solutions and of as many training data, to the half that students are held to.

    nfe: calls of the teacher, 0 of data.
    """
    half = len(truth.start) // 2
    rows = slice(half, 2 * half)
    (solved,) = truth.solution(truth.start[rows], (HIGHEST, LOWEST), 40, truth.classes_of(rows))
    drawn, _ = truth.dataset.train.fetch(even_draw(truth.dataset.train, half, SEED))
    for name, calls, samples in ((TEACHER, 80, solved), (DATA, 0, drawn)):
        value = truth.frechet(samples, truth.halves[1])
        yield {"dataset": dataset, "method": name, "measure": "frechet", "nfe": calls, "value": value}


def measure_untrained(dataset: str, teacher: Path, truth: Truth) -> Iterator[Row]:
    """Error and Fréchet distance of each form before the first step, at the times that are best for it."""
    for name in FORMS:
        config = replace(methods(dataset)[name], teacher=str(teacher))
        with trainer_of(config, truth.dataset) as trainer, torch.no_grad():
            for measure, calls in CALLS:
                found = sampled(trainer.learner.flow_map.eval(), truth, measure, calls, 0.0)
                yield {"dataset": dataset, "method": name} | found


def references_table() -> str:
    """A line for each data set: the teacher's Fréchet distance, and that of training data."""
    rows, lines = read(UNTRAINED), []
    for dataset in ALL:
        own = {row["method"]: f"{row['value']:.3g}" for row in chosen(rows, dataset=dataset, measure="frechet")}
        lines += [(dataset, own[TEACHER], own[DATA])] if TEACHER in own else []
    return markdown(("data", TEACHER, DATA), lines)


def untrained() -> str:
    """A line for each data set and form."""
    rows, lines = read(UNTRAINED), []
    for dataset in ALL:
        for name in FORMS:
            own = chosen(rows, dataset=dataset, method=name)
            values = {(row["measure"], row["nfe"]): f"{row['value']:.3g}" for row in own}
            lines += [(dataset, name, *(values[key] for key in CALLS))] if own else []
    heads = [f"{'error' if measure == 'sample' else 'Fréchet distance'}, {calls}" for measure, calls in CALLS]
    return markdown(("data", "form", *heads), lines)
