"""Learning curves: distances measured while a run trains, kept in RUN/curve.jsonl, which `fewstep compare` reads."""

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.data.base import Dataset
from fewstep.evaluation.align import with_labels
from fewstep.evaluation.evaluate import build_evaluator, draw_features, sampler_settings, too_few
from fewstep.evaluation.metrics.fidelity import frechet_distance
from fewstep.evaluation.metrics.measure import Evaluator
from fewstep.recipes.config import RunConfig
from fewstep.sampling.pipeline import Pipeline
from fewstep.training.checkpoint import load_checkpoint_pipeline, read_state, step_of
from fewstep.training.run_folder import RunFolder
from fewstep.training.settings import Watcher
from fewstep.utils.device import best_device
from fewstep.utils.errors import DataError, FewstepWarning
from fewstep.utils.files import parse_json, read_lines, reading_line, write_atomically

CURVE_FILE = "curve.jsonl"
_AFTERWARDS = "afterwards"


def curve_watcher(run: RunFolder, config: RunConfig, dataset: Dataset, cache: Path | None) -> Watcher:
    """Appends points of the learning curve to RUN/curve.jsonl.

    Each point is the Frechet distance of the averaged model's samples, by the run's own sampler at `curve_steps`.
    """
    settings = config.evaluation
    evaluators: list[Evaluator] = []
    if settings.curve_images:  # what the data lack is said before the training
        if line := too_few(dataset):
            raise DataError(f"{line}; or train without a learning curve, --evaluation.curve-images 0")
        if dataset.latents or dataset.policy:
            evaluators.append(build_evaluator(dataset, cache))

    def watch(pipeline: Pipeline, step: int) -> None:
        if not evaluators:  # at the first point: its classifier may have to be trained
            evaluators.append(build_evaluator(with_labels(config.data, dataset), cache))
        at = {"images": step * config.training.batch_size, "step": step, "seconds": _seconds_at(run, step)}
        write_curve(run, [at | point for point in _points(pipeline, config, evaluators[0])])

    return watch


def _points(pipeline: Pipeline, config: RunConfig, evaluator: Evaluator) -> list[dict[str, Any]]:
    """The distances of one model at the run's `curve_steps`."""
    settings = config.evaluation
    asked = evaluator.asked(pipeline.flow_map, settings.curve_samples, settings)
    points: list[dict[str, Any]] = []
    for each in sampler_settings(config, settings.curve_steps):
        drawn, features = draw_features(pipeline, settings.curve_samples, each, evaluator.extractor, asked)
        sound = bool(features.isfinite().all())  # a model may break down and recover; its point reaches nothing
        value = frechet_distance(features, evaluator.features) if sound else math.nan
        points.append({"measure": "frechet", "nfe": round(drawn.nfe), "value": value})
    return points


def unmeasured(run: RunFolder) -> list[Path]:
    """Whole checkpoints beyond the curve of a run that measured none while it trained, oldest first."""
    lines = read_lines(run.root / CURVE_FILE)
    if run.config().data.source.of_actions or not all(line.get(_AFTERWARDS) for line in lines):
        return []
    last = max((int(line.get("step", 0)) for line in lines), default=0)
    return [folder for folder in run.checkpoints() if step_of(folder) > last]


def measure_afterwards(runs: Sequence[RunFolder], cache: Path | None) -> list[str]:
    """Measure the curves of runs on the same data that have none, at the checkpoints that they kept; what was done, a
    line for each of them.

    A point is what `curve_watcher` would have measured there: the first average's samples. Raises what `load_data`
    raises.
    """
    said: list[str] = []
    evaluator: Evaluator | None = None
    for run in runs:
        config, found = run.config(), unmeasured(run)
        if found and evaluator is None:
            data, dataset = run.load_data()
            evaluator = build_evaluator(with_labels(data, dataset), cache)
        for folder in found:
            assert evaluator is not None
            state, pipeline = read_state(folder), load_checkpoint_pipeline(folder).to(best_device())
            at = {key: state[key] for key in ("images", "step", "seconds")} | {_AFTERWARDS: True}
            write_curve(run, [at | point for point in _points(pipeline, config, evaluator)])
        if found:
            said.append(f"{run.root}: no learning curve was asked for; measured now at {_kept(found)}")
    return said


def _kept(folders: Sequence[Path]) -> str:
    steps = ", ".join(f"{step_of(folder):,}" for folder in folders)
    if len(folders) == 1:
        return f"step {steps}, the one checkpoint that it kept: one point (--training.keep keeps more)"
    return f"the {len(folders)} checkpoints that it kept, of steps {steps}"


def measured_afterwards(run: RunFolder) -> int:
    """At how many steps the curve of a run was measured after its training; 0 for one measured meanwhile."""
    return len({line.get("step") for line in read_lines(run.root / CURVE_FILE) if line.get(_AFTERWARDS)})


def write_curve(run: RunFolder, points: list[dict[str, Any]]) -> None:
    """Add points of one step to curve.jsonl; what an earlier start of the run wrote of it, or beyond it, goes.

    A line that cannot be read is left out, with a FewstepWarning that names it, but for the last, which a stop may cut.
    """
    file, step = run.root / CURVE_FILE, points[0]["step"]
    measures = {point["measure"] for point in points}
    kept: list[dict[str, Any]] = []
    lines = file.read_bytes().splitlines() if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            found = parse_json(line)
            if found["step"] < step or (found["step"] == step and found["measure"] not in measures):
                kept.append(found)
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                warnings.warn(f"{file}, line {number} cannot be read: left out", FewstepWarning, stacklevel=2)
    write_atomically(file, "".join(json.dumps(point) + "\n" for point in [*kept, *points]))


def _seconds_at(run: RunFolder, step: int) -> float | None:
    """Training time behind a step, from the log's last line at its pace; None before there is one."""
    log = run.read_log()
    with reading_line(run.log_file, len(log)):
        return round(log[-1]["seconds"] * step / log[-1]["step"], 3) if log else None
