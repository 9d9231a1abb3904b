"""What a run shows: sample grids while it trains, and its report page."""

import os
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from fewstep.evaluation.actions import each_error, read_actions
from fewstep.evaluation.align import read_alignment, teacher_name
from fewstep.evaluation.evaluate import (
    method_name,
    method_of,
    reference_settings,
    sampler_settings,
    tuned_settings,
)
from fewstep.evaluation.figures import Row, read_figures
from fewstep.evaluation.report.neighbours import nearest_grid, real_grid
from fewstep.evaluation.report.numbers import finite, number
from fewstep.evaluation.report.page import Film, Grid, RunReport, write_report
from fewstep.evaluation.report.usage import usage
from fewstep.evaluation.report.verdict import policy_verdict, verdict
from fewstep.policies.figures import read_film, read_rollouts, read_strip
from fewstep.recipes.config import RunConfig
from fewstep.sampling.decode import Viewer
from fewstep.sampling.generate import generate
from fewstep.sampling.images import fitting_columns, save_grid
from fewstep.sampling.pipeline import Pipeline
from fewstep.training.flops import flops_words
from fewstep.training.run_folder import RunFolder
from fewstep.training.settings import Watcher
from fewstep.utils.device import best_device
from fewstep.utils.errors import FewstepError
from fewstep.utils.files import parse_json, reading, reading_line
from fewstep.utils.parts import kind_name, outside_files
from fewstep.utils.text import listed

REPORT_FILE = "report.html"
STUDY_FILE = "study.json"
PAGE_FILE = "comparison.html"
_DRAWN_LINES = 2000  # of a log: more are not seen
_DRAWN, _COLUMNS = 48, 8  # samples of a grid, and in a row of it
_LARGEST_FILM = 4 << 20  # bytes: a page holds all its films


def watcher(run: RunFolder, config: RunConfig, count: int = 40) -> Watcher:
    """Draws a grid of the averaged model at the first two step counts of the recipe: samples/step-N.png."""
    views: list[Viewer] = []

    def watch(pipeline: Pipeline, step: int) -> None:
        if not views:
            views.append(pipeline.preview())
        plans = sampler_settings(config, config.evaluation.steps[:2])
        rows = [generate(pipeline, count, settings).samples for settings in plans]
        samples, file = torch.cat(rows), run.samples / f"step-{step:08d}.png"
        images, columns = views[0].thumbnails(samples), fitting_columns(samples, 20)
        save_grid(images, file, columns=columns, data_range=views[0].data_range)

    return watch


def grids(run: RunFolder, view: Viewer, count: int = _DRAWN) -> tuple[tuple[Grid, Tensor], ...]:
    """Grids at the recipe's first three step counts, placed as tuned, and by the reference, from the same noise; each
    with its samples.
    """
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
    columns = fitting_columns(titled[0][1], _COLUMNS)
    return tuple((Grid(title, "", view.thumbnails(samples), columns), samples) for title, samples in titled)


def beside(run: RunFolder, view: Viewer, samples: Tensor, data_root: Path | None) -> tuple[tuple[Grid, ...], str]:
    """Real images, and the training images nearest to the samples, and what there is to say where they cannot be read.

    data_root: where the run's data lie now, if they were moved.
    """
    try:
        _, dataset = run.load_data(data_root)
        if tuple(dataset.train.shape) != tuple(samples.shape[1:]):
            return (), ""
        columns = fitting_columns(samples, _COLUMNS)
        real = real_grid(dataset, view, len(samples), columns)
        return (real, nearest_grid(samples[: 3 * columns], dataset, view, columns)), ""
    except FewstepError as error:
        return (), f"Real images are left out: {error}."


def baselines(run: RunFolder) -> tuple[RunFolder, ...]:
    """Runs kept inside the run's folder to be compared with it."""
    found = [RunFolder(path) for path in sorted(run.root.iterdir()) if path.is_dir()]
    return tuple(each for each in found if each.config_file.is_file() and each.checkpoints())


def report(
    run: RunFolder,
    title: str = "",
    autoencoder: Path | None = None,
    out: Path | None = None,
    data_root: Path | None = None,
) -> Path:
    """Write report.html: the verdict of the run's figures, samples beside real images, quality against NFE, how to load
    the model, and what its training was like; its baselines appear beside the run.

    Of a run without a checkpoint, what it logged, and why it ended where it diverged.

    title: the run's name when not given. autoencoder: where the one that decodes latents lies now, if it was moved.
    out: a folder for the page, where what `fewstep evaluate --out` has left is shown too. data_root: where the run's
    data lie now, if they were moved.
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
    drawn = () if view is None else grids(run, view)
    real, lacking = ((), "") if view is None else beside(run, view, drawn[0][1], data_root)
    found = RunReport(
        title=title or run.root.resolve().name,
        verdict=policy_verdict(episodes, name) if acts else verdict(rows, name),
        summary="\n\n".join((_summary(config, data), *_ending(run), *_paragraphs(pipeline))),
        facts=_policy_facts(episodes, errors, name) if acts else _facts(rows, name),
        grids=(*(grid for grid, _ in drawn), *real),
        note="Same noise and classes in every grid of samples. " * bool(drawn) + lacking,
        others=() if view is None else tuple(grid for r in others for grid, _ in grids(r, view)),
        usage=() if pipeline is None else usage_of(run, config, pipeline),
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
        traces=tuple((f"{row['method']}, {_calls(row['steps'])}", row["trace"]) for row in errors if "trace" in row),
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


def films(folder: Path, run: RunFolder) -> tuple[Film, ...]:
    """The pictures of the episode of a run that `fewstep rollout --film` drew into a folder, if it did."""
    pictures = read_strip(folder)
    if pictures is None:
        return ()
    title, note = f"{method_of(run)}, one episode", "From left to right, evenly spaced in time."
    return (Film(Grid(title, note, pictures, len(pictures)), read_film(folder, _LARGEST_FILM)),)


def usage_of(run: RunFolder, config: RunConfig, pipeline: Pipeline) -> tuple[str, str]:
    """Python and the command that use the run's model, at the fewest steps of its recipe above one, or at one."""
    counts = sorted(config.evaluation.steps)
    steps = next((count for count in counts if count > 1), counts[0])
    spec = pipeline.config.policy
    if spec is None:
        return usage(run.root, steps, False, outside_files(config))
    return usage(run.root, counts[0], True, outside_files(config), len(spec.observations.low))


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
        f"{kind_name(type(config.model.preconditioning))} preconditioning; recipe {config.recipe}."
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
        state, unit = each.state(), each.config().data.source.unit
        parameters = sum(p.numel() for p in each.model().flow_map.parameters())
        cost = (
            f"{state['seconds']:.0f} s of training, {state['images']:,} {unit}s in {state['step']:,} steps, "
            f"{state['images'] / max(state['seconds'], 1e-9):,.0f} {unit}s/s, {parameters:,} parameters"
        )
        lines.append((method_of(each), ", ".join((cost, *_machine(thinned_log(each))))))
    return tuple(lines)


def _machine(log: list[dict[str, Any]]) -> Iterator[str]:
    """What a log says of the device: FLOP/s, the wait for data and the peak of memory."""

    def of(key: str) -> list[float]:
        return [value for line in log if (value := finite(line, key)) is not None]

    found = {key: median(values) for key in ("flops_per_second", "utilisation") if (values := of(key))}
    if found:
        yield flops_words(found)
    if waits := of("data_wait"):
        yield f"{median(waits):.0%} of the time in wait for data"
    if peaks := of("peak_memory_mib"):
        yield f"peak memory {max(peaks):,.0f} MiB"
