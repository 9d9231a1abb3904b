"""Why is the Frechet distance of two calls worse with the computed preconditioning, at equal error? An anatomy.

  jump      the first jump 80 -> middle, and those of JUMPS, against the teacher's ODE, by principal components of the
            data, the leading ones and all: the variance of its ends over that of the teacher's, its error; the
            deviation of the network's output that gives it, beside the perfect one's, and their difference; and g, by
            which an error of N counts
  two calls Frechet distance of every student's last jump from every student's first, the teacher's ODE among both
  stretched the same from ends stretched to the teacher's variance along the leading components

Digits have two students more. "reweighted": the computed preconditioning, its consistency loss weighted by (g of
Euler's/g)^2, so that an error of N weighs as much as with Euler's. "exchanged": f and the origin computed, g Euler's.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import final

import torch
from torch import Tensor

import fewstep as fs
from benchmarks.acceleration.students import HIGHEST, LOWEST, PLANS, Judge, methods
from benchmarks.harness import RESULTS, Row, train_to, trainer_of
from fewstep.evaluation.metrics.alignment import rmse
from fewstep.evaluation.metrics.features import Extractor
from fewstep.flow.flow_map import at
from fewstep.sampling.pipeline import load_pipeline

ANATOMY = RESULTS / "acceleration_anatomy.json"
JUMPS = ((12.9, 1.9), (12.9, 0.59), (1.9, 0.59))
BOTH, LEADING = ("euler", "analytic"), 4


@dataclass(frozen=True)
class Subject:
    """What is taken apart on a data set: where the first jump stops, and how many leading components are stretched."""

    dataset: str
    middle: float
    samples: int
    leading: int
    students: tuple[str, ...] = BOTH


SUBJECTS = {
    "digits": Subject("digits", 0.9, 1180, 10, (*BOTH, "reweighted", "exchanged")),
    "mixture": Subject("mixture", 1.9, 4000, 5),
}


@final
@dataclass(frozen=True)
class Exchanged(fs.Preconditioning):
    """f and the origin of the computed preconditioning, g of Euler's: of one diagonal, so that N is the denoiser's."""

    computed: fs.Preconditioning

    @property
    def origin(self) -> Tensor | None:
        return self.computed.origin

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return self.computed.coefficients(t, s)[0], fs.EulerPreconditioning().coefficients(t, s)[1]

    def diagonal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.computed.diagonal(t)


def reweighted(objective: fs.Objective, flow_map: fs.FlowMap, batch: fs.Batch, companions: fs.Companions) -> fs.Losses:
    """CTM's losses with the consistency of each jump times (g of Euler's/g)^2."""
    losses, forms = objective(flow_map, batch, companions), (flow_map.preconditioning, fs.EulerPreconditioning())
    g, of_euler = (form.coefficients(losses.t, losses.s)[1] for form in forms)
    weight = (of_euler / g).square().to(losses.loss.dtype)
    terms = losses.terms | {"consistency": weight * losses.terms["consistency"]}
    return replace(losses, loss=torch.stack(list(terms.values())).sum(0), terms=terms)


def trained(name: str, scene: "Scene", teacher: Path, seed: int, models: Path) -> fs.FlowMap:
    """A student's averaged model, trained now unless it is there.

    Stored as one of the computed preconditioning, whatever g it was trained with.
    """
    config = replace(methods(scene.subject.dataset)["euler" if name == "euler" else "analytic"], teacher=str(teacher))
    if not (models / name).exists():
        with trainer_of(replace(config, training=replace(config.training, seed=seed)), scene.dataset) as trainer:
            learner = trainer.learner
            if name == "reweighted":
                trainer.loss.objective = partial(reweighted, trainer.loss.objective)  # type: ignore[assignment]
            for side in (learner, learner.target) if name == "exchanged" and learner.target else ():
                side.flow_map.preconditioning = Exchanged(side.flow_map.preconditioning)
            train_to(trainer, PLANS[scene.subject.dataset].moments[-1])
            with trainer.learner.averaged() as average:
                average.save(models / name)
    model = load_pipeline(models / name).flow_map
    if name == "exchanged":
        model.preconditioning = Exchanged(model.preconditioning)
    return model


class Scene(Judge):
    """The teacher, noise, the data's principal components, and what samples are measured against."""

    def __init__(self, subject: Subject, teacher: fs.FlowMap, dataset: fs.Dataset, extractor: Extractor) -> None:
        super().__init__(teacher, dataset, extractor)
        self.subject, self.start = subject, self.draw_noise(subject.samples)
        data = dataset.train.fetch(torch.arange(min(len(dataset.train), 20_000)))[0].double().flatten(1)
        self.mean = data.mean(0)
        self.axes = torch.linalg.svd(data - self.mean, full_matrices=False).Vh
        self.real = self.features(torch.arange(len(dataset.heldout)))
        self.middle = self.first_jump(None)
        self.jumps = {(HIGHEST, subject.middle): (self.start, self.middle)}
        for high, low in JUMPS:
            start = self.jump(None, self.start, HIGHEST, high)
            self.jumps[high, low] = (start, self.jump(None, start, high, low))

    @torch.no_grad()
    def jump(self, model: fs.FlowMap | None, x: Tensor, t: float, s: float) -> Tensor:
        """The model's jump; the teacher's ODE for none."""
        return self.solution(x, (t, s), 24)[0] if model is None else model.jump(x, at(t, x), at(s, x))

    def first_jump(self, model: fs.FlowMap | None) -> Tensor:
        """From noise to the middle."""
        return self.jump(model, self.start, HIGHEST, self.subject.middle)

    def components(self, x: Tensor) -> Tensor:
        """Coordinates along the data's principal components, (B, d) float64."""
        return (x.double().flatten(1) - self.mean) @ self.axes.T

    def stretched(self, middle: Tensor) -> Tensor:
        """Ends of a first jump with the teacher's variance along the leading components."""
        own = self.components(middle)
        stretch = self.components(self.middle).std(0) / own.std(0)
        stretch[self.subject.leading :] = 1.0
        wider = (own - own.mean(0)) * stretch + own.mean(0)
        return (wider @ self.axes + self.mean).reshape(middle.shape).to(middle.dtype)


def jump_rows(scene: Scene, name: str, model: fs.FlowMap, high: float, low: float) -> list[Row]:
    """A jump along the data's components; N by X - m = f (x - m) + g (N - m)."""
    x, aimed = scene.jumps[high, low]
    start, found, truth = (scene.components(each) for each in (x, scene.jump(model, x, high, low), aimed))
    f, g = (float(c) for c in model.preconditioning.coefficients(*torch.tensor([[high], [low]]).double()))
    output, needed = (found - f * start) / g, (truth - f * start) / g
    rows: list[Row] = []
    for first, stop in ((0, LEADING), (0, truth.shape[1])):
        p, q, n, best = (x[:, first:stop] for x in (found, truth, output, needed))
        rows.append(
            {
                "kind": "jump", "from": high, "to": low, "student": name, "components": f"{first + 1}-{stop}",
                "variance": float(p.var(0).sum() / q.var(0).sum()), "rmse": rmse(p, q),
                "output": float(n.var(0).mean().sqrt()), "needed": float(best.var(0).mean().sqrt()),
                "output_rmse": rmse(n, best), "g": g,
            }
        )  # fmt: skip
    return rows


def two_call_rows(scene: Scene, models: dict[str, fs.FlowMap | None]) -> list[Row]:
    """Every last jump from every first, and from those of the two methods stretched."""
    stop = scene.subject.middle
    middles = {("two calls", name): scene.first_jump(model) for name, model in models.items()}
    middles |= {("stretched", name): scene.stretched(middles["two calls", name]) for name in BOTH}
    return [
        {
            "kind": kind,
            "first": first,
            "last": last,
            "frechet": scene.frechet(scene.jump(model, middle, stop, LOWEST), scene.real),
        }
        for last, model in models.items()
        for (kind, first), middle in middles.items()
        if kind == "two calls" or last in BOTH
    ]


def take_apart(scene: Scene, teacher: Path, seed: int, models: Path) -> list[Row]:
    """All rows of a seed, its students trained unless they are there."""
    students = {name: trained(name, scene, teacher, seed, models) for name in scene.subject.students}
    rows = two_call_rows(scene, {"teacher": None, **students})
    for name, model in students.items():
        rows += [row for ends in scene.jumps for row in jump_rows(scene, name, model, *ends)]
    return [{"dataset": scene.subject.dataset, "seed": seed, **row} for row in rows]
