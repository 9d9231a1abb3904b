"""Runs of one study compared by their learning curves: table, figure and page (`fewstep compare`).

The first run's method is the baseline; runs of two methods with the same seed are a pair.
"""

import json
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fewstep.evaluation.curve import measure_afterwards, measured_afterwards, unmeasured
from fewstep.evaluation.methods import Measure, Member, Points, check_distinct, find_runs, gather, read_curves
from fewstep.evaluation.metrics.curves import SHARES, MeanCurve, Speedup, mean_curve, speedup, targets_of, time_to
from fewstep.evaluation.report.comparison import Course, Panel, comparison_curves
from fewstep.evaluation.report.html import page, plot
from fewstep.evaluation.report.numbers import NOTHING, number, setting, tick
from fewstep.evaluation.report.run import PAGE_FILE, REPORT_FILE, STUDY_FILE
from fewstep.training import RunFolder
from fewstep.utils.files import write_atomically
from fewstep.utils.text import aligned

Cells = tuple[str, ...]
FIGURE_FILE, RECORD_FILE = "comparison.png", "comparison.json"
_TITLES = {"frechet": "Fréchet distance"}
_FACTS = 4  # figures beside the title of the page


@dataclass(frozen=True)
class Finding:
    """One method under one measure: its curves' mean, images to each target, and the speed-up over the baseline.

    last: mean over runs of their last values, None where none is finite. times: of each target, the geometric mean of
    images and how many runs never reached it, which count with all their images. speedup: None for the baseline, and
    where a seed in common or a target is lacking.
    """

    method: str
    runs: int
    last: float | None
    mean: MeanCurve
    times: tuple[tuple[float, int], ...]
    speedup: Speedup | None


@dataclass(frozen=True)
class Comparison:
    """One measure: share -> target of the baseline, and every method that was measured, the baseline first."""

    title: str
    measure: Measure
    targets: dict[float, float]
    findings: tuple[Finding, ...]


def compare(folders: Sequence[Path], out: Path, cache: Path | None = None) -> str:
    """Compare runs and return the table; the first run's method is the baseline.

    Runs without a learning curve have it measured now, at the checkpoints that they kept (`measure_afterwards`); cache:
    where their data's classifiers are kept.

    Writes comparison.json, .png and .html into `out`, and into every run a study.json that links its report to them.
    Raises CheckpointError for a folder that is no run, has no learning curve or a damaged one, ConfigError for fewer
    than two runs, runs on different data, measured differently, or twice the same.
    """
    runs = find_runs(folders)
    for run in runs:
        if not unmeasured(run):
            read_curves(run)  # what cannot be compared is said before anything is measured
    check_distinct(runs)
    said = measure_afterwards(runs, cache)
    members, differing = gather(runs)
    keys = {key for each in members for key in each.curves}
    ordered = sorted(keys, key=lambda key: (key[0] not in _TITLES, key[0], key[1] or 0))
    found = [compare_measure(members, key) for key in ordered]
    panels = []
    for each in found:
        courses = tuple(Course(one.method, **vars(one.mean)) for one in each.findings)
        panels.append(Panel(each.title, courses, tuple(each.targets.values())))
    most = max(len(each.targets) for each in found)
    tables, note = [_table(each, most) for each in found], explanation(members[0].method) + _afterwards(runs)
    write_atomically(out / FIGURE_FILE, comparison_curves(panels))
    write_atomically(out / RECORD_FILE, json.dumps(_record(members, differing, found), indent=2) + "\n")
    alt = f"Learning curves: {', '.join(panel.title for panel in panels)}"
    shown = page(
        "comparison.html",
        title=f"Comparison of {len(members)} runs",
        summary=_summary(runs[0], members),
        facts=_facts(found),
        curves=plot(lambda wide, dark: comparison_curves(panels, columns=wide, dark=dark), 3, alt),
        tables=tables,
        note=note,
        settings=("Seed", *differing),
        runs=[_entry(each, differing, out) for each in members],
    )
    write_atomically(out / PAGE_FILE, shown)
    for run in runs:
        _join_study(run, runs, out)
    between = ("",) * len(tables[0][0])
    lines = [line for table in tables for line in (*table, between)]
    return "\n".join([*said, aligned(lines), textwrap.fill(note, 118)])


def compare_measure(members: Sequence[Member], measure: Measure) -> Comparison:
    """Every method's curves under one measure; targets are those of the first member's method."""
    groups: dict[str, dict[int, Points]] = {each.method: {} for each in members}
    for each in members:
        if measure in each.curves:
            groups[each.method][each.seed] = each.curves[measure]
    baseline = groups[members[0].method]
    targets = targets_of(list(baseline.values()), SHARES) if baseline else {}
    findings = [
        _finding(method, curves, baseline, tuple(targets.values())) for method, curves in groups.items() if curves
    ]
    name, nfe = measure
    calls = "" if nfe is None else ", 1 network call" if nfe == 1 else f", {nfe} network calls"
    return Comparison(_TITLES.get(name, name) + calls, measure, targets, tuple(findings))


def _finding(
    method: str, curves: dict[int, Points], baseline: dict[int, Points], targets: tuple[float, ...]
) -> Finding:
    ends = [curve[-1][1] for curve in curves.values() if math.isfinite(curve[-1][1])]
    comparable = curves is not baseline and targets and set(curves) & set(baseline)
    return Finding(
        method=method,
        runs=len(curves),
        last=_mean(ends) if ends else None,
        mean=mean_curve(list(curves.values())),
        times=tuple(_mean_time(list(curves.values()), target) for target in targets),
        speedup=speedup(baseline, curves, targets) if comparable else None,
    )


def _mean_time(curves: Sequence[Points], target: float) -> tuple[float, int]:
    """Geometric mean of images to the target, and how many curves never reach it and count with their length."""
    times = [time_to(curve, target) for curve in curves]
    images = [curve[-1][0] if time is None else time for curve, time in zip(curves, times, strict=True)]
    return _mean(images), times.count(None)


def _mean(values: Sequence[float]) -> float:
    """Geometric where all are positive."""
    if min(values) > 0:
        return math.exp(math.fsum(math.log(value) for value in values) / len(values))
    return math.fsum(values) / len(values)


def _table(found: Comparison, columns: int) -> list[Cells]:
    """Heads and a row for each method of one measure, with room for so many targets."""
    targets = [f"to {number(value)} ({share:.0%})" for share, value in found.targets.items()]
    padding = [""] * (columns - len(targets))
    heads = (found.title, "runs", "last", *targets, *padding, "speed-up", "95% interval", "missed")
    return [heads, *(_cells(each, padding) for each in found.findings)]


def _cells(found: Finding, padding: list[str]) -> Cells:
    times = [("> " if missing else "") + tick(float(f"{images:.3g}")) for images, missing in found.times]
    gain, interval, missing = found.speedup, NOTHING, NOTHING
    if gain is not None:
        interval = NOTHING if gain.low is None or gain.high is None else f"{gain.low:.2f} to {gain.high:.2f}"
        missing = f"{gain.censored + gain.censored_baseline} of {len(gain.seeds) * len(gain.targets)}"
    ratio = NOTHING if gain is None else str(gain)
    return found.method, str(found.runs), number(found.last), *times, *padding, ratio, interval, missing


def explanation(baseline: str) -> str:
    """How to read the tables."""
    return (
        f"Targets: the values that every run of the baseline ({baseline}) keeps after "
        f"{', '.join(f'{share:.0%}' for share in SHARES)} of its images, each column with the images that the methods "
        "need to it. Speed-up: the baseline's images over the method's, geometric mean over targets and over the "
        "seeds that both have; 95% interval: percentile bootstrap over those seeds, too narrow where they are few. "
        "Missed: pairs of seed and target that are not reached; they count with all images of their run, which makes "
        "the ratio a bound (<: at most, >: at least). No figure: no seed in common, or nothing to reach."
    )


def _afterwards(runs: Sequence[RunFolder]) -> str:
    """Which curves were measured after the training, where some were."""
    late = [f"{run.root} ({count})" for run in runs if (count := measured_afterwards(run))]
    if not late:
        return ""
    return (
        f" Measured afterwards, at so many kept checkpoints: {', '.join(late)}; of what came before them nothing is "
        "known, and a target that the first of them reaches counts as reached there."
    )


def _summary(run: RunFolder, members: Sequence[Member]) -> str:
    data = run.data("name", "train")
    methods = list(dict.fromkeys(each.method for each in members))
    return (
        f"Runs on {data['train']} samples of {data['name']}: "
        + "; ".join(f"{method} ({sum(each.method == method for each in members)})" for method in methods)
        + f". The baseline is {methods[0]}. Lower values are better."
    )


def _facts(found: Sequence[Comparison]) -> tuple[tuple[str, str], ...]:
    gains = [(each.method, part.title, each.speedup) for part in found for each in part.findings]
    shown = [(f"Speed-up of {method}: {title}", f"{gain}×") for method, title, gain in gains if gain is not None]
    return tuple(shown[:_FACTS])


def _entry(member: Member, differing: Sequence[str], out: Path) -> tuple[str, str, Cells]:
    """The run's name, the address of its report or nothing, its seed and differing settings."""
    shown = (setting(member.settings.get(key)) for key in differing)
    report = member.run.root / REPORT_FILE
    address = quote(_relative(report, out)) if report.is_file() else ""
    return str(member.run.root), address, (str(member.seed), *shown)


def _record(members: Sequence[Member], differing: Sequence[str], found: Sequence[Comparison]) -> dict[str, Any]:
    """What comparison.json holds."""
    runs = [{"run": str(each.run.root), "method": each.method, "seed": each.seed} for each in members]
    measures = [
        {
            "measure": part.measure[0],
            "nfe": part.measure[1],
            "targets": [{"share": share, "value": value} for share, value in part.targets.items()],
            "methods": [asdict(each) for each in part.findings],
        }
        for part in found
    ]
    return {"baseline": members[0].method, "differing": list(differing), "runs": runs, "measures": measures}


def _join_study(run: RunFolder, runs: Sequence[RunFolder], out: Path) -> None:
    """Write study.json into a run: where the comparison and the study's other runs lie, relative to it."""
    study = {
        "comparison": _relative(out / PAGE_FILE, run.root),
        "runs": [_relative(other.root, run.root) for other in runs if other.root != run.root],
    }
    write_atomically(run.root / STUDY_FILE, json.dumps(study, indent=2) + "\n")


def _relative(target: Path, folder: Path) -> str:
    return Path(os.path.relpath(target.resolve(), folder.resolve())).as_posix()
