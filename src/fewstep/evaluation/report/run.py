"""What a run shows: sample grids while it trains, and its report page."""

import os
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from fewstep.evaluation.actions import each_error, read_actions
from fewstep.evaluation.align import read_alignment, teacher_name
from fewstep.evaluation.evaluate import (
    best_device,
    method_name,
    method_of,
    reference_settings,
    sampler_settings,
    tuned_settings,
)
from fewstep.evaluation.figures import Row, read_figures
from fewstep.evaluation.report.numbers import finite, number
from fewstep.evaluation.report.page import Grid, RunReport, write_report
from fewstep.policies.figures import read_rollouts, read_strip
from fewstep.recipes.config import RunConfig
from fewstep.sampling.decode import Viewer
from fewstep.sampling.generate import generate
from fewstep.sampling.images import save_grid
from fewstep.sampling.pipeline import Pipeline
from fewstep.training.run_folder import RunFolder
from fewstep.training.settings import Watcher
from fewstep.utils.files import parse_json, reading, reading_line
from fewstep.utils.parts import kind_name
from fewstep.utils.text import listed

REPORT_FILE = "report.html"
STUDY_FILE = "study.json"
PAGE_FILE = "comparison.html"
_DRAWN_LINES = 2000  # of a log: more are not seen


def watcher(run: RunFolder, config: RunConfig, count: int = 40) -> Watcher:
    """Draws a grid of the averaged model at the first two step counts of the recipe: samples/step-N.png."""
    views: list[Viewer] = []

    def watch(pipeline: Pipeline, step: int) -> None:
        if not views:
            views.append(pipeline.preview())
        plans = sampler_settings(config, config.evaluation.steps[:2])
        rows = [generate(pipeline, count, settings).samples for settings in plans]
        images, file = views[0].thumbnails(torch.cat(rows)), run.samples / f"step-{step:08d}.png"
        save_grid(images, file, columns=20, data_range=views[0].data_range)

    return watch


def grids(run: RunFolder, view: Viewer, count: int = 40) -> tuple[Grid, ...]:
    """Grids at the recipe's first three step counts, placed as tuned, and by the reference, from the same noise."""
    config, pipeline = run.config(), run.pipeline().to(best_device())
    name = method_of(run)
    plans = []
    for settings in sampler_settings(config, config.evaluation.steps[:3]):
        tuned = tuned_settings(pipeline, settings)
        plans.append((f"{name}, tuned times", tuned) if tuned else (name, settings))
    if not config.objective.endpoint_only:
        plans.append((f"{name}, its ODE by Heun", reference_settings(config)))
    drawn = [(label, generate(pipeline, count, settings)) for label, settings in plans]
    titled = [(f"{label}, {_calls(round(found.nfe))}", found.samples) for label, found in drawn]
    note = "Same noise and classes in every grid."
    return tuple(Grid(title, note, view.thumbnails(samples), 10) for title, samples in titled)


def baselines(run: RunFolder) -> tuple[RunFolder, ...]:
    """Runs kept inside the run's folder to be compared with it."""
    found = [RunFolder(path) for path in sorted(run.root.iterdir()) if path.is_dir()]
    return tuple(each for each in found if each.config_file.is_file() and each.checkpoints())


def report(run: RunFolder, title: str = "", autoencoder: Path | None = None, out: Path | None = None) -> Path:
    """Write report.html: samples, curves, quality against NFE, cost, settings; its baselines appear beside the run.

    Of a run without a checkpoint, what it logged, and why it ended where it diverged.

    autoencoder: where the one that decodes latents lies now, if it was moved. out: a folder for the page, where what
    `fewstep evaluate --out` has left is shown too.
    """
    data = run.data("name", "shape", "classes", "train")
    others, folder = baselines(run), out or run.root
    config, record = run.config(), run.record()
    pipeline = run.pipeline() if run.checkpoints() else None
    acts = config.data.source.of_actions if pipeline is None else pipeline.config.policy is not None
    view = None if acts or pipeline is None else pipeline.to(best_device()).viewer(autoencoder)
    name = method_of(run)
    owners = {folder: run, run.root: run} | {other.root: other for other in others}
    rows, aligned = figures(owners), [found for place in owners for found in read_alignment(place)]
    episodes = [row for place in owners for row in read_rollouts(place)]
    errors = [row for place in owners for row in read_actions(place)]
    logs = {method_of(r): thinned_log(r) for r in (run, *others)}
    found = RunReport(
        title=title or f"fewstep: {config.recipe}",
        summary="\n\n".join((_summary(config, data), *_ending(run), *_paragraphs(pipeline))),
        facts=_policy_facts(episodes, errors, name) if acts else _facts(rows, name),
        grids=() if view is None else tuple(grid for r in (run, *others) for grid in grids(r, view)),
        logs=logs,
        rows=rows,
        cost=_cost(run, others),
        settings=record,
        links=study_links(run, folder),
        data_range=None if view is None else view.data_range,
        alignments=tuple(each["jumps"] for each in aligned),
        trajectories=tuple(row for each in aligned for row in each["trajectories"]),
        episodes=tuple(episodes),
        actions=tuple(
            (row["method"], str(row["steps"]), number(row["error"]), each_error(row), f"{row['samples']:,}")
            for row in errors
        ),
        films=tuple(film for place, owner in owners.items() for film in films(place, owner)),
    )
    return write_report(found, folder / REPORT_FILE)


def thinned_log(run: RunFolder) -> list[dict[str, Any]]:
    """The log's records; where it has more than 2,000 lines so many, evenly spaced. Raises as `RunFolder.read_log`."""
    if not run.log_file.is_file():
        return []
    with reading(run.log_file, "delete it"):
        lines = run.log_file.read_bytes().split(b"\n")[:-1]
    found = []
    for k in range(min(len(lines), _DRAWN_LINES)):
        number = (k + 1) * len(lines) // min(len(lines), _DRAWN_LINES)
        with reading_line(run.log_file, number):
            record = parse_json(lines[number - 1])
            if type(record["step"]) is not int or record["step"] < 1:
                raise ValueError(f"{record['step']!r} is no step")
        found.append(record)
    return found


def figures(places: Iterable[Path]) -> list[Row]:
    """Rows of the figures in folders; of those of one method and number of calls the first folder's."""
    rows: list[Row] = []
    for place in places:
        known = {(row["method"], row["nfe"]) for row in rows}
        rows += [row for row in read_figures(place) if (row["method"], row["nfe"]) not in known]
    return rows


def films(folder: Path, run: RunFolder) -> tuple[Grid, ...]:
    """The pictures of the episode of a run that `fewstep rollout --film` drew into a folder, if it did."""
    pictures = read_strip(folder)
    if pictures is None:
        return ()
    title, note = f"{method_of(run)}, one episode", "From left to right, evenly spaced in time."
    return (Grid(title, note, pictures, len(pictures)),)


def study_links(run: RunFolder, folder: Path) -> tuple[tuple[str, str], ...]:
    """Links from a folder to the comparison that the run is part of, and to the reports of its other runs, if any.

    Raises CheckpointError when study.json, which `fewstep compare` writes, is damaged.
    """
    file = run.root / STUDY_FILE
    if not file.is_file():
        return ()
    with reading(file, "delete it, or run fewstep compare anew"):
        study = parse_json(file.read_bytes())
        pages = [("Comparison", Path(str(study["comparison"])))]
        pages += [(Path(name).name, Path(name) / REPORT_FILE) for name in map(str, study["runs"])]
        there = [
            (text, run.root / page)
            for text, page in pages
            if not page.is_absolute() and page.name in (REPORT_FILE, PAGE_FILE) and (run.root / page).is_file()
        ]
    return tuple((text, quote(Path(os.path.relpath(page, folder)).as_posix())) for text, page in there)


def _summary(config: RunConfig, data: Mapping[str, Any]) -> str:
    distilled = config.objective.needs_teacher
    origin = f"distilled from {teacher_name(config)}" if distilled else "trained from scratch"
    return (
        f"{method_name(config, data)}, {origin} on {data['train']} samples of {data['name']} "
        f"({'x'.join(str(n) for n in data['shape'])}), {kind_name(type(config.model.path))} path, "
        f"{kind_name(type(config.model.preconditioning))} preconditioning."
    )


def _ending(run: RunFolder) -> Iterator[str]:
    """Why the training ended, where it diverged, and what is missing without a checkpoint."""
    if reason := run.divergence:
        yield f"The training diverged: {reason}."
    if not run.checkpoints():
        yield "There is no checkpoint, and so no samples: what the run logged is below."


def _paragraphs(pipeline: Pipeline | None) -> Iterator[str]:
    """The classes, with numbers where names are others, and a paragraph on each number of steps with tuned times."""
    if pipeline is None:
        return
    if names := pipeline.config.class_names:
        plain = names == tuple(map(str, range(len(names))))  # then a number and its name would say the same twice
        shown = names if plain else [f"{number} {name}" for number, name in enumerate(names)]
        yield f"Classes: {listed(list(shown), 40)}."
    for each in pipeline.step_times:
        times = " ".join(f"{t:.4g}" for t in each.times)
        yield f"{each.steps} steps are taken at the times {times}, tuned on {each.source}."


def _facts(rows: list[Row], method: str) -> tuple[tuple[str, str], ...]:
    own = [row for row in rows if row["method"] == method][:3]
    real = [row for row in rows if row["nfe"] == 0]
    cards = [(f"Frechet distance, {_calls(row['nfe'])}", f"{row['frechet']:.2f}") for row in own]
    return tuple(cards + [("real training data", f"{row['frechet']:.2f}") for row in real])


def _policy_facts(episodes: list[Row], errors: list[Row], method: str) -> tuple[tuple[str, str], ...]:
    stored = [row for row in episodes if row["method"] == method and row["steps"]]
    setting = itemgetter("task", "first_seed", "seed", "episodes")
    rows = sorted((r for r in stored if setting(r) == setting(stored[-1])), key=lambda row: int(row["steps"]))
    cards = [(f"Success, {_calls(row['steps'])}", f"{row['successes']} of {row['episodes']}") for row in rows[:3]]
    for row in rows[:1]:
        cards.append((f"Time per decision, {_calls(row['steps'])}", f"{number(finite(row, 'latency_ms'))} ms"))
    for row in [row for row in errors if row["method"] == method][-1:]:
        cards.append((f"Error of actions held out, {_calls(row['steps'])}", number(row["error"])))
    return tuple(cards)


def _calls(nfe: int) -> str:
    return "1 network call" if nfe == 1 else f"{nfe} network calls"


def _cost(run: RunFolder, others: tuple[RunFolder, ...]) -> tuple[tuple[str, str], ...]:
    lines = []
    for each in (run, *others):
        if not each.checkpoints():
            continue
        state = each.state()
        parameters = sum(p.numel() for p in each.model().flow_map.parameters())
        cost = (
            f"{state['seconds']:.0f} s of training, {state['images']:,} images in {state['step']:,} steps, "
            f"{state['images'] / max(state['seconds'], 1e-9):,.0f} images/s, {parameters:,} parameters"
        )
        peak = max((finite(line, "peak_memory_mib") or 0.0 for line in thinned_log(each)), default=0.0)
        lines.append((method_of(each), cost + (f", peak memory {peak:,.0f} MiB" if peak else "")))
    return tuple(lines)
