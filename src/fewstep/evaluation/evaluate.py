"""What is measured of a run: how it is sampled, how good its samples are, where the figures are kept."""

import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.base import Dataset
from fewstep.data.latents.autoencoders import load_decoder
from fewstep.evaluation.align import with_labels
from fewstep.evaluation.metrics.features import (
    DecodedExtractor,
    Extractor,
    InceptionExtractor,
    RandomConvExtractor,
    default_extractor,
)
from fewstep.evaluation.metrics.fidelity import frechet_distance
from fewstep.evaluation.metrics.measure import Evaluator
from fewstep.recipes.config import EvaluationConfig, RunConfig
from fewstep.sampling.generate import Generated, SamplingSettings, Spacing, generate
from fewstep.sampling.pipeline import Pipeline
from fewstep.sampling.step_times import SamplerName
from fewstep.training.checkpoint import read_state
from fewstep.training.run_folder import RunFolder
from fewstep.training.settings import Watcher
from fewstep.utils.errors import ConfigError
from fewstep.utils.files import parse_json, read_rows, reading, reading_line, write_atomically
from fewstep.utils.parts import kind_name
from fewstep.utils.text import aligned

Row = dict[str, Any]
FIGURES_FILE = "figures.json"
CURVE_FILE = "curve.jsonl"
_IDENTITY = ("method", "nfe", "extractor", "reference", "samples", "seed", "guidance_scale")
_SHOWN: dict[str, Any] = {"method": str, "extractor": str, "reference": str, "nfe": int | float, "frechet": int | float}


def sampler_settings(config: RunConfig, steps: tuple[int, ...]) -> list[SamplingSettings]:
    """The run's own sampler at these step counts: the map; for a model of the diagonal alone Euler's method, or on the
    EDM path Heun's.
    """
    evaluation, on_edm = config.evaluation, config.model.noise_clock
    diagonal: SamplerName = "heun" if on_edm else "euler"
    jumping: SamplerName = "gamma" if evaluation.gamma else "map"
    sampler = diagonal if config.objective.on_diagonal else jumping
    base = SamplingSettings(
        sampler=sampler,
        gamma=evaluation.gamma,
        spacing=spacing(config),
        guidance_scale=evaluation.guidance_scale,
        seed=evaluation.seed,
    )
    return [replace(base, steps=count) for count in steps]


def own_settings(folder: Path, pipeline: Pipeline, steps: int) -> SamplingSettings:
    """The sampler, gamma and guidance that a run is measured by; gamma is 0.5 where that has none.

    A saved model does not say how it was trained: the sampler that its times for so many steps were tuned for, else the
    map; the guidance that all its tuned times are for, else none.
    """
    run = RunFolder(folder)
    if run.config_file.is_file() and run.checkpoints():
        own = sampler_settings(run.config(), (1,))[0]
        scale = own.guidance_scale if pipeline.flow_map.num_classes else 1.0
        return SamplingSettings(sampler=own.sampler, gamma=own.gamma or 0.5, guidance_scale=scale)
    scales = {each.guidance_scale for each in pipeline.step_times}
    scale = scales.pop() if len(scales) == 1 else 1.0
    tuned = next((each for each in pipeline.step_times if each.steps == steps), None)
    if pipeline.flow_map.preconditioning.data_end_only:  # which has no other jumps
        return SamplingSettings(sampler="gamma", gamma=1.0, guidance_scale=scale)
    sampler: SamplerName = "map" if tuned is None else tuned.sampler
    gamma = 0.5 if tuned is None else tuned.gamma or 0.5
    return SamplingSettings(sampler=sampler, gamma=gamma, guidance_scale=scale)


def spacing(config: RunConfig) -> Spacing:
    """How the run's step times are spaced: as EDM's on its path."""
    return "edm" if config.model.noise_clock else "uniform"


def method_of(run: RunFolder) -> str:
    """The run's objective as figures name it; raises CheckpointError where the run does not say what its data are."""
    return method_name(run.config(), run.data("classes")["classes"])


def method_name(config: RunConfig, classes: int) -> str:
    """The objective as figures name it; classes: how many the data have, without which nothing is guided."""
    return config.objective.method(kind_name(type(config.model.preconditioning)), classes > 0)


def build_evaluator(
    dataset: Dataset, cache: Path | None, inception: Path | None = None, autoencoder: Path | None = None
) -> Evaluator:
    """The data set's own classifier (trained on its training part, kept in `cache`), or Inception when given.

    Latents are measured as images, decoded by their autoencoder, which may have been moved; no classifier is trained
    on those: without Inception their features are random convolutions.
    """
    if dataset.policy is not None:
        raise ConfigError(
            f"{dataset.name} is a robot's actions, which no features measure: let the policy act, with fewstep rollout"
        )
    if dataset.latents is not None:
        decoder = load_decoder(dataset.latents, autoencoder, best_device())
        random = RandomConvExtractor(dataset.latents.image_shape)
        seen = DecodedExtractor(random if inception is None else InceptionExtractor(inception), decoder)
        return Evaluator.of(dataset.heldout, f"{dataset.name} held out, decoded", seen)
    if autoencoder is not None:
        raise ConfigError(f"the samples of {dataset.name} are no latents: leave out --autoencoder")
    extractor = default_extractor(dataset, cache=cache) if inception is None else InceptionExtractor(inception)
    return Evaluator.of(dataset.heldout, f"{dataset.name} held out", extractor)


def curve_watcher(run: RunFolder, config: RunConfig, dataset: Dataset, cache: Path | None) -> Watcher:
    """Appends points of the learning curve to RUN/curve.jsonl, which `fewstep compare` reads.

    Each point is the Frechet distance of the averaged model's samples, by the run's own sampler at `curve_steps`.
    """
    settings = config.evaluation
    evaluators: list[Evaluator] = []
    if settings.curve_images and (dataset.latents or dataset.policy):  # what they lack is said before the training
        evaluators.append(build_evaluator(dataset, cache))

    def watch(pipeline: Pipeline, step: int) -> None:
        if not evaluators:  # at the first point: its classifier may have to be trained
            evaluators.append(build_evaluator(with_labels(config.data, dataset), cache))
        at = {"images": step * config.training.batch_size, "step": step, "seconds": _seconds_at(run, step)}
        points: list[Row] = []
        for each in sampler_settings(config, settings.curve_steps):
            drawn, features = draw_features(pipeline, settings.curve_samples, each, evaluators[0].extractor)
            sound = bool(features.isfinite().all())  # a model may break down and recover; its point reaches nothing
            value = frechet_distance(features, evaluators[0].features) if sound else math.nan
            points.append(at | {"measure": "frechet", "nfe": round(drawn.nfe), "value": value})
        write_curve(run, points)

    return watch


def draw_features(
    pipeline: Pipeline, count: int, settings: SamplingSettings, extractor: Extractor
) -> tuple[Generated, Tensor]:
    """`count` samples, and their features (count, d)."""
    drawn = generate(pipeline, count, settings)
    return drawn, extractor.features(_within_range(pipeline, drawn.samples))


def write_curve(run: RunFolder, points: list[Row]) -> None:
    """Add points of one step to curve.jsonl; what an earlier start of the run wrote of it, or beyond it, goes.

    A line that cannot be read ends what is kept, as in the log.
    """
    file, step = run.root / CURVE_FILE, points[0]["step"]
    measures = {point["measure"] for point in points}
    kept: list[Row] = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            found = parse_json(line)
            if found["step"] < step or (found["step"] == step and found["measure"] not in measures):
                kept.append(found)
        except (ValueError, KeyError, TypeError):
            break
    write_atomically(file, "".join(json.dumps(point) + "\n" for point in [*kept, *points]))


def _seconds_at(run: RunFolder, step: int) -> float | None:
    """Training time behind a step, from the log's last line at its pace; None before there is one."""
    log = run.read_log()
    with reading_line(run.log_file, len(log)):
        return round(log[-1]["seconds"] * step / log[-1]["step"], 3) if log else None


def measure_real(dataset: Dataset, samples: int, evaluator: Evaluator) -> Row:
    """The training images themselves against the held-out ones: the floor for every method (NFE 0)."""
    images, labels = dataset.train.fetch(torch.arange(min(samples, len(dataset.train))))
    method = {"method": "real data (training part)", "nfe": 0}
    times = {"seed": 0, "seconds": 0.0, "sampling_seconds": 0.0, "latency_ms": None}
    return method | evaluator.measure(images, labels) | times | {"guidance_scale": 1.0, "device": str(best_device())}


def best_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure_run(
    run: RunFolder, evaluator: Evaluator, evaluation: EvaluationConfig | None = None, weights: str = ""
) -> list[Row]:
    """One row for every step count of the recipe, and for the ODE reference of a map; `evaluation` replaces its own.

    weights: as of `RunFolder.pipeline`; named in the method of each row unless they are the first EMA's.

    Tuned step times have rows of their own beside the default's, whose `tuned_on` says which held-out samples chose
    them: they are among those measured against, so that the default's rows alone have seen none.
    """
    config, pipeline = run.config(), run.pipeline(weights).to(best_device())
    config = config if evaluation is None else replace(config, evaluation=evaluation)
    settings = config.evaluation
    name = method_of(run) + ("" if settings.guidance_scale == 1 else f", guidance {settings.guidance_scale:g}")
    name += f", {weights}" if weights not in ("", next(iter(run.averages()))) else ""
    plans = [(name, each) for each in sampler_settings(config, settings.steps)]
    plans += [(f"{name}, tuned times", tuned) for _, each in plans if (tuned := tuned_settings(pipeline, each))]
    if not (config.objective.on_diagonal or config.objective.endpoint_only):
        plans.append((f"{name}, its ODE by Heun", reference_settings(config)))
    seconds = training_seconds(run)
    return [
        _measured(pipeline, each, label, settings.samples, evaluator) | {"seconds": seconds} for label, each in plans
    ]


def _measured(pipeline: Pipeline, settings: SamplingSettings, method: str, count: int, evaluator: Evaluator) -> Row:
    """Figures of `count` samples, the time to draw all of them and one alone, and on what their times were tuned."""
    drawn, tuned = generate(pipeline, count, settings), settings.tuned(pipeline.step_times)
    return {
        "method": method,
        "nfe": round(drawn.nfe),
        **evaluator.measure(_within_range(pipeline, drawn.samples), drawn.labels),
        "seed": settings.seed,
        "sampling_seconds": drawn.seconds,
        "latency_ms": measure_latency(pipeline, settings),
        "guidance_scale": settings.guidance_scale,
        "device": str(best_device()),
        "tuned_on": tuned and tuned.source,
    }


def tuned_settings(pipeline: Pipeline, settings: SamplingSettings) -> SamplingSettings | None:
    """The same at the step times tuned for the model; None where it has none for them."""
    free = replace(settings, spacing="auto")
    return free if free.tuned(pipeline.step_times) else None


def reference_settings(config: RunConfig) -> SamplingSettings:
    """Heun's method at about `reference_steps` evaluations."""
    (own,) = sampler_settings(config, (max(1, (config.evaluation.reference_steps + 1) // 2),))
    return replace(own, sampler="heun", gamma=0.0)


def _within_range(pipeline: Pipeline, images: Tensor) -> Tensor:
    """Samples cut to the range of the data, where they have one."""
    bounds = pipeline.config.data_range
    return images if bounds is None else images.clamp(*bounds)


def measure_latency(pipeline: Pipeline, settings: SamplingSettings, repeats: int = 5) -> float:
    """Median milliseconds to draw one sample alone, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        generate(pipeline, 1, settings)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def training_seconds(run: RunFolder) -> float:
    """Seconds of training behind the newest checkpoint."""
    return float(read_state(run.last_checkpoint())["seconds"])


def write_figures(rows: list[Row], folder: Path) -> Path:
    """Store rows in figures.json beside those stored earlier; a row measured anew replaces its older self."""
    fresh = {tuple(row.get(key) for key in _IDENTITY) for row in rows}
    kept = [row for row in read_figures(folder) if tuple(row.get(key) for key in _IDENTITY) not in fresh]
    file = folder / FIGURES_FILE
    write_atomically(file, json.dumps([*rows, *kept], indent=2) + "\n")
    return file


def read_figures(folder: Path) -> list[Row]:
    """Rows stored earlier, or none; raises CheckpointError when the file is damaged."""
    file = folder / FIGURES_FILE
    advice = f"delete it, and run fewstep evaluate {folder} anew"
    rows = [_in_todays_names(row) for row in read_rows(file, _SHOWN, advice)]
    with reading(file, advice):
        for row in rows:
            if not all(isinstance(row[key], kind) for key, kind in _SHOWN.items()):
                raise ValueError(f"a method, distance or number of calls is none: {row['method']!r}")
    return rows


def _in_todays_names(row: Row) -> Row:
    """A row as rows are called now: those stored with "omega" for the guidance scale have it in the method's name."""
    if "omega" not in row:
        return row
    renamed = {"guidance_scale" if key == "omega" else key: value for key, value in row.items()}
    return renamed | {"method": str(row["method"]).replace(", omega ", ", guidance ")}


def format_table(rows: list[Row]) -> str:
    """Rows as aligned text, and what they rest on."""
    cells = [("method", "NFE", "Frechet", "accuracy", "precision", "recall", "ms/sample")]
    for row in rows:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        latency_ms = "" if row["latency_ms"] is None else f"{row['latency_ms']:.1f}"
        quality = (f"{row['frechet']:.2f}", accuracy, f"{row['precision']:.2f}", f"{row['recall']:.2f}")
        cells.append((row["method"], str(row["nfe"]), *quality, latency_ms))
    first = rows[0]
    notes = [f"Frechet distance in the features of {first['extractor']} to {first['reference']}; not FID."]
    if any(row.get("tuned_on") for row in rows):
        notes.append("Tuned times were chosen on half of these held-out samples: on the rest, see step_times.json.")
    return "\n".join([aligned(cells), *notes])
