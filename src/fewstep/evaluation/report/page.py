"""One run as one HTML file: samples, figures, measurements, cost and settings, with nothing to load from elsewhere."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.evaluation.report.episodes import actions_figure, row_name, success_figure
from fewstep.evaluation.report.figures import loss_curves
from fewstep.evaluation.report.heatmap import alignment_heatmap
from fewstep.evaluation.report.html import Pairs, Plot, embed, page, plot
from fewstep.evaluation.report.numbers import finite, setting, tick, with_error
from fewstep.evaluation.report.quality import episode_tables, quality_parts
from fewstep.sampling.images import Range, image_grid, picture, png_bytes, to_uint8, visible_scale
from fewstep.utils.files import write_atomically
from fewstep.utils.serialization import JSON, leaves

Row = Mapping[str, object]


@dataclass(frozen=True)
class Grid:
    """Samples shown together: images (n, C, H, W), uint8 or values in the report's data range, `columns` to a row."""

    title: str
    note: str
    images: Tensor
    columns: int


@dataclass(frozen=True)
class Film:
    """Pictures of an episode side by side, and the film of it as the bytes of a GIF, None where there is none."""

    strip: Grid
    gif: bytes | None = None


@dataclass(frozen=True)
class RunReport:
    """What the page of one run shows; whatever is empty is left out.

    verdict: lines below the title. summary: plain text, paragraphs apart by an empty line. facts: headline figures,
    (label, value). grids: samples from the same noise and real images, in the order shown; note: on all of them.
    others: grids of its baselines. usage: Python and the command that use the model. logs: by name of the run, the
    records of its log. rows: of `Evaluator.measure`, nfe 0 for real data. cost: (label, value). settings: the run's
    nested JSON configuration. links: (text, address). data_range: the values that black and white stand for; None for
    each grid's own minimum and maximum. alignments: of `Alignment.row()`, students of one teacher to be compared.
    trajectories: of `TrajectoryAlignment.row()`. episodes: of a policy's rollouts (fewstep.policies.figures).
    actions: (method, calls, error, errors of each, samples) of held-out episodes. traces: (title, `episode_trace`).
    films: of its episodes.
    """

    title: str
    summary: str
    verdict: tuple[str, ...] = ()
    facts: Pairs = ()
    grids: tuple[Grid, ...] = ()
    note: str = ""
    others: tuple[Grid, ...] = ()
    usage: tuple[str, ...] = ()
    logs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    cost: Pairs = ()
    settings: dict[str, Any] = field(default_factory=dict)
    links: Pairs = ()
    data_range: Range | None = None
    alignments: tuple[dict[str, Any], ...] = ()
    trajectories: tuple[dict[str, Any], ...] = ()
    episodes: tuple[dict[str, Any], ...] = ()
    actions: tuple[tuple[str, ...], ...] = ()
    traces: tuple[tuple[str, dict[str, Any]], ...] = ()
    films: tuple[Film, ...] = ()


def write_report(report: RunReport, file: Path) -> Path:
    """Render the report into one file; raises CheckpointError when it cannot be written."""
    write_atomically(file, render(report))
    return file


def render(report: RunReport) -> str:
    """The page as HTML: no scripts, no addresses to load from, all text escaped."""
    drawn = {
        "grids": [_grid(grid, report.data_range) for grid in report.grids],
        "others": [_grid(grid, report.data_range) for grid in report.others],
        "columns": 2,
        "films": [_film(film) for film in report.films],
        "episodes": _episodes(report.episodes),
        "traces": [_trace(title, trace) for title, trace in report.traces],
        "quality": quality_parts(report.rows),
        "alignment": _alignment(report),
        "losses": _losses(report.logs),
        "settings": _settings(report.settings),
    }
    return page("run.html", **vars(report) | drawn)


def _grid(grid: Grid, data_range: Range | None) -> dict[str, str]:
    pixels = to_uint8(grid.images, data_range)
    scale = visible_scale(pixels)
    padding = max(2, scale)
    colours = image_grid(pixels, grid.columns, padding, scale)
    opacity = image_grid(torch.full_like(pixels, 255), grid.columns, padding, scale, background=0)[..., :1]
    channels = pixels.shape[1]
    shown = [grid.note, "" if channels in (1, 3) else f"first {1 if channels == 2 else 3} of {channels} channels"]
    note = "; ".join(text for text in shown if text)
    alt = f"{grid.title}: {len(pixels)} samples" + (f" ({note})" if note else "")
    image = embed(png_bytes(picture(torch.cat([colours, opacity], -1))))
    return {"title": grid.title, "note": note, "image": image, "alt": alt}


def _film(film: Film) -> dict[str, str]:
    moving = "" if film.gif is None else embed(film.gif, "gif")
    return _grid(film.strip, None) | {"moving": moving, "moving_alt": f"{film.strip.title}, as a film"}


def _episodes(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The tables, each with its figure."""

    def figure(table: Mapping[str, Any]) -> Plot:
        alt = f"Success in {table['task']}: {', '.join(row_name(row) for row in table['own'])}"
        return plot(lambda columns, dark: success_figure(table["own"], columns=columns, dark=dark), 2, alt)

    return [table | {"figure": figure(table)} for table in episode_tables(rows)]


def _trace(title: str, trace: Mapping[str, Any]) -> Plot:
    alt = f"Actions of a held-out episode, done and answered: {title}"
    return plot(lambda columns, dark: actions_figure(trace, columns=columns, dark=dark), 2, alt)


def _alignment(report: RunReport) -> dict[str, Any] | None:
    errors = [value for record in report.alignments for row in record["rmse"] for value in row]
    if not any(value is not None and 0 < value < math.inf for value in errors):
        return None
    records, rows = report.alignments, report.trajectories
    alt = f"Error of jumps from t to s against the teacher: {', '.join(str(record['method']) for record in records)}"
    steps = sorted({int(n) for row in rows if (n := finite(row, "steps")) is not None})
    return {
        "figure": plot(lambda columns, dark: alignment_heatmap(records, columns=columns, dark=dark), 2, alt),
        "samples": " or ".join(f"{n:,}" for n in sorted({record["samples"] for record in records})),
        "walk_heads": ["Samples in", *(f"{n} step{'s' if n > 1 else ''}" for n in steps)],
        "walks": _walks(rows, steps),
        "stops": _stops(rows),
    }


def _walks(rows: Sequence[Row], steps: Sequence[int]) -> list[list[str]]:
    """Errors of samples by their number of steps, a line for each method."""
    lines = []
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        own = {finite(row, "steps"): row for row in rows if str(row["method"]) == method}
        shown = (with_error(finite(own.get(n, {}), "rmse"), finite(own.get(n, {}), "stderr")) for n in steps)
        lines.append([method, *shown])
    return lines


def _stops(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Errors where the samples of several steps stop on their way; rows stored without them are left out."""
    lines = []
    for row in rows:
        if len(row.get("stops", ())) > 1:
            stops = zip(row["times"][1:], row["stops"], row["stops_stderr"], strict=True)
            cells = "; ".join(f"{with_error(value, error)} at {tick(time)}" for time, value, error in stops)
            lines.append((f"{row['method']}, {row['steps']} steps", cells))
    return lines


def _losses(given: Mapping[str, list[dict[str, Any]]]) -> Plot | None:
    logs = {name: log for name, log in given.items() if any(finite(record, "loss") is not None for record in log)}
    alt = f"Loss, gradient norm and learning rate against images seen: {', '.join(logs)}"
    return plot(lambda columns, dark: loss_curves(logs, columns=columns, dark=dark), 2, alt) if logs else None


def _settings(settings: dict[str, JSON]) -> list[list[tuple[str, str]]]:
    """The configuration as (dotted key, value), in groups by the first two parts of the key.

    The `type` of a part stands under the part's own key.
    """
    lines = [(key.removesuffix(".type"), setting(value)) for key, value in leaves(settings)]
    return [list(group) for _, group in groupby(lines, key=lambda line: line[0].split(".")[:2])]
