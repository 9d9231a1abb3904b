"""Why is the Frechet distance of two calls worse with the computed preconditioning, at equal error? An anatomy.

Students of one teacher differ in one thing, as in the rest of the study; their 2-call samples are taken apart:

  jump      the first jump 80 -> middle, and those of JUMPS, against the teacher's ODE from noise on, by principal
            components of the data: the variance of its ends over that of the teacher's, its gain (regression of the one
            on the other), its error; the deviation of the network's output that gives it, beside the perfect one's, and
            their difference; and g, by which an error of the network counts
  two calls every student's last jump from every student's first, the teacher's ODE among both: Frechet distance to
            held-out data with its mean and covariance terms, variance of features over the data's, variance of pixels
            over that of the teacher's samples, error against those
  exchange  the leading components of one student's first jump put into the other's, before one and the same last jump
  corrected ends of the first jump stretched to the teacher's variance along the leading components
  weights   g of both forms, and the gradients of jumps that stop above the data end beside those of jumps that do not

Digits have two students more, interventions. "reweighted": the computed preconditioning, its consistency loss weighted
by (g of Euler's/g)^2, so that an error of the network weighs as much as with Euler's. "exchanged": f and the origin
computed, g Euler's.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from benchmarks.acceleration.students import HIGHEST, LOWEST, Judge, methods
from benchmarks.acceleration.tables import ANATOMY
from benchmarks.harness import Row, read, show, train_to, trainer_of, write
from fewstep import Batch, Companions, Dataset, EulerPreconditioning, FlowMap, Losses, Objective, Preconditioning
from fewstep.evaluation.metrics.alignment import rmse
from fewstep.evaluation.metrics.features import Extractor
from fewstep.evaluation.metrics.fidelity import frechet_distance
from fewstep.flow.flow_map import at
from fewstep.recipes import recipe
from fewstep.recipes.config import RunConfig
from fewstep.sampling.pipeline import load_pipeline
from fewstep.training.loop import Trainer

BOTH = ("euler", "analytic")
JUMPS = ((12.9, 1.9), (12.9, 0.59), (1.9, 0.59))
LEVELS = (80.0, 12.9, 4.2, 1.9, 0.9, 0.59, 0.02, 0.01, 0.002)


@dataclass(frozen=True)
class Subject:
    """What is taken apart on a data set.

    moments: steps after which weights are kept; figures of two calls are taken at the last two. middle: where the first
    jump stops. components: bands of principal components; the first `leading` are exchanged and stretched.
    """

    recipe: str
    moments: tuple[int, ...]
    middle: float
    samples: int
    components: tuple[tuple[int, int], ...]
    leading: int
    students: tuple[str, ...] = BOTH


SUBJECTS = {
    "digits": Subject(
        "ctm-digits", (0, 25, 200, 600), 0.9, 1180, ((0, 4), (4, 10), (10, 20), (20, 35), (35, 64)), 10,
        (*BOTH, "reweighted", "exchanged"),
    ),
    "mixture": Subject("ctm-mixture", (0, 25, 200, 900), 1.9, 4000, ((0, 2), (2, 5), (5, 10), (10, 16)), 5),
    "fashion": Subject(
        "ctm-fashion-mnist", (0, 100, 200), 4.2, 800, ((0, 4), (4, 10), (10, 30), (30, 100), (100, 784)), 10
    ),
}  # fmt: skip


@final
@dataclass(frozen=True)
class Exchanged(Preconditioning):
    """f and the origin of the computed preconditioning, g of Euler's: of one diagonal, so that N is the denoiser's."""

    computed: Preconditioning

    @property
    def origin(self) -> Tensor | None:
        return self.computed.origin

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return self.computed.coefficients(t, s)[0], EulerPreconditioning().coefficients(t, s)[1]

    def diagonal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.computed.diagonal(t)


def reweighted(objective: Objective, flow_map: FlowMap, batch: Batch, companions: Companions) -> Losses:
    """CTM's losses with the consistency of each jump times (g of Euler's/g)^2."""
    losses = objective(flow_map, batch, companions)
    g, of_euler = (
        each.coefficients(losses.t, losses.s)[1] for each in (flow_map.preconditioning, EulerPreconditioning())
    )
    terms = dict(losses.terms)
    terms["consistency"] = (of_euler / g).square().to(losses.loss.dtype) * terms["consistency"]
    return replace(losses, loss=torch.stack(list(terms.values())).sum(0), terms=terms)


def student(name: str, base: RunConfig, steps: int, dataset: Dataset, seed: int) -> AbstractContextManager[Trainer]:
    """A trainer of a student, without its intervention."""
    config = methods(base)["euler" if name == "euler" else "analytic"]
    training = replace(base.training, images=steps * base.training.batch_size, seed=seed)
    return trainer_of(replace(config, training=training), dataset)


def intervene(trainer: Trainer, name: str) -> None:
    """Make the student what its name says."""
    if name == "reweighted":
        trainer.loss.objective = partial(reweighted, trainer.loss.objective)  # type: ignore[assignment]
    if name == "exchanged" and trainer.learner.target is not None:
        for model in (trainer.learner.flow_map, trainer.learner.target.flow_map):
            model.preconditioning = Exchanged(model.preconditioning)


def kept(models: Path, name: str, step: int) -> FlowMap:
    """The averaged model of a moment; stored as one of the computed preconditioning, whatever g it was trained with."""
    model = load_pipeline(models / f"{name}-{step}").flow_map
    if name == "exchanged":
        model.preconditioning = Exchanged(model.preconditioning)
    return model


def gradient_share(trainer: Trainer, model: FlowMap) -> float:
    """|gradient of the consistency loss of jumps that stop above the data end|/|that of the others|, at the weights of
    `model`, on the first batch of the run.
    """
    assert trainer.learner.target is not None
    for each in (trainer.learner.flow_map, trainer.learner.target.flow_map):
        each.network.load_state_dict(model.network.state_dict())
    losses = trainer.loss.objective(trainer.learner.flow_map, trainer.batch(0, trainer.share), trainer.companions())
    ends, weights = losses.s == losses.s.min(), list(trainer.learner.flow_map.network.parameters())
    norms = []
    for rows in (~ends, ends):
        part = (losses.terms["consistency"] * rows).mean()
        found = torch.autograd.grad(part, weights, retain_graph=True, allow_unused=True)
        norms.append(float(torch.stack([each.norm() for each in found if each is not None]).norm()))
    return norms[0] / norms[1]


def student_rows(subject: Subject, base: RunConfig, dataset: Dataset, seed: int, models: Path) -> list[Row]:
    """Train the students that are not there, keeping averaged weights; the shares of their gradients."""
    rows: list[Row] = []
    for name in subject.students:
        with student(name, base, subject.moments[-1], dataset, seed) as trainer:
            intervene(trainer, name)
            for moment in () if (models / f"{name}-{subject.moments[-1]}").exists() else subject.moments:
                train_to(trainer, moment)
                trainer.show(lambda model, step, name=name: model.save(models / f"{name}-{step}"))  # type: ignore[misc]
            for step in subject.moments:
                share = gradient_share(trainer, kept(models, name, step))
                rows.append({"kind": "weights", "student": name, "step": step, "gradient_share": share})
    return rows


class Scene(Judge):
    """The teacher, noise, the data's principal components, and what samples are measured against."""

    def __init__(self, subject: Subject, teacher: FlowMap, dataset: Dataset, extractor: Extractor) -> None:
        super().__init__(dataset, teacher, extractor)
        self.subject, self.start = subject, self.draw_noise(subject.samples)
        data = dataset.train.fetch(torch.arange(min(len(dataset.train), 20_000)))[0].double().flatten(1)
        self.mean = data.mean(0)
        self.axes = torch.linalg.svd(data - self.mean, full_matrices=False).Vh
        self.real = self.features(torch.arange(len(dataset.heldout)))
        self.middle = self.jump(None, self.start, HIGHEST, subject.middle)
        self.ends = self.jump(None, self.middle, subject.middle, LOWEST)
        self.jumps = {(HIGHEST, subject.middle): (self.start, self.middle)}
        for high, low in JUMPS:
            start = self.jump(None, self.start, HIGHEST, high)
            self.jumps[high, low] = (start, self.jump(None, start, high, low))

    @torch.no_grad()
    def jump(self, model: FlowMap | None, x: Tensor, t: float, s: float) -> Tensor:
        """The model's jump; the teacher's ODE for none."""
        return self.solution(x, (t, s), 24)[0] if model is None else model.jump(x, at(t, x), at(s, x))

    def last_jump(self, model: FlowMap | None, x: Tensor) -> Tensor:
        """From the middle to the data end."""
        return self.jump(model, x, self.subject.middle, LOWEST)

    def components(self, x: Tensor) -> Tensor:
        """Coordinates along the data's principal components, (B, d) float64."""
        return (x.double().flatten(1) - self.mean) @ self.axes.T

    def samples(self, components: Tensor) -> Tensor:
        """The inverse of `components`."""
        return (components @ self.axes + self.mean).reshape(self.start.shape).to(self.start.dtype)

    def measured(self, samples: Tensor) -> Row:
        """What there is to say of final samples."""
        found = self.features_of(samples).double()
        distance = frechet_distance(found, self.real)
        off = float((found.mean(0) - self.real.double().mean(0)).square().sum())
        return {
            "frechet": distance, "mean_term": off, "covariance_term": distance - off,
            "feature_variance": float(found.var(0).sum() / self.real.double().var(0).sum()),
            "pixel_variance": float(samples.var(0).sum() / self.ends.var(0).sum()),
            "rmse": rmse(samples, self.ends),
        }  # fmt: skip


def jump_rows(scene: Scene, name: str, model: FlowMap, high: float, low: float) -> list[Row]:
    """A jump along the data's components; N by X - m = f (x - m) + g (N - m)."""
    x, aimed = scene.jumps[high, low]
    ends = scene.jump(model, x, high, low)
    start, found, truth = (scene.components(each) for each in (x, ends, aimed))
    f, g = (float(c) for c in model.preconditioning.coefficients(*torch.tensor([[high], [low]]).double()))
    output, needed = (found - f * start) / g, (truth - f * start) / g
    rows: list[Row] = []
    for first, stop in (*scene.subject.components, (0, truth.shape[1])):
        p, q, n, best = (x[:, first:stop] for x in (found, truth, output, needed))
        varied, aim = p - p.mean(0), q - q.mean(0)
        rows.append(
            {
                "kind": "jump", "from": high, "to": low, "student": name, "components": f"{first + 1}-{stop}",
                "variance": float(varied.square().sum() / aim.square().sum()),
                "gain": float((varied * aim).sum() / aim.square().sum()),
                "rmse": rmse(p, q), "bias": float((p - q).mean(0).square().mean().sqrt()),
                "output": float(n.var(0).mean().sqrt()), "needed": float(best.var(0).mean().sqrt()),
                "output_rmse": rmse(n, best), "g": g,
            }
        )  # fmt: skip
    return rows


def two_call_rows(scene: Scene, models: dict[str, FlowMap | None], middles: dict[str, Tensor]) -> list[Row]:
    """Every last jump from every first."""
    return [
        {"kind": "two calls", "first": first, "last": last, **scene.measured(scene.last_jump(model, x))}
        for last, model in models.items()
        for first, x in middles.items()
    ]


def exchange_rows(scene: Scene, models: dict[str, FlowMap | None], middles: dict[str, Tensor]) -> list[Row]:
    """The leading components of one first jump with the rest of another; and either stretched to the right variance."""
    parts = {name: scene.components(middles[name]) for name in ("euler", "analytic")}
    truth, leading_ones, rows = scene.components(scene.middle), scene.subject.leading, []
    for last in parts:
        for leading, head in parts.items():
            stretch = truth.std(0) / head.std(0)
            stretch[leading_ones:] = 1.0
            mixed = {
                rest: torch.cat([head[:, :leading_ones], tail[:, leading_ones:]], 1) for rest, tail in parts.items()
            }
            mixed["stretched"] = (head - head.mean(0)) * stretch + head.mean(0)
            for rest, middle in mixed.items():
                ends = scene.last_jump(models[last], scene.samples(middle))
                kind = "corrected" if rest == "stretched" else "exchange"
                where = {"kind": kind, "leading": leading, "rest": leading if kind == "corrected" else rest}
                rows.append({**where, "last": last, **scene.measured(ends)})
    return rows


def weight_rows(model: FlowMap) -> list[Row]:
    """f and g of both forms."""
    t, s = torch.combinations(torch.tensor(LEVELS, dtype=torch.float64)).T
    (f, g), (euler_f, euler_g) = (each.coefficients(t, s) for each in (model.preconditioning, EulerPreconditioning()))
    names = ("from", "to", "f", "g", "euler_f", "euler_g")
    table = torch.stack([t, s, f, g, euler_f, euler_g], 1).tolist()
    return [dict(zip(names, row, strict=True)) | {"kind": "weights"} for row in table]


def anatomy(scene: Scene, models: Path, step: int) -> list[Row]:
    """All rows of one moment; before the last two only those of the first jump."""
    students = {name: kept(models, name, step) for name in scene.subject.students}
    rows = [
        row for name, model in students.items() for ends in scene.jumps for row in jump_rows(scene, name, model, *ends)
    ]
    if step in scene.subject.moments[-2:]:
        walkers: dict[str, FlowMap | None] = {"teacher": None, **students}
        middles = {
            name: scene.jump(model, scene.start, HIGHEST, scene.subject.middle) for name, model in walkers.items()
        }
        rows += two_call_rows(scene, walkers, middles) + exchange_rows(scene, walkers, middles)
    return [{"step": step, **row} for row in rows]


def take_apart(scene: Scene, teacher: Path, seed: int, models: Path) -> list[Row]:
    """All rows of a seed, its students trained unless they are there."""
    base = replace(recipe(scene.subject.recipe), teacher=str(teacher))
    rows = student_rows(scene.subject, base, scene.dataset, seed, models)
    rows += weight_rows(load_pipeline(models / "analytic-0").flow_map)
    for step in scene.subject.moments:
        rows += anatomy(scene, models, step)
    return rows


def store(dataset: str, seed: int, rows: list[Row]) -> None:
    """In place of what is there of the same data set and seed."""
    show(rows)
    others = [row for row in read(ANATOMY) if (row["dataset"], row["seed"]) != (dataset, seed)]
    write(ANATOMY, [*others, *({"dataset": dataset, "seed": seed, **row} for row in rows)])
