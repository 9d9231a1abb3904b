"""What can be done with a run folder: watch it, measure it, report it."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from fewstep.config import EvaluationConfig, RunConfig
from fewstep.data import Dataset
from fewstep.errors import CheckpointError
from fewstep.evaluation import (
    Extractor,
    InceptionExtractor,
    Measurement,
    ReferenceFeatures,
    default_extractor,
    frechet_distance,
    measure,
    reference_features,
)
from fewstep.files import write_atomically
from fewstep.flowmap import FlowMap
from fewstep.objectives import CATALOGUE, CD, CTM, ISD, DiagonalMatching
from fewstep.reporting import Grid, RunReport, save_grid, write_report
from fewstep.sampling import SamplerName, SamplingSettings, Spacing, generate
from fewstep.students import read_alignments, teacher_name, with_labels
from fewstep.training.checkpoint import RunFolder, read_state
from fewstep.training.loop import Watcher

Row = dict[str, Any]
FIGURES_FILE = "figures.json"
REPORT_FILE = "report.html"
CURVE_FILE = "curve.jsonl"
STUDY_FILE = "study.json"


def watcher(run: RunFolder, config: RunConfig, count: int = 40) -> Watcher:
    """Draws a grid of the averaged model at the first two step counts of the recipe: samples/step-N.png."""

    def watch(flow_map: FlowMap, step: int) -> None:
        rows = [
            generate(flow_map, count, settings).samples
            for settings in sampler_settings(config, config.evaluation.steps[:2])
        ]
        config_range = None if flow_map.config is None else flow_map.config.data_range
        save_grid(torch.cat(rows), run.samples / f"step-{step:08d}.png", columns=20, data_range=config_range)

    return watch


def sampler_settings(config: RunConfig, steps: tuple[int, ...]) -> list[SamplingSettings]:
    """The run's own sampler at these step counts: the map; for a model of the diagonal alone Euler's method, or on the
    EDM path Heun's.
    """
    evaluation, on_edm = config.evaluation, config.model.path == "edm"
    diagonal: SamplerName = "heun" if on_edm else "euler"
    jumping: SamplerName = "gamma" if evaluation.gamma else "map"
    sampler = diagonal if config.objective.on_diagonal else jumping
    base = SamplingSettings(
        sampler=sampler, gamma=evaluation.gamma, spacing=spacing(config), omega=evaluation.omega, seed=evaluation.seed
    )
    return [replace(base, steps=count) for count in steps]


def spacing(config: RunConfig) -> Spacing:
    """How the run's step times are spaced: as EDM's on its path."""
    return "edm" if config.model.path == "edm" else "uniform"


def method_name(config: RunConfig) -> str:
    """The objective as figures name it."""
    match config.objective:
        case DiagonalMatching(measure="velocity"):
            return "flow matching"
        case DiagonalMatching():
            return "denoising"
        case ISD():
            return "iSD-T" if config.objective.guidance.active else "iSD"
        case CD():
            return f"CD, {config.model.preconditioning}"
        case CTM():
            return f"CTM, {config.model.preconditioning}"
        case objective:
            return next(entry.name for entry in CATALOGUE if entry.objective is type(objective))


@dataclass(frozen=True)
class Yardstick:
    """What samples are measured with: the extractor and the held-out part's features."""

    extractor: Extractor
    reference: ReferenceFeatures


def yardstick(dataset: Dataset, cache: Path | None, inception: Path | None = None) -> Yardstick:
    """The data set's own classifier (trained on its training part, kept in `cache`), or Inception when given."""
    extractor = default_extractor(dataset, cache=cache) if inception is None else InceptionExtractor(inception)
    return Yardstick(extractor, reference_features(dataset.heldout, f"{dataset.name} held out", extractor))


def curve_watcher(run: RunFolder, config: RunConfig, dataset: Dataset, cache: Path | None) -> Watcher:
    """Appends points of the learning curve to RUN/curve.jsonl, which `fewstep compare` reads.

    Each point is the Frechet distance of the averaged model's samples, by the run's own sampler at `curve_steps`.
    """
    settings = config.evaluation
    sticks: list[Yardstick] = []

    def watch(flow_map: FlowMap, step: int) -> None:
        if not sticks:  # at the first point: its classifier may have to be trained
            sticks.append(yardstick(with_labels(config.data, dataset), cache))
        images = step * config.training.batch_size
        points: list[Row] = []
        for each in sampler_settings(config, settings.curve_steps):
            drawn = generate(flow_map, settings.curve_samples, each)
            features = sticks[0].extractor.features(_within_range(flow_map, drawn.samples))
            sound = bool(features.isfinite().all())  # a model may break down and recover; its point reaches nothing
            value = frechet_distance(features, sticks[0].reference.features) if sound else math.nan
            points.append(
                {"images": images, "step": step, "seconds": _seconds_at(run, step)}
                | {"measure": "frechet", "nfe": round(drawn.nfe), "value": value}
            )
        write_curve(run, points)

    return watch


def write_curve(run: RunFolder, points: list[Row]) -> None:
    """Add points of one step to curve.jsonl; what an earlier start of the run wrote of it, or beyond it, goes.

    A line that cannot be read ends what is kept, as in the log.
    """
    file, step = run.root / CURVE_FILE, points[0]["step"]
    measures = {point["measure"] for point in points}
    kept: list[Row] = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            found = json.loads(line)
            if found["step"] < step or (found["step"] == step and found["measure"] not in measures):
                kept.append(found)
        except (ValueError, KeyError, TypeError):
            break
    write_atomically(file, "".join(json.dumps(point) + "\n" for point in [*kept, *points]))


def _seconds_at(run: RunFolder, step: int) -> float | None:
    """Training time behind a step, from the log's last line at its pace; None before there is one."""
    log = run.read_log()
    return round(log[-1]["seconds"] * step / log[-1]["step"], 3) if log else None


def measure_real(dataset: Dataset, samples: int, stick: Yardstick) -> Row:
    """The training images themselves against the held-out ones: the floor for every method (NFE 0)."""
    count = min(samples, len(dataset.train))
    images, labels = dataset.train.fetch(torch.arange(count))
    found = measure(
        images, labels, stick.reference, stick.extractor, method="real data (training part)", nfe=0, seed=0, seconds=0.0
    )
    return _row(found, 0.0)


def best_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure_run(run: RunFolder, stick: Yardstick, evaluation: EvaluationConfig | None = None) -> list[Row]:
    """One row for every step count of the recipe, and for the ODE reference of a map; `evaluation` replaces its own."""
    config, flow_map = run.config(), run.flow_map().to(best_device())
    config = config if evaluation is None else replace(config, evaluation=evaluation)
    settings = config.evaluation
    name = method_name(config) + ("" if settings.omega == 1 else f", omega {settings.omega:g}")
    plans = [(name, each) for each in sampler_settings(config, settings.steps)]
    if not isinstance(config.objective, DiagonalMatching):
        plans.append((f"{name}, its ODE by Heun", reference_settings(config)))
    return [
        _row(measure_settings(flow_map, each, label, settings.samples, stick), training_seconds(run), settings.omega)
        for label, each in plans
    ]


def reference_settings(config: RunConfig) -> SamplingSettings:
    """Heun's method at about `reference_steps` evaluations."""
    evaluation = config.evaluation
    steps = max(1, (evaluation.reference_steps + 1) // 2)
    return SamplingSettings(
        sampler="heun", steps=steps, spacing=spacing(config), omega=evaluation.omega, seed=evaluation.seed
    )


def measure_settings(
    flow_map: FlowMap, settings: SamplingSettings, method: str, count: int, stick: Yardstick
) -> Measurement:
    """Draw `count` samples and measure them."""
    drawn = generate(flow_map, count, settings)
    return measure(
        _within_range(flow_map, drawn.samples),
        drawn.labels,
        stick.reference,
        stick.extractor,
        method=method,
        nfe=round(drawn.nfe),
        seed=settings.seed,
        seconds=drawn.seconds,
        latency_ms=latency(flow_map, settings),
    )


def _within_range(flow_map: FlowMap, images: Tensor) -> Tensor:
    """Samples cut to the range of the data, where they have one."""
    if flow_map.config is None or flow_map.config.data_range is None:
        return images
    return images.clamp(*flow_map.config.data_range)


def latency(flow_map: FlowMap, settings: SamplingSettings, repeats: int = 5) -> float:
    """Median milliseconds to draw one sample alone, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        generate(flow_map, 1, settings)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def training_seconds(run: RunFolder) -> float:
    """Seconds of training behind the newest checkpoint."""
    return float(read_state(run.last_checkpoint())["seconds"])


def _row(found: Measurement, seconds: float, omega: float = 1.0) -> Row:
    """A measurement as stored: `seconds` is training time there, `sampling_seconds` the time to draw all samples."""
    row = found.row()
    return row | {
        "seconds": seconds,
        "sampling_seconds": row["seconds"],
        "omega": omega,
        "device": str(best_device()),
    }


def write_figures(rows: list[Row], folder: Path) -> Path:
    """Store rows in figures.json beside those stored earlier; a row measured anew replaces its older self."""

    def identity(row: Row) -> tuple[Any, ...]:
        keys = ("method", "nfe", "extractor", "reference", "samples", "seed", "omega")
        return tuple(row.get(key) for key in keys)

    fresh = {identity(row) for row in rows}
    kept = [row for row in read_figures(folder) if identity(row) not in fresh]
    file = folder / FIGURES_FILE
    write_atomically(file, json.dumps([*rows, *kept], indent=2) + "\n")
    return file


def read_figures(folder: Path) -> list[Row]:
    """Rows stored earlier, or none; raises CheckpointError when the file is damaged."""
    file = folder / FIGURES_FILE
    try:
        rows: list[Row] = json.loads(file.read_text()) if file.is_file() else []
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}): run fewstep evaluate {folder} anew") from error
    return rows


def table(rows: list[Row]) -> str:
    """Rows as aligned text."""
    heads = f"{'Frechet':>9} {'accuracy':>9} {'precision':>10} {'recall':>7} {'ms/sample':>10}"
    lines = [f"{'method':32} {'NFE':>4} {heads}"]
    for row in rows:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        latency_ms = "" if row["latency_ms"] is None else f"{row['latency_ms']:.1f}"
        lines.append(
            f"{row['method'][:32]:32} {row['nfe']:>4} {row['frechet']:>9.2f} {accuracy:>9} "
            f"{row['precision']:>10.2f} {row['recall']:>7.2f} {latency_ms:>10}"
        )
    if rows:
        first = rows[0]
        lines.append(f"Frechet distance in the features of {first['extractor']} to {first['reference']}; not FID.")
    return "\n".join(lines)


def grids(run: RunFolder, count: int = 40) -> tuple[Grid, ...]:
    """Grids at the recipe's first three step counts and by the reference, from the same noise."""
    config, flow_map = run.config(), run.flow_map().to(best_device())
    name = method_name(config)
    plans = [(name, settings) for settings in sampler_settings(config, config.evaluation.steps[:3])]
    plans.append((f"{name}, its ODE by Heun", reference_settings(config)))
    drawn = [(label, generate(flow_map, count, settings)) for label, settings in plans]
    return tuple(
        Grid(
            f"{label}, {_calls(round(found.nfe))}",
            "Same noise and classes in every grid.",
            found.samples,
            10,
        )
        for label, found in drawn
    )


def baselines(run: RunFolder) -> tuple[RunFolder, ...]:
    """Runs kept inside the run's folder to be compared with it."""
    found = [RunFolder(path) for path in sorted(run.root.iterdir()) if path.is_dir()]
    return tuple(each for each in found if each.config_file.is_file() and each.checkpoints())


def report(run: RunFolder, title: str = "") -> Path:
    """Write report.html: samples, curves, quality against NFE, cost, settings; its baselines appear beside the run."""
    run.record()
    others = baselines(run)
    config, record = run.config(), run.record()
    flow_map = run.flow_map()
    rows, aligned = read_figures(run.root), read_alignments((run, *others))
    logs = {method_name(r.config()): r.read_log() for r in (run, *others)}
    found = RunReport(
        title=title or f"fewstep: {config.recipe}",
        summary=_summary(config, record["data"]),
        facts=_facts(rows, method_name(config)),
        grids=tuple(grid for r in (run, *others) for grid in grids(r)),
        logs=logs,
        rows=rows,
        cost=_cost(run, others),
        settings=record,
        links=study_links(run),
        data_range=None if flow_map.config is None else flow_map.config.data_range,
        alignments=tuple(each["jumps"] for each in aligned),
        trajectories=tuple(row for each in aligned for row in each["trajectories"]),
    )
    return write_report(found, run.root / REPORT_FILE)


def study_links(run: RunFolder) -> tuple[tuple[str, str], ...]:
    """Links to the comparison that the run is part of, and to the reports of its other runs, as far as they exist.

    Raises CheckpointError when study.json, which `fewstep compare` writes, is damaged.
    """
    file = run.root / STUDY_FILE
    if not file.is_file():
        return ()
    try:
        study = json.loads(file.read_text())
        pages = [("Comparison", str(study["comparison"]))]
        pages += [(Path(name).name, f"{name}/{REPORT_FILE}") for name in map(str, study["runs"])]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}): delete it, or run fewstep compare anew") from error
    return tuple((text, quote(page)) for text, page in pages if (run.root / page).is_file())


def _summary(config: RunConfig, data: Any) -> str:
    distilled = config.objective.needs_teacher
    origin = f"distilled from {teacher_name(config)}" if distilled else "trained from scratch"
    return (
        f"{method_name(config)}, {origin} on {data['train']} samples of {data['name']} "
        f"({'x'.join(str(n) for n in data['shape'])}), {config.model.path} path, "
        f"{config.model.preconditioning} preconditioning."
    )


def _facts(rows: list[Row], method: str) -> tuple[tuple[str, str], ...]:
    own = [row for row in rows if row["method"] == method][:3]
    real = [row for row in rows if row["nfe"] == 0]
    cards = [(f"Frechet distance, {_calls(row['nfe'])}", f"{row['frechet']:.2f}") for row in own]
    return tuple(cards + [("real training data", f"{row['frechet']:.2f}") for row in real])


def _calls(nfe: int) -> str:
    return "1 network call" if nfe == 1 else f"{nfe} network calls"


def _cost(run: RunFolder, others: tuple[RunFolder, ...]) -> tuple[tuple[str, str], ...]:
    lines = []
    for each in (run, *others):
        config, flow_map = each.config(), each.flow_map()
        state = read_state(each.last_checkpoint())
        parameters = sum(p.numel() for p in flow_map.parameters())
        lines.append(
            (
                method_name(config),
                f"{state['seconds']:.0f} s of training, {state['images']:,} images in {state['step']:,} steps, "
                f"{state['images'] / max(state['seconds'], 1e-9):,.0f} images/s, {parameters:,} parameters",
            )
        )
    return tuple(lines)
