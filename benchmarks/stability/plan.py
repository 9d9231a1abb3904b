"""What the stability study trains: its cells, their labels and their settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.harness import RESULTS, Grid, Row, Store, digest
from benchmarks.stability.variants import ISDApart, ISDTimeUnit
from fewstep.data import DataConfig
from fewstep.flow.derivatives import Derivative
from fewstep.flow.guidance import FixedGuidance
from fewstep.flow.paths import PathConfig
from fewstep.flow.preconditioning import PreconditioningConfig, ScalingConfig
from fewstep.flow.times import BetaTimes
from fewstep.networks import DiTConfig, MLPConfig, UNetConfig
from fewstep.objectives import (
    CT,
    ECT,
    ESD,
    ISD,
    LSD,
    PSD,
    SCD,
    SCT,
    DiagonalMatching,
    Distance,
    MeanFlow,
    Pairs,
    Shortcut,
    Tangent,
    Weighting,
)
from fewstep.objectives.base import Objective
from fewstep.recipes.config import EvaluationConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from fewstep.utils.parts import kind, kind_name

SAMPLE_SEED = 91_000
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
_MLP = MLPConfig(width=256, depth=3, expansion=0.5, embedding_width=64, max_frequency=16.0)
_UNET = UNetConfig(width=16, multipliers=(1, 2), blocks=1, attention=(4,), head_width=16, max_frequency=16.0)
_DIT = DiTConfig(width=64, depth=3, heads=2, patch=2, max_frequency=16.0)
STUDIES = {
    ("digits", "mlp"): Study(DIGITS, _MLP, 800, 256, 1204),
    ("digits", "unet"): Study(DIGITS, _UNET, 400, 64, 1204),
    ("digits", "dit"): Study(DIGITS, _DIT, 800, 64, 1204),
    ("fashion", "unet"): Study(DataConfig(source="idx"), replace(_UNET, attention=(7,), patch=2), 1600, 32, 1000),
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
    scaling: str = ""
    """The inner scaling; empty for the one that goes with the path (SCALINGS)."""


def objectives(study: Study, derivative: str) -> dict[str, Objective]:
    """Every objective by name with its paper's settings; curricula stretched over the run."""
    images = study.steps * study.batch
    d: dict[str, Any] = {"derivative": Derivative(derivative)}
    huber = Distance(
        "pseudo-huber", 0.00054 * math.sqrt(SIZES[kind_name(type(study.data.source))])
    )  # of iCT, 2310.14189
    tangent = Tangent(warm_up_images=images // 5, derivative=d["derivative"])
    isd, wide = ISD(**d), Weighting(weight_power=1.0, weight_eps=1.0)
    half, most = (Pairs(BetaTimes(), flow_matching_ratio=share) for share in (0.5, 0.75))
    return {
        "flow matching": DiagonalMatching(times=BetaTimes()),
        "iSD": isd,
        "iSD-T": ISD(guidance=FixedGuidance(omega=1.3), **d),
        "MeanFlow": MeanFlow(**d),
        "ESD": ESD(**d),
        "LSD": LSD(**d),
        "PSD": PSD(),
        "PSD, midpoint": PSD(u="midpoint"),
        "shortcut": Shortcut(target_decay=1 - 8 / study.steps),
        "CT": CT(duration=images, distance=huber),
        "ECT": ECT(stage_images=images // 8, distance=huber),
        "sCT": SCT(tangent=tangent),
        "sCD": SCD(tangent=tangent),
        "MeanFlow, guided": MeanFlow(guidance=FixedGuidance(omega=1.3), **d),
        "iSD, diagonal 1/2": replace(isd, pairs=half),
        "iSD, diagonal 3/4": replace(isd, pairs=most),
        "iSD, offset 1": replace(isd, weighting=wide),
        "iSD, offset 1, diagonal 3/4": replace(isd, weighting=wide, pairs=most),
        "iSD, terms apart": ISDApart(isd),
        "iSD, no weight": replace(isd, weighting=Weighting()),
        "iSD, time unit": ISDTimeUnit(isd),
        "iSD, diagonal 3/4, time unit": ISDTimeUnit(replace(isd, pairs=most)),
        "iSD-T, recipe": ISD(pairs=most, guidance=FixedGuidance(omega=1.3), weighting=wide, **d),
    }


COMPARED = (
    "flow matching", "iSD", "iSD-T", "MeanFlow", "ESD", "LSD", "PSD", "PSD, midpoint", "shortcut", "CT", "ECT", "sCT",
)  # fmt: skip
CHOSEN = ("iSD-T, recipe", "iSD-T", "iSD", "MeanFlow", "ESD", "LSD", "PSD", "sCT")


RATED = (*COMPARED, "iSD-T, recipe", "MeanFlow, guided")


def usual(name: str) -> Cell:
    """The cell of an objective that its others differ from by one setting."""
    path, own = OWN_PATH.get(name, ("linear", "linear"))
    return Cell("base", name, path=path, preconditioning=own)


def kinds() -> Iterator[Cell]:
    """All cells without their seeds, the most telling first."""
    yield from (usual(name) for name in COMPARED)
    isd = ("iSD, offset 1", "iSD, diagonal 3/4", "iSD, offset 1, diagonal 3/4")
    yield from (Cell("settings", name) for name in ("iSD-T, recipe", *isd, "MeanFlow, guided"))
    yield from (replace(usual(name), group="lr", lr=lr) for lr in (9e-3, 3e-4) for name in RATED)
    networks = ("flow matching", *CHOSEN, "MeanFlow, guided")
    yield from (Cell("network", name, network=network) for network in ("unet", "dit") for name in networks)
    for name in ("flow matching", *CHOSEN):
        yield Cell("path", name, path="trig", preconditioning="trig")
    yield from (Cell("leads", name) for name in ("iSD, diagonal 1/2", "iSD, terms apart", "iSD, no weight"))
    for name in ("iSD", "iSD-T", "MeanFlow", "ESD", "LSD", "sCT"):
        yield Cell("derivative", name, derivative="finite-difference")
    for name in ("iSD", "iSD, time unit", "iSD, diagonal 3/4", "iSD, diagonal 3/4, time unit"):
        yield Cell("time unit", name, path="trig", preconditioning="trig")
    started = (*CHOSEN, "PSD, midpoint", "ECT", "sCD")
    yield from (replace(usual(name), group="initial", initial="flow matching") for name in started)
    for optimizer in ("no clip", "beta2 0.999", "muon"):
        yield from (Cell("optimizer", name, optimizer=optimizer) for name in ("iSD", "iSD-T", "MeanFlow", "ESD", "sCT"))
    for path, own in (("linear", "euler"), ("linear", "trig"), ("trig", "linear"), ("trig", "euler")):
        yield from (Cell("preconditioning", n, path=path, preconditioning=own) for n in ("iSD", "MeanFlow", "ESD"))
    yield from (Cell("scaling", name, scaling="unit") for name in ("iSD", "MeanFlow", "ESD"))
    yield from (replace(usual(name), group="lr", lr=1e-3) for name in RATED)
    first = ("flow matching", "iSD-T, recipe", "MeanFlow", "iSD-T", "ESD", "PSD", "sCT", "iSD")
    for name in (*first, "MeanFlow, guided", "LSD", "shortcut", "CT", "ECT", "PSD, midpoint"):
        yield replace(usual(name), group="fashion", dataset="fashion", network="unet")


def configuration(cell: Cell, initial: str) -> RunConfig:
    """The run of a cell; initial: folder of the flow-matching model that it starts from, or ""."""
    study = STUDIES[cell.dataset, cell.network]
    objective: Any = objectives(study, cell.derivative)[cell.objective]
    images = study.steps * study.batch
    return RunConfig(
        recipe="stability",
        data=study.data,
        model=ModelConfig(
            path=kind(PathConfig, cell.path),
            preconditioning=kind(PreconditioningConfig, cell.preconditioning),
            scaling=kind(ScalingConfig, cell.scaling or SCALINGS[cell.path]),
        ),
        network=study.network,
        objective=objective,
        optimizer=replace(OPTIMIZERS[cell.optimizer], lr=cell.lr, warmup_images=images // 16, decay="cosine"),
        training=TrainingConfig(images=images, batch_size=study.batch, seed=cell.seed, ema_power=(0.1,)),
        evaluation=EvaluationConfig(gamma=1.0 if isinstance(objective, ADJACENT) else 0.0),
        initial=initial,
        teacher=initial if cell.objective == "sCD" else "",
    )


def starting(cell: Cell) -> Cell:
    """The flow-matching cell whose model this one starts from: its seed, network, path and preconditioning."""
    return replace(cell, objective="flow matching", initial="random", lr=LR, optimizer="adamw", derivative="exact")


def settings(cell: Cell) -> str:
    """The digest of all that a cell trains and is measured by, whatever its seed."""
    study, config = STUDIES[cell.dataset, cell.network], configuration(cell, "")
    return digest(
        config.data, config.model, config.network, config.objective, config.optimizer,
        study.steps, study.batch, config.training.ema_power,
        study.samples, SAMPLE_SEED, config.evaluation.gamma,
        None if cell.initial == "random" else settings(starting(cell)),
    )  # fmt: skip


def plan() -> Iterator[Cell]:
    """Every cell of the study."""
    yield from (replace(cell, seed=seed) for cell in kinds() for seed in (0, 1, 2))


LABEL = tuple(name for name in Cell.__dataclass_fields__ if name != "group")
"""What makes it another run; the group only says what it is for."""
GRID = Grid(Store(RESULTS / "stability" / "cells.jsonl", LABEL, {"scaling": ""}), plan, asdict, settings)


def cell_of(row: Row) -> Cell:
    """The cell that a row was stored for."""
    return Cell(**{name: value for name, value in ({"scaling": ""} | row).items() if name in Cell.__dataclass_fields__})
