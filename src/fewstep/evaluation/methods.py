"""The runs of a study: on one data set, sorted into methods, with their learning curves.

Runs that differ in nothing but the seed are replicates of one method.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.evaluation.curve import CURVE_FILE
from fewstep.evaluation.report.numbers import setting
from fewstep.training import RunFolder
from fewstep.utils.errors import CheckpointError, ConfigError
from fewstep.utils.files import LARGEST, read_lines, reading_line
from fewstep.utils.parts import kind_name
from fewstep.utils.serialization import differences, leaves, to_json
from fewstep.utils.text import quoted

Points = list[tuple[float, float]]
Measure = tuple[str, int | None]  # what a curve shows: its name, and the network calls of a sample or None

_MOST_NAMED = 2  # settings in a method's label, beyond which the recipe or the folder names it
_SEED = "training.seed"
_PASSIVE = {
    "recipe", _SEED, "training.log_images", "training.sample_images", "training.checkpoint_images", "training.keep",
    "evaluation.samples", "evaluation.steps", "evaluation.reference_steps", "evaluation.seed",
    "evaluation.curve_images", "evaluation.curve_steps", "evaluation.classes", "data.root",
}  # fmt: skip
"""Settings that make no other method: what is only named, logged, kept or measured, where data lie, and the seed."""


@dataclass(frozen=True)
class Member:
    """A run of the study: its settings by dotted name, its method's label, and its curves."""

    run: RunFolder
    settings: dict[str, Any]
    method: str
    curves: dict[Measure, Points]

    @property
    def seed(self) -> int:
        return int(self.settings[_SEED])


def find_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """The runs of these folders; raises as `compare` does unless they can be compared."""
    runs = [RunFolder(folder) for folder in folders]
    if len(runs) < 2:
        raise ConfigError(f"compare needs at least two runs, got {len(runs)}: fewstep compare RUN RUN ...")
    records: list[Any] = [run.record() for run in runs]
    for run in runs:
        run.data("name", "fingerprint", "train")
    first = records[0]
    for run, record in zip(runs[1:], records[1:], strict=True):
        if record["data"]["fingerprint"] != first["data"]["fingerprint"]:
            here, there = (f"{data['name']} ({data['fingerprint']})" for data in (first["data"], record["data"]))
            raise ConfigError(f"{runs[0].root} is a run on {here}, {run.root} on {there}: compare runs on one data set")
        own, other = (each.config().evaluation for each in (runs[0], run))
        if (own.curve_samples, own.classes) != (other.curve_samples, other.classes):
            raise ConfigError(
                f"{runs[0].root} measured its curve with {own.curve_samples} samples, {run.root} with "
                f"{other.curve_samples}, classes by {own.classes} and {other.classes}: distances depend on them; train "
                "with one --evaluation.curve-samples and --evaluation.classes"
            )
    return runs


def check_distinct(runs: Sequence[RunFolder]) -> None:
    """Raise ConfigError for two runs of one method and seed."""
    settings, labels, _ = _methods(runs)
    seen: dict[tuple[str, int], Path] = {}
    for run, own, label in zip(runs, settings, labels, strict=True):
        key = (label, int(own[_SEED]))
        if key in seen:
            raise ConfigError(
                f"{seen[key]} and {run.root} have the same settings and seed {key[1]}: give each run once, and "
                "replicates with other seeds"
            )
        seen[key] = run.root


def _methods(runs: Sequence[RunFolder]) -> tuple[list[dict[str, Any]], list[str], tuple[str, ...]]:
    """Settings and method of each run, and the settings in which methods differ."""
    settings = [_settings(run) for run in runs]
    differing = differing_settings(settings)
    return settings, method_labels([run.root for run in runs], settings, differing), differing


def read_curves(run: RunFolder) -> dict[Measure, Points]:
    """The curves in RUN/curve.jsonl by measure, images rising; a last line that is still being written is left out.

    Raises CheckpointError when there is none, or a line is damaged; ConfigError for a policy.
    """
    file = run.root / CURVE_FILE
    curves: dict[Measure, dict[float, float]] = {}
    for number, record in enumerate(read_lines(file), start=1):
        with reading_line(file, number):
            measure, images, value = _point(record)
        curves.setdefault(measure, {})[images] = value
    if not curves and run.config().data.source.of_actions:
        raise ConfigError(
            f"{run.root} holds a policy, which has no learning curve of samples: compare policies by their actions' "
            f"error, fewstep evaluate {quoted(run.root)}, or in their task, fewstep rollout {quoted(run.root)}"
        )
    if not curves:
        raise CheckpointError(
            f"{run.root} has no learning curve ({CURVE_FILE}), and kept no checkpoint to measure one at: train it with "
            "--evaluation.curve-images N, which measures every N images"
        )
    return {measure: sorted(points.items()) for measure, points in curves.items()}


def _point(line: dict[str, Any]) -> tuple[Measure, float, float]:
    """(measure, images, value) of a stored line, NaN for a value too large to be drawn, 0 for one too small.

    Raises what `reading` turns into one line when it is none.
    """
    nfe, images, value = line["nfe"], float(line["images"]), float(line["value"])
    if not 0 < images <= LARGEST:
        raise ValueError(f"images {images:g}")
    value = math.nan if not abs(value) <= LARGEST else value if abs(value) * LARGEST > 1 else 0.0
    return (str(line["measure"]), None if nfe is None else int(nfe)), images, value


def gather(runs: Sequence[RunFolder]) -> tuple[list[Member], tuple[str, ...]]:
    """The runs with their methods and curves, and the settings that make the methods; raises as those do."""
    check_distinct(runs)
    settings, labels, differing = _methods(runs)
    return [Member(*each, read_curves(each[0])) for each in zip(runs, settings, labels, strict=True)], differing


def _settings(run: RunFolder) -> dict[str, Any]:
    """The run's settings by dotted name; its teacher by the fingerprint of its weights, where that is stored."""
    teacher = run.record().get("teacher")
    return dict(leaves(to_json(run.config()))) | ({"teacher": teacher} if teacher else {})


def differing_settings(settings: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Names of the settings that make the methods; where a part has another type, the type stands for the part."""
    keys = {line.split(": ")[0] for other in settings[1:] for line in differences(dict(settings[0]), dict(other))}
    parts = [key.removesuffix("type") for key in keys if key.endswith(".type")]
    return tuple(
        sorted(key for key in keys - _PASSIVE if not any(key.startswith(p) and key != f"{p}type" for p in parts))
    )


def method_labels(folders: Sequence[Path], settings: Sequence[dict[str, Any]], differing: Sequence[str]) -> list[str]:
    """The method of each run: the settings that differ where they are few, else its recipe, its folder, or its path."""
    methods = [json.dumps([each.get(key) for key in differing]) for each in settings]
    first = {method: methods.index(method) for method in methods}
    named = [", ".join(_named(key, each, differing) for key in differing) for each in settings]
    candidates = [
        *([named] if 0 < len(differing) <= _MOST_NAMED else []),
        [str(each["recipe"]) for each in settings],
        [folder.name for folder in folders],
    ]
    for names in candidates:
        if len({names[i] for i in first.values()}) == len(first):
            return [names[first[method]] for method in methods]
    return [str(folders[first[method]]) for method in methods]


def _named(key: str, settings: dict[str, Any], differing: Sequence[str]) -> str:
    """'preconditioning euler' for model.preconditioning, 'objective CTM' for objective.type."""
    short = _last_part(key)
    shown = setting(settings.get(key))
    if shown.endswith("Config"):
        shown = kind_name(shown)
    alone = [_last_part(other) for other in differing].count(short) == 1
    return f"{short if alone else key} {shown}"


def _last_part(key: str) -> str:
    return key.removesuffix(".type").rpartition(".")[2]
