"""One cell of the stability study: train, measure at four moments, say whether it failed."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from benchmarks.harness import Row, rounded, train_to, trainer_of
from benchmarks.stability.plan import SAMPLE_SEED, STUDIES, Cell, configuration, settings, starting
from fewstep.evaluation.metrics.features import default_extractor
from fewstep.evaluation.metrics.fidelity import class_accuracy, frechet_distance
from fewstep.sampling.step_times import SamplerName
from fewstep.utils.errors import TrainingDivergedError

ODE_STEPS, CLASSES = 16, 10
FAILURES = ("diverged", "degenerate", "narrow", "classless")
NARROW = 0.25
"""Variance within classes, over the data's, below which one-step samples are near their classes' means."""


class Reference:
    """What the samples of one data set are measured against: up to 5,000 held-out images."""

    def __init__(self, dataset: fs.Dataset, cache: Path | None) -> None:
        self.dataset, self.extractor = dataset, default_extractor(dataset, cache=cache)
        held, labels = dataset.heldout.fetch(torch.arange(min(len(dataset.heldout), 5000)))[:2]
        assert labels is not None
        self.features, self.variance = self.extractor.features(held), total_variance(held)
        self.within = variance_within(held, labels)

    def measure(
        self, model: fs.FlowMap, config: fs.RunConfig, steps: int, count: int, ode: SamplerName | None = None
    ) -> Row:
        """Frechet distance, class accuracy, and the ratio of the samples' variance to the data's, in all and within
        classes, in `steps` steps; NaN where not finite. ode: the solver, to sample by the diagonal's own ODE.
        """
        gamma = config.evaluation.gamma
        sampler: SamplerName = ode or ("gamma" if gamma else "euler" if config.objective.on_diagonal else "map")
        own = fs.SamplingSettings(sampler=sampler, steps=steps, gamma=gamma, seed=SAMPLE_SEED, clip=False)
        drawn = fs.generate(model, count, own)
        spread, shown = total_variance(drawn.samples) / self.variance, drawn.samples.clamp(-1, 1)
        if not math.isfinite(spread):
            return dict.fromkeys(("frechet", "accuracy", "spread", "within"), math.nan)
        assert drawn.labels is not None
        return {
            "frechet": frechet_distance(self.extractor.features(shown), self.features),
            "accuracy": float(class_accuracy(self.extractor.classify(shown), drawn.labels)),
            "spread": spread,
            "within": variance_within(drawn.samples, drawn.labels) / self.within,
        }


def total_variance(images: Tensor) -> float:
    """Sum of the variances of all pixels."""
    return float(images.flatten(1).double().var(0).sum())


def variance_within(images: Tensor, labels: Tensor) -> float:
    """total_variance of each class, meaned over its images."""
    classes = labels.unique().tolist()
    return sum(total_variance(images[labels == c]) * float((labels == c).float().mean()) for c in classes)


def train_cell(cell: Cell, config: fs.RunConfig, reference: Reference, folder: Path) -> Row:
    """Train, measuring at four moments; what is left of a run that diverged counts as NaN."""
    study, matching = STUDIES[cell.dataset, cell.network], cell.objective == "flow matching"
    last, curve = study.steps, []
    diverged_at, spent = None, 0.0

    def watch(pipeline: fs.Pipeline, step: int) -> None:
        walks: list[tuple[Any, int, SamplerName | None]] = [(nfe, nfe, None) for nfe in (1, 2, 4)]
        walks += [(32, 32, None)] if matching and step == last else []
        walks += [("ode", ODE_STEPS, "heun")] if step == last and not config.evaluation.gamma else []
        for nfe, steps, ode in walks:
            found = reference.measure(pipeline.flow_map, config, steps, study.samples, ode)
            curve.append({"step": step, "nfe": nfe, **found})

    with trainer_of(config, reference.dataset, folder) as trainer:
        for moment in (last // 4, last // 2, 3 * last // 4, last):
            try:
                spent += train_to(trainer, moment)
                trainer.read()
            except TrainingDivergedError:
                diverged_at = trainer.clock.step
                break
            with trainer.learner.averaged() as model:
                watch(model, moment)
        norms = [norm for _, norm, _ in trainer.window.steps]
        if matching:
            trainer.save()
    more = {"extractor": reference.extractor.name, "seconds": round(spent, 1), "curve": curve}
    return rounded(verdict(cell, norms, curve, diverged_at) | more)  # type: ignore[no-any-return]


def verdict(cell: Cell, norms: list[float], curve: list[Row], diverged_at: int | None) -> Row:
    """The row of a finished cell."""
    study = STUDIES[cell.dataset, cell.network]
    last = {row["nfe"]: row for row in curve if row["step"] == study.steps}
    sound = diverged_at is None and all(math.isfinite(row["frechet"]) for row in last.values())
    after = torch.tensor(norms[study.steps // 16 :] or [math.nan], dtype=torch.float64)
    final = [("spread", 1), ("within", 1), *(("frechet", nfe) for nfe in (1, 2, 4, "ode")), ("accuracy", 1)]
    found = {
        **asdict(cell), "steps": study.steps, "batch": study.batch, "samples": study.samples,
        "sample_seed": SAMPLE_SEED, "diverged": not sound, "diverged_at": diverged_at,
        **{f"{key}_{nfe}": last[nfe][key] if sound and nfe in last else None for key, nfe in final},
        **{f"grad_q{share:.0f}": float(after.nanquantile(share / 100)) for share in (50, 99)},
    }  # fmt: skip
    return judged(found)


def flow_matching_model(cell: Cell, reference: Reference, models: Path) -> Path:
    """The flow-matching model that the cell starts from, trained now unless it is there."""
    own = starting(cell)
    folder = models / f"{own.dataset}-{own.network}-{own.path}-{own.preconditioning}-{own.seed}-{settings(own)}"
    if not fs.RunFolder(folder).checkpoints():
        train_cell(own, configuration(own, ""), reference, folder)
    return folder


def judged(cell: Row) -> Row:
    """The cell with what counts as degenerate, narrow and classless today, whenever it was stored.

    Flow matching, whose one step is the class's mean by what it is, is never narrow. None where a cell does not say.
    """
    cell = {"scaling": "", **cell}
    if cell["diverged"]:
        return cell | dict.fromkeys(FAILURES[1:], False)
    within, matching = cell.get("within_1"), cell["objective"] == "flow matching"
    return cell | {
        "degenerate": not 0.25 <= cell["spread_1"] <= 4.0,
        "narrow": False if matching else None if within is None else within < NARROW,
        "classless": cell["accuracy_1"] < 2 / CLASSES,
    }
