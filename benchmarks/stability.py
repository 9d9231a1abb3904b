"""Which objectives train few-step models stably, how well, and at what cost: objective by objective, cell by cell.

    python benchmarks/stability.py run [--group base] [--seeds 0 1 2] [--worker 0/2]
    python benchmarks/stability.py cost
    python benchmarks/stability.py

`run` trains every cell of the plan that has no result yet, in order, and adds one line each to
benchmarks/results/stability/cells.jsonl; several workers share the plan. A cell is an objective with one setting of
network, path, preconditioning, derivative, optimizer, learning rate, start and seed; cells of one seed share the order
of the data and all random numbers. `cost` times a step of every objective in one process (results/stability/cost.json).
Without either it writes benchmarks/results/stability.json, docs/figures/stability*.png and prints the tables.

diverged: a loss, gradient or sample that is not finite. degenerate: finite, but one-step samples vary less than a
quarter of what the data vary, or more than four times (total variance of pixels; within_1, the variance within classes
over the data's, judges nothing, since one step of flow matching has none). classless: a classifier finds the
class that was asked for less than twice as often as by chance: failed, or not trained for long enough. Measured with
the averaged weights against held-out data. Objectives have their papers' settings as far as they carry over to so short
runs: curricula and slow averages are stretched over the run, pseudo-Huber's constant follows the dimension.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data import Dataset, load_dataset
from fewstep.evaluation.metrics import Extractor, class_accuracy, default_extractor, frechet_distance
from fewstep.flow.flow_map import FlowMap
from fewstep.objectives import DiagonalMatching
from fewstep.recipes.config import RunConfig
from fewstep.sampling.generate import SamplerName, SamplingSettings, generate
from fewstep.sampling.pipeline import Pipeline
from fewstep.training import Callbacks, RunFolder, Runtime
from fewstep.training.loop import Trainer
from fewstep.utils.errors import TrainingDivergedError
from stability_plan import (
    SAMPLE_SEED,
    STUDIES,
    Cell,
    Study,
    cell_of,
    configuration,
    key_of,
    objectives,
    plan,
    settings,
    starting,
)
from stability_summary import judged, summarise

ODE_STEPS = 16
RESULTS = Path(__file__).parent / "results" / "stability"
CELLS = RESULTS / "cells.jsonl"


class Stick:
    """What the samples of one data set are measured against."""

    def __init__(self, dataset: Dataset, cache: Path) -> None:
        self.dataset, self.extractor = dataset, default_extractor(dataset, cache=cache)
        held, labels = dataset.heldout.fetch(torch.arange(min(len(dataset.heldout), 5000)))[:2]
        assert labels is not None
        self.reference, self.variance = features(self.extractor, held), total_variance(held)
        self.within = variance_within(held, labels)

    def measure(
        self, model: FlowMap, config: RunConfig, steps: int, count: int, ode: SamplerName | None = None
    ) -> dict[str, float]:
        """Frechet distance, class accuracy, and the ratio of the samples' variance to the data's, in all and within
        classes, in `steps` steps; NaN where not finite. ode: the solver, to sample by the diagonal's own ODE."""
        sampler: SamplerName = "euler" if isinstance(config.objective, DiagonalMatching) else "map"
        sampler = ode or ("gamma" if config.evaluation.gamma else sampler)
        settings = SamplingSettings(sampler=sampler, steps=steps, gamma=config.evaluation.gamma, seed=SAMPLE_SEED)
        drawn = generate(model, count, settings)
        spread = total_variance(drawn.samples) / self.variance
        if not math.isfinite(spread):
            return dict.fromkeys(("frechet", "accuracy", "spread", "within"), math.nan)
        shown = drawn.samples.clamp(-1, 1)
        found = features(self.extractor, shown)
        assert drawn.labels is not None
        accuracy = class_accuracy(self.extractor.classify(shown), drawn.labels)
        within = variance_within(drawn.samples, drawn.labels) / self.within
        frechet = frechet_distance(found, self.reference)
        return {"frechet": frechet, "accuracy": float(accuracy), "spread": spread, "within": within}


def features(extractor: Extractor, images: Tensor) -> Tensor:
    return torch.cat([extractor.features(part) for part in images.split(1000)])


def total_variance(images: Tensor) -> float:
    """Sum of the variances of all pixels."""
    return float(images.flatten(1).double().var(0).sum())


def variance_within(images: Tensor, labels: Tensor) -> float:
    """total_variance of each class, meaned over its images."""
    classes = labels.unique().tolist()
    return sum(total_variance(images[labels == c]) * float((labels == c).float().mean()) for c in classes)


def train_cell(cell: Cell, config: RunConfig, stick: Stick, folder: Path) -> dict[str, Any]:
    """Train, measuring at four moments; what is left of a run that diverged counts as NaN."""
    study = STUDIES[cell.dataset, cell.network]
    steps_measured = (1, 2, 4, 32) if cell.objective == "flow matching" else (1, 2, 4)
    norms: list[float] = []
    curve: list[dict[str, Any]] = []
    diverged_at, spent = None, 0.0
    runtime = Runtime(cpu=True, quiet=True)
    with Trainer(config, stick.dataset, RunFolder(folder), runtime, Callbacks()) as trainer:
        trainer.flow_map.train()
        for moment in (study.steps // 4, study.steps // 2, 3 * study.steps // 4, study.steps):
            started = time.perf_counter()
            try:
                while trainer.step < moment:
                    trainer.take_step()
                    norms.append(trainer.window.steps[-1][1])
            except TrainingDivergedError:
                diverged_at = trainer.step
                break
            spent += time.perf_counter() - started

            def watch(pipeline: Pipeline, step: int) -> None:
                model = pipeline.flow_map
                for nfe in steps_measured if step == study.steps else steps_measured[:3]:
                    curve.append({"step": step, "nfe": nfe, **stick.measure(model, config, nfe, study.samples)})
                if step == study.steps and not config.evaluation.gamma:
                    found = stick.measure(model, config, ODE_STEPS, study.samples, "heun")
                    curve.append({"step": step, "nfe": "ode", **found})

            trainer.show(watch)
        if cell.objective == "flow matching":
            trainer.save()
    found = verdict(cell, study, norms, curve, diverged_at, stick.extractor.name)
    return found | {"seconds": round(spent, 1), "curve": rounded(curve)}


def verdict(
    cell: Cell, study: Study, norms: list[float], curve: list[dict[str, Any]], diverged_at: int | None, extractor: str
) -> dict[str, Any]:
    """The row of a finished cell; extractor: in whose features the distances are."""
    last = {row["nfe"]: row for row in curve if row["step"] == study.steps}
    sound = diverged_at is None and all(math.isfinite(row["frechet"]) for row in last.values())
    after = torch.tensor(norms[study.steps // 16 :] or [math.nan], dtype=torch.float64)
    spread = last[1]["spread"] if sound else math.nan
    found = {
        **asdict(cell), "steps": study.steps, "batch": study.batch, "samples": study.samples,
        "sample_seed": SAMPLE_SEED, "extractor": extractor,
        "diverged": not sound, "diverged_at": diverged_at,
        "degenerate": False, "classless": False,
        "spread_1": spread if sound else None, "within_1": last[1]["within"] if sound else None,
        **{f"frechet_{nfe}": last[nfe]["frechet"] if sound else None for nfe in (1, 2, 4)},
        "accuracy_1": last[1]["accuracy"] if sound else None,
        "frechet_ode": last["ode"]["frechet"] if sound and "ode" in last else None,
        "grad_q50": float(after.nanquantile(0.5)), "grad_q99": float(after.nanquantile(0.99)),
    }  # fmt: skip
    return judged(found)


def rounded(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON knows no NaN: null; five digits are plenty."""

    def short(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return float(f"{value:.5g}") if math.isfinite(value) else None

    return [{key: short(value) for key, value in row.items()} for row in curve]


def read_cells() -> list[dict[str, Any]]:
    """Every stored cell of today's settings; others, also of networks that the study no longer has, and a line that was
    cut off are left out, and trained again.
    """
    found: list[dict[str, Any]] = []
    for line in CELLS.read_text().splitlines() if CELLS.is_file() else []:
        with contextlib.suppress(ValueError, KeyError):
            row = json.loads(line)
            found += [row] if row["settings"] == settings(cell_of(row)) else []
    return found


def run(options: argparse.Namespace) -> None:
    """Train the cells that have no result yet."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    part, workers = (int(number) for number in options.worker.split("/"))
    wanted = [c for c in plan() if options.group in ("", c.group) and options.only in ("", c.objective)]
    cells = list({replace(c, seed=seed).key: replace(c, seed=seed) for c in wanted for seed in options.seeds}.values())
    sticks: dict[str, Stick] = {}
    for cell in cells[part::workers]:
        if cell.key in {key_of(row) for row in read_cells()}:
            continue
        study = STUDIES[cell.dataset, cell.network]
        if cell.dataset not in sticks:
            sticks[cell.dataset] = Stick(load_dataset(study.data), options.cache)
        stick = sticks[cell.dataset]
        with tempfile.TemporaryDirectory() as folder:
            initial = "" if cell.initial == "random" else str(flow_matching_model(cell, stick, options.models))
            found = train_cell(cell, configuration(cell, initial), stick, Path(folder) / "run")
        line = json.dumps(rounded([found | {"settings": settings(cell)}])[0]) + "\n"
        with CELLS.open("a") as file:
            file.write(line)
        shown = {k: found[k] for k in ("frechet_1", "frechet_2", "frechet_4", "diverged", "degenerate", "grad_q99")}
        print(f"{cell}: {found['seconds']} s; {shown}", flush=True)


def flow_matching_model(cell: Cell, stick: Stick, models: Path) -> Path:
    """The flow-matching model that the cell starts from, trained now unless it is there."""
    own = starting(cell)
    folder = models / f"{own.dataset}-{own.network}-{own.path}-{own.preconditioning}-{own.seed}-{settings(own)}"
    if not RunFolder(folder).checkpoints():
        train_cell(own, configuration(own, ""), stick, folder)
    return folder


def cost() -> None:
    """Seconds of a step of every objective over flow matching's, taking turns in one process."""
    from stability_cost import step_costs

    found = step_costs(STUDIES, objectives)
    (RESULTS / "cost.json").write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    running = commands.add_parser("run", help="train the cells that have no result yet")
    running.add_argument("--group", default="", help="only cells of this group")
    running.add_argument("--only", default="", help="only cells of this objective")
    running.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    running.add_argument("--worker", default="0/1", help="i/n: take every n-th cell, from the i-th")
    running.add_argument("--cache", type=Path, default=None, help="folder of trained feature extractors")
    running.add_argument("--models", type=Path, default=Path("runs/stability"), help="where flow-matching models go")
    commands.add_parser("cost", help="time a step of every objective")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "run":
        run(options)
    elif options.command == "cost":
        cost()
    else:
        planned = {replace(cell, seed=seed).key for cell in plan() for seed in (0, 1, 2)}
        summarise(read_cells(), RESULTS, len(planned - {key_of(row) for row in read_cells()}))


if __name__ == "__main__":
    main()
