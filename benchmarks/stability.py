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
quarter of what the data vary, or more than four times (total variance of pixels). classless: a classifier finds the
class that was asked for less than twice as often as by chance: failed, or not trained for long enough. Measured with
the averaged weights against held-out data. Objectives have their papers' settings as far as they carry over to so short
runs: curricula and slow averages are stretched over the run, pseudo-Huber's constant follows the dimension.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.config import EvaluationConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from fewstep.data import DataConfig, Dataset, load_dataset
from fewstep.errors import TrainingDivergedError
from fewstep.evaluation import Extractor, class_accuracy, default_extractor, frechet_distance
from fewstep.flowmap import FlowMap
from fewstep.guidance import FixedGuidance
from fewstep.networks import DiTConfig, MLPConfig, UNetConfig
from fewstep.objectives import CT, ECT, ESD, ISD, LSD, PSD, SCD, SCT, DiagonalMatching, MeanFlow, Shortcut, Tangent
from fewstep.objectives.base import Objective
from fewstep.sampling import SamplerName, SamplingSettings, generate
from fewstep.serialization import to_json
from fewstep.times import BetaTimes, UniformTimes
from fewstep.training import Attendants, Machine, RunFolder
from fewstep.training.loop import Trainer
from stability_summary import judged, summarise
from stability_variants import ISDApart, ISDTimeUnit

RESULTS = Path(__file__).parent / "results" / "stability"
CELLS = RESULTS / "cells.jsonl"
SAMPLE_SEED = 91_000
LRS = (3e-4, 1e-3, 3e-3, 9e-3)
LR = 3e-3
ADJACENT = (CT, ECT, SCT, SCD)
"""Maps to the data end alone: several steps need fresh noise between."""


@dataclass(frozen=True)
class Study:
    """One data set with one network: how long and with what."""

    data: DataConfig
    network: MLPConfig | UNetConfig | DiTConfig
    steps: int
    batch: int
    samples: int


DIGITS = DataConfig(source="digits")
STUDIES = {
    ("digits", "mlp"): Study(
        DIGITS, MLPConfig(width=256, depth=3, expansion=0.5, embedding_width=64, max_frequency=16.0), 800, 256, 1204
    ),
    ("digits", "unet"): Study(
        DIGITS,
        UNetConfig(width=16, multipliers=(1, 2), blocks=1, attention=(4,), head_width=16, max_frequency=16.0),
        400,
        64,
        1204,
    ),
    ("digits", "dit"): Study(DIGITS, DiTConfig(width=64, depth=3, heads=2, patch=2, max_frequency=16.0), 800, 64, 1204),
    ("fashion", "unet"): Study(
        DataConfig(source="idx"),
        UNetConfig(width=16, multipliers=(1, 2), blocks=1, attention=(7,), head_width=16, patch=2, max_frequency=16.0),
        1600,
        32,
        1000,
    ),
}
OPTIMIZERS = {
    "adamw": OptimizerConfig(beta2=0.99),
    "no clip": OptimizerConfig(beta2=0.99, clip=0.0),
    "beta2 0.999": OptimizerConfig(beta2=0.999),
    "muon": OptimizerConfig(name="muon", beta2=0.99),
}


SCALINGS = {"linear": "identity", "trig": "unit", "edm": "edm-input"}
SIZES = {"digits": 64, "idx": 784}
OWN_PATH = {"CT": ("edm", "bcm"), "ECT": ("edm", "bcm")}
"""Path and preconditioning of objectives that were made for another than the linear."""


@dataclass(frozen=True)
class Cell:
    """One training run of the study."""

    group: str
    objective: str
    seed: int = 0
    dataset: str = "digits"
    network: str = "mlp"
    path: str = "linear"
    preconditioning: str = "linear"
    derivative: str = "exact"
    optimizer: str = "adamw"
    lr: float = LR
    initial: str = "random"

    @property
    def key(self) -> tuple[object, ...]:
        """What makes it another run; the group only says what it is for."""
        return tuple(value for name, value in asdict(self).items() if name != "group")


def objectives(study: Study, derivative: str) -> dict[str, Objective]:
    """Every objective by name with its paper's settings; curricula stretched over the run."""
    images = study.steps * study.batch
    d: dict[str, Any] = {"derivative": derivative}
    huber = 0.00054 * math.sqrt(SIZES[study.data.source])  # of iCT, 2310.14189
    tangent = Tangent(warm_up_images=images // 5, derivative=derivative)  # type: ignore[arg-type]
    isd = ISD(**d)
    return {
        "flow matching": DiagonalMatching(times=BetaTimes()),
        "iSD": isd,
        "iSD-T": ISD(guidance=FixedGuidance(omega=1.3), **d),
        "MeanFlow": MeanFlow(**d),
        "ESD": ESD(**d),
        "LSD": LSD(**d),
        "PSD": PSD(),
        "PSD, midpoint": PSD(u="midpoint"),
        "shortcut": Shortcut(decay=1 - 8 / study.steps),
        "CT": CT(duration=images, huber=huber),
        "ECT": ECT(stage_images=images // 8, huber=huber),
        "sCT": SCT(tangent=tangent),
        "sCD": SCD(tangent=tangent),
        "MeanFlow, guided": MeanFlow(guidance=FixedGuidance(omega=1.3), **d),
        "iSD, diagonal 1/2": replace(isd, diagonal=0.5),
        "iSD, diagonal 3/4": replace(isd, diagonal=0.75),
        "iSD, offset 1": replace(isd, offset=1.0),
        "iSD, offset 1, diagonal 3/4": replace(isd, offset=1.0, diagonal=0.75),
        "iSD, terms apart": ISDApart(isd),
        "iSD, no weight": replace(isd, power=0.0),
        "iSD, time unit": ISDTimeUnit(isd),
        "MeanFlow, diagonal 1/2, uniform": MeanFlow(times=UniformTimes(), diagonal=0.5, **d),
        "iSD-T, recipe": ISD(diagonal=0.75, guidance=FixedGuidance(omega=1.3), offset=1.0, **d),
    }


COMPARED = (
    "flow matching", "iSD", "iSD-T", "MeanFlow", "ESD", "LSD", "PSD", "PSD, midpoint", "shortcut", "CT", "ECT", "sCT",
)  # fmt: skip
CHOSEN = ("iSD-T, recipe", "iSD-T", "iSD", "MeanFlow", "ESD", "LSD", "PSD", "sCT")


RATED = (*COMPARED, "iSD-T, recipe")


def usual(name: str) -> Cell:
    """The cell of an objective that its others differ from by one setting."""
    path, own = OWN_PATH.get(name, ("linear", "linear"))
    return Cell("base", name, path=path, preconditioning=own)


def plan() -> Iterator[Cell]:
    """All cells without their seeds, the most telling first."""
    yield from (usual(name) for name in COMPARED)
    isd = ("iSD, offset 1", "iSD, diagonal 3/4", "iSD, offset 1, diagonal 3/4")
    yield from (Cell("settings", name) for name in ("iSD-T, recipe", *isd, "MeanFlow, guided"))
    yield from (replace(usual(name), group="lr", lr=lr) for lr in (9e-3, 3e-4) for name in RATED)
    yield from (Cell("network", n, network=w) for w in ("unet", "dit") for n in ("flow matching", *CHOSEN))
    for name in CHOSEN:
        yield Cell("path", name, path="trig", preconditioning="trig")
    yield from (Cell("leads", name) for name in ("iSD, diagonal 1/2", "iSD, terms apart", "iSD, no weight"))
    for name in ("iSD", "iSD-T", "MeanFlow", "ESD", "LSD", "sCT"):
        yield Cell("derivative", name, derivative="finite-difference")
    for name in ("iSD", "iSD, time unit"):
        yield Cell("time unit", name, path="trig", preconditioning="trig")
    yield from (Cell("initial", name, initial="flow matching") for name in (*CHOSEN, "PSD, midpoint", "ECT", "sCD"))
    for optimizer in ("no clip", "beta2 0.999", "muon"):
        yield from (Cell("optimizer", name, optimizer=optimizer) for name in ("iSD", "iSD-T", "MeanFlow", "ESD", "sCT"))
    for path, own in (("linear", "euler"), ("linear", "trig"), ("trig", "linear"), ("trig", "euler")):
        yield from (Cell("preconditioning", n, path=path, preconditioning=own) for n in ("iSD", "MeanFlow", "ESD"))
    yield from (replace(usual(name), group="lr", lr=1e-3) for name in RATED)
    for name in ("flow matching", "iSD-T, recipe", "MeanFlow", "iSD-T", "ESD", "PSD", "sCT", "iSD"):
        yield Cell("fashion", name, dataset="fashion", network="unet")


def configuration(cell: Cell, initial: str) -> RunConfig:
    """The run of a cell; initial: folder of the flow-matching model that it starts from, or ""."""
    study = STUDIES[cell.dataset, cell.network]
    objective: Any = objectives(study, cell.derivative)[cell.objective]
    images = study.steps * study.batch
    return RunConfig(
        recipe="stability",
        data=study.data,
        model=ModelConfig(path=cell.path, preconditioning=cell.preconditioning, scaling=SCALINGS[cell.path]),  # type: ignore[arg-type]
        network=study.network,
        objective=objective,
        optimizer=replace(OPTIMIZERS[cell.optimizer], lr=cell.lr, warmup_images=images // 16, decay="cosine"),
        training=TrainingConfig(images=images, batch_size=study.batch, seed=cell.seed, ema_power=(0.1,)),
        evaluation=EvaluationConfig(gamma=1.0 if isinstance(objective, ADJACENT) else 0.0),
        initial=initial,
        teacher=initial if cell.objective == "sCD" else "",
    )


class Stick:
    """What the samples of one data set are measured against."""

    def __init__(self, dataset: Dataset, cache: Path) -> None:
        self.dataset, self.extractor = dataset, default_extractor(dataset, cache=cache)
        held, labels = dataset.heldout.fetch(torch.arange(min(len(dataset.heldout), 5000)))[:2]
        assert labels is not None
        self.reference, self.variance = features(self.extractor, held), total_variance(held)
        self.within = variance_within(held, labels)

    def measure(self, model: FlowMap, config: RunConfig, steps: int, count: int) -> dict[str, float]:
        """Frechet distance, class accuracy, and the ratio of the samples' variance to the data's, in all and within
        classes, in `steps` calls; NaN where not finite."""
        sampler: SamplerName = "euler" if isinstance(config.objective, DiagonalMatching) else "map"
        sampler = "gamma" if config.evaluation.gamma else sampler
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
    trainer = Trainer(config, stick.dataset, RunFolder(folder), Machine(cpu=True, quiet=True), Attendants())
    trainer.flow_map.train()
    norms: list[float] = []
    curve: list[dict[str, Any]] = []
    diverged_at, spent = None, 0.0
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

        def watch(model: FlowMap, step: int) -> None:
            for nfe in steps_measured if step == study.steps else steps_measured[:3]:
                curve.append({"step": step, "nfe": nfe, **stick.measure(model, config, nfe, study.samples)})

        trainer.show(watch)
    if cell.objective == "flow matching":
        trainer.save()
    trainer.release()
    return verdict(cell, study, norms, curve, diverged_at) | {"seconds": round(spent, 1), "curve": rounded(curve)}


def verdict(
    cell: Cell, study: Study, norms: list[float], curve: list[dict[str, Any]], diverged_at: int | None
) -> dict[str, Any]:
    """The row of a finished cell."""
    last = {row["nfe"]: row for row in curve if row["step"] == study.steps}
    sound = diverged_at is None and all(math.isfinite(row["frechet"]) for row in last.values())
    after = torch.tensor(norms[study.steps // 16 :] or [math.nan], dtype=torch.float64)
    spread = last[1]["spread"] if sound else math.nan
    found = {
        **asdict(cell), "steps": study.steps, "batch": study.batch, "samples": study.samples,
        "diverged": not sound, "diverged_at": diverged_at,
        "degenerate": False, "classless": False,
        "spread_1": spread if sound else None, "within_1": last[1]["within"] if sound else None,
        **{f"frechet_{nfe}": last[nfe]["frechet"] if sound else None for nfe in (1, 2, 4)},
        "accuracy_1": last[1]["accuracy"] if sound else None,
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


def settings(cell: Cell) -> str:
    """Eight hex digits of all that a cell trains; a stored cell of other settings is not this study's."""
    study, config = STUDIES[cell.dataset, cell.network], configuration(cell, "")
    record = json.dumps([study.steps, study.batch, study.samples, to_json(config)])
    return hashlib.blake2b(record.encode(), digest_size=4).hexdigest()


def key_of(row: dict[str, Any]) -> tuple[object, ...]:
    """The key of the cell that a row holds."""
    return cell_of(row).key


def cell_of(row: dict[str, Any]) -> Cell:
    return Cell(**{name: row[name] for name in Cell.__dataclass_fields__})


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
    """The flow-matching model of the cell's seed, network and path, trained now unless it is there."""
    own = replace(cell, objective="flow matching", initial="random", lr=LR, optimizer="adamw", derivative="exact")
    folder = models / f"{own.dataset}-{own.network}-{own.path}-{own.preconditioning}-{own.seed}-{settings(own)}"
    if not RunFolder(folder).checkpoints():
        train_cell(own, configuration(own, ""), stick, folder)
    return folder


def cost() -> None:
    """Seconds of a step of every objective over flow matching's on digits, taking turns in one process."""
    from stability_cost import step_costs

    networks = ("mlp", "unet", "dit")
    found = step_costs({("digits", name): STUDIES["digits", name] for name in networks}, objectives)
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
