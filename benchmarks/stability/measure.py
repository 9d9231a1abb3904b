"""One cell of the stability study: train, measure at four moments, say whether it failed."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Row, rounded
from benchmarks.stability.plan import SAMPLE_SEED, STUDIES, Cell, configuration, settings, starting
from benchmarks.stability.tables import judged
from fewstep.data import Dataset
from fewstep.evaluation.metrics.features import default_extractor
from fewstep.evaluation.metrics.fidelity import class_accuracy, frechet_distance
from fewstep.flow.flow_map import FlowMap
from fewstep.recipes.config import RunConfig
from fewstep.sampling.generate import SamplingSettings, generate
from fewstep.sampling.pipeline import Pipeline
from fewstep.sampling.step_times import SamplerName
from fewstep.training import Callbacks, RunFolder, Runtime
from fewstep.training.loop import Trainer
from fewstep.utils.errors import TrainingDivergedError

ODE_STEPS = 16


class Reference:
    """What the samples of one data set are measured against: up to 5,000 held-out images."""

    def __init__(self, dataset: Dataset, cache: Path | None) -> None:
        self.dataset, self.extractor = dataset, default_extractor(dataset, cache=cache)
        held, labels = dataset.heldout.fetch(torch.arange(min(len(dataset.heldout), 5000)))[:2]
        assert labels is not None
        self.features, self.variance = self.extractor.features(held), total_variance(held)
        self.within = variance_within(held, labels)

    def measure(
        self, model: FlowMap, config: RunConfig, steps: int, count: int, ode: SamplerName | None = None
    ) -> dict[str, float]:
        """Frechet distance, class accuracy, and the ratio of the samples' variance to the data's, in all and within
        classes, in `steps` steps; NaN where not finite. ode: the solver, to sample by the diagonal's own ODE."""
        gamma = config.evaluation.gamma
        sampler: SamplerName = ode or ("gamma" if gamma else "euler" if config.objective.on_diagonal else "map")
        drawn = generate(model, count, SamplingSettings(sampler=sampler, steps=steps, gamma=gamma, seed=SAMPLE_SEED))
        spread = total_variance(drawn.samples) / self.variance
        if not math.isfinite(spread):
            return dict.fromkeys(("frechet", "accuracy", "spread", "within"), math.nan)
        shown = drawn.samples.clamp(-1, 1)
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


def train_cell(cell: Cell, config: RunConfig, reference: Reference, folder: Path) -> Row:
    """Train, measuring at four moments; what is left of a run that diverged counts as NaN."""
    study = STUDIES[cell.dataset, cell.network]
    last = study.steps
    calls = (1, 2, 4, 32) if cell.objective == "flow matching" else (1, 2, 4)
    norms: list[float] = []
    curve: list[Row] = []
    diverged_at, spent = None, 0.0

    def watch(pipeline: Pipeline, step: int) -> None:
        model = pipeline.flow_map
        for nfe in calls if step == last else calls[:3]:
            curve.append({"step": step, "nfe": nfe, **reference.measure(model, config, nfe, study.samples)})
        if step == last and not config.evaluation.gamma:
            found = reference.measure(model, config, ODE_STEPS, study.samples, "heun")
            curve.append({"step": step, "nfe": "ode", **found})

    runtime = Runtime(cpu=True, quiet=True)
    with Trainer(config, reference.dataset, RunFolder(folder), runtime, Callbacks()) as trainer:
        trainer.learner.flow_map.train()
        for moment in (last // 4, last // 2, 3 * last // 4, last):
            started = time.perf_counter()
            try:
                while trainer.step < moment:
                    trainer.take_step()
                    norms.append(trainer.window.steps[-1][1])
            except TrainingDivergedError:
                diverged_at = trainer.step
                break
            spent += time.perf_counter() - started
            trainer.show(watch)
        if cell.objective == "flow matching":
            trainer.save()
    found = verdict(cell, norms, curve, diverged_at) | {"extractor": reference.extractor.name}
    return rounded(found | {"seconds": round(spent, 1), "curve": curve})  # type: ignore[no-any-return]


def verdict(cell: Cell, norms: list[float], curve: list[Row], diverged_at: int | None) -> Row:
    """The row of a finished cell."""
    study = STUDIES[cell.dataset, cell.network]
    last = {row["nfe"]: row for row in curve if row["step"] == study.steps}
    sound = diverged_at is None and all(math.isfinite(row["frechet"]) for row in last.values())
    after = torch.tensor(norms[study.steps // 16 :] or [math.nan], dtype=torch.float64)

    def final(nfe: Any, key: str) -> float | None:
        return last[nfe][key] if sound and nfe in last else None

    found = {
        **asdict(cell), "steps": study.steps, "batch": study.batch, "samples": study.samples,
        "sample_seed": SAMPLE_SEED, "diverged": not sound, "diverged_at": diverged_at,
        "spread_1": final(1, "spread"), "within_1": final(1, "within"),
        **{f"frechet_{nfe}": final(nfe, "frechet") for nfe in (1, 2, 4, "ode")}, "accuracy_1": final(1, "accuracy"),
        "grad_q50": float(after.nanquantile(0.5)), "grad_q99": float(after.nanquantile(0.99)),
    }  # fmt: skip
    return judged(found)


def flow_matching_model(cell: Cell, reference: Reference, models: Path) -> Path:
    """The flow-matching model that the cell starts from, trained now unless it is there."""
    own = starting(cell)
    folder = models / f"{own.dataset}-{own.network}-{own.path}-{own.preconditioning}-{own.seed}-{settings(own)}"
    if not RunFolder(folder).checkpoints():
        train_cell(own, configuration(own, ""), reference, folder)
    return folder
