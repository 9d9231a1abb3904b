"""One run as one HTML file: samples, figures, measurements, cost and settings, with nothing to load from elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.evaluation.report.episodes import episode_section
from fewstep.evaluation.report.figures import loss_curves, quality_curves
from fewstep.evaluation.report.heatmap import alignment_heatmap
from fewstep.evaluation.report.html import Pairs, document, embed, header, plot
from fewstep.evaluation.report.numbers import NOTHING, count, finite, number, tick, with_error
from fewstep.sampling.images import Range, image_grid, picture, png_bytes, to_uint8, visible_scale
from fewstep.utils.files import write_atomically

Row = Mapping[str, object]


@dataclass(frozen=True)
class Grid:
    """Samples shown together: images (n, C, H, W), uint8 or values in the report's data range, `columns` to a row."""

    title: str
    note: str
    images: Tensor
    columns: int


@dataclass(frozen=True)
class RunReport:
    """What the page of one run shows; whatever is empty is left out.

    summary: plain text, paragraphs apart by an empty line. facts: headline figures, (label, value). grids: samples from
    the same noise, in the order shown. logs: by name of the run, the records of its log. rows: of `Measurement.row()`,
    nfe 0 for real data. cost: (label, value). settings: the run's nested JSON configuration. links: (text, address).
    data_range: the values that black and white stand for; None for each grid's own minimum and maximum. alignments: of
    `Alignment.row()`, students of one teacher to be compared. trajectories: of `TrajectoryAlignment.row()`. episodes:
    of a policy's rollouts (fewstep.policies.figures). films: pictures of its episodes, one after the other.
    """

    title: str
    summary: str
    facts: Pairs = ()
    grids: tuple[Grid, ...] = ()
    logs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    cost: Pairs = ()
    settings: dict[str, Any] = field(default_factory=dict)
    links: Pairs = ()
    data_range: Range | None = None
    alignments: tuple[dict[str, Any], ...] = ()
    trajectories: tuple[dict[str, Any], ...] = ()
    episodes: tuple[dict[str, Any], ...] = ()
    films: tuple[Grid, ...] = ()


def write_report(report: RunReport, file: Path) -> Path:
    """Render the report into one file; raises CheckpointError when it cannot be written."""
    write_atomically(file, render(report))
    return file


def render(report: RunReport) -> str:
    """The page as HTML: no scripts, no addresses to load from, all text escaped."""
    sections = (_samples, _films, _episodes, _quality, _alignment, _training, _cost, _settings)
    body = [header(report.title, report.summary, report.facts, report.links)]
    body += [part for section in sections if (part := section(report))]
    return document(report.title, "\n".join(body))


def _samples(report: RunReport) -> str:
    if not report.grids:
        return ""
    widest = max(grid.columns for grid in report.grids)
    beside = 2 if widest > 12 else next((n for n in (4, 3, 2) if len(report.grids) % n == 0), 3)
    figures = "\n".join(_grid(grid, report.data_range) for grid in report.grids)
    return (
        f'<section>\n<h2>Samples</h2>\n<div class="grids{" wide" if widest > 8 else ""}" '
        f'style="--columns: {min(beside, len(report.grids))}">\n{figures}\n</div>\n</section>'
    )


def _films(report: RunReport) -> str:
    """Each film over the whole width: its pictures are to be read from left to right."""
    if not report.films:
        return ""
    figures = "\n".join(_grid(film, None) for film in report.films)
    return f'<section>\n<h2>Episodes</h2>\n<div class="grids wide" style="--columns: 1">\n{figures}\n</div>\n</section>'


def _episodes(report: RunReport) -> str:
    return episode_section(report.episodes)


def _grid(grid: Grid, data_range: Range | None) -> str:
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
    caption = f"<strong>{escape(grid.title)}</strong>" + (f"<span>{escape(note)}</span>" if note else "")
    return f'<figure><figcaption>{caption}</figcaption><img src="{image}" alt="{escape(alt)}"></figure>'


def _quality(report: RunReport) -> str:
    """Figure and table of each extractor apart: distances between different features do not compare."""
    if not report.rows:
        return ""
    extractors = dict.fromkeys(str(row["extractor"]) for row in report.rows)
    parts = [_of_extractor(name, [row for row in report.rows if str(row["extractor"]) == name]) for name in extractors]
    return "<section>\n<h2>Quality against network calls</h2>\n" + "\n".join(parts) + "\n</section>"


def _of_extractor(extractor: str, rows: Sequence[Row]) -> str:
    sampled = [row for row in rows if finite(row, "nfe") != 0]
    figure = ""
    if any(finite(row, key) is not None for row in rows for key in ("frechet", "accuracy", "precision", "recall")):
        methods = ", ".join(dict.fromkeys(str(row["method"]) for row in sampled))
        alt = f"Fréchet distance with features {extractor} against network calls: {methods}"
        figure = plot(
            lambda columns, dark: quality_curves(rows, columns=columns, dark=dark), 3, alt, _provenance(extractor, rows)
        )
    return figure + _table(rows)


def _provenance(extractor: str, rows: Sequence[Row]) -> str:
    """What the figures were measured with, and whether they may be called FID."""
    counts = sorted({int(n) for row in rows if finite(row, "nfe") != 0 and (n := finite(row, "samples")) is not None})
    samples = " or ".join(f"{n:,}" for n in counts)
    references = " or ".join(dict.fromkeys(escape(str(row["reference"])) for row in rows))
    if extractor.startswith("inception"):
        meaning = "These are Inception features: the distance is an FID for this number of samples and this reference."
    else:
        meaning = "This is not FID, which uses an Inception network: compare it only with figures of the same features."
    return (
        f"Features: <code>{escape(extractor)}</code>. "
        + (f"Samples: {samples} for each point. " if samples else "")
        + f"Reference: {references}. Lower Fréchet and kernel distances are better; "
        + f"so are higher precision, recall and accuracy. {meaning}"
    )


def _table(rows: Sequence[Row]) -> str:
    columns = _columns(rows)
    best = _best_at_equal_calls(rows)
    ordered = sorted(rows, key=lambda row: finite(row, "nfe") == 0)
    groups = [list(group) for _, group in groupby(ordered, key=lambda row: (row["method"], finite(row, "nfe") == 0))]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("Method", *columns))
    bodies = "\n".join(_table_group(group, columns, best) for group in groups)
    note = '<p class="note">Heavier type: the lowest Fréchet distance where methods share a number of calls.</p>\n'
    return (
        f'<div class="scroll card"><table class="figures">\n<thead><tr>{head}</tr></thead>\n{bodies}\n</table></div>\n'
        + (note if best else "")
    )


def _table_group(group: Sequence[Row], columns: Mapping[str, Callable[[Row], str]], best: frozenset[int]) -> str:
    """Consecutive rows of one method under one row heading."""
    lines = []
    for i, row in enumerate(group):
        name = f'<th scope="rowgroup" rowspan="{len(group)}">{escape(str(row["method"]))}</th>' if i == 0 else ""
        cells = [
            f'<td class="best">{escape(show(row))}</td>'
            if title == "Fréchet" and id(row) in best
            else f"<td>{escape(show(row))}</td>"
            for title, show in columns.items()
        ]
        lines.append(f"<tr>{name}{''.join(cells)}</tr>")
    kind = ' class="real"' if finite(group[0], "nfe") == 0 else ""
    return f"<tbody{kind}>" + "\n".join(lines) + "</tbody>"


def _columns(rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    """Headings and how to show a row under each; what no row has, or all have alike, is left to the caption."""
    columns: dict[str, Callable[[Row], str]] = {
        "NFE": lambda row: count(finite(row, "nfe") or None),
        "Fréchet": lambda row: number(finite(row, "frechet")),
        "Kernel distance": lambda row: with_error(finite(row, "kernel"), finite(row, "kernel_error")),
        "Precision": lambda row: number(finite(row, "precision")),
        "Recall": lambda row: number(finite(row, "recall")),
    }
    if any(finite(row, "accuracy") is not None for row in rows):
        columns["Accuracy"] = lambda row: _percent(finite(row, "accuracy"))
    if any(finite(row, "latency_ms") is not None for row in rows):
        columns["Latency (ms)"] = lambda row: number(finite(row, "latency_ms"))
    if len({row["samples"] for row in rows}) > 1:
        columns["Samples"] = lambda row: count(finite(row, "samples"))
    if len({row["reference"] for row in rows}) > 1:
        columns["Reference"] = lambda row: str(row["reference"])
    return columns


def _best_at_equal_calls(rows: Sequence[Row]) -> frozenset[int]:
    """Identities of the rows with the lowest Fréchet distance among several methods with the same, positive NFE."""
    best = set()
    for nfe in {finite(row, "nfe") for row in rows} - {0.0, None}:
        rivals = [
            (f, id(row)) for row in rows if finite(row, "nfe") == nfe and (f := finite(row, "frechet")) is not None
        ]
        if len(rivals) > 1:
            best.add(min(rivals)[1])
    return frozenset(best)


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.1%}"


def _alignment(report: RunReport) -> str:
    errors = [value for record in report.alignments for row in record["rmse"] for value in row]
    if not any(value is not None and 0 < value < math.inf for value in errors):
        return ""
    records = report.alignments
    alt = f"Error of jumps from t to s against the teacher: {', '.join(str(record['method']) for record in records)}"
    samples = " or ".join(f"{n:,}" for n in sorted({record["samples"] for record in records}))
    caption = (
        "How far jumps from t (down the side, noise on top) to s (along the foot) end from the teacher's ODE: "
        f"root mean square per element over {samples} noised samples, on one logarithmic scale. Lower is better."
    )
    figure = plot(lambda columns, dark: alignment_heatmap(records, columns=columns, dark=dark), 2, alt, caption)
    tables = _walks(report.trajectories) + _stops(report.trajectories)
    return f"<section>\n<h2>Alignment with the teacher</h2>\n{figure}{tables}</section>"


def _walks(rows: Sequence[Row]) -> str:
    """Errors of samples by their number of steps, a row for each method."""
    if not rows:
        return ""
    steps = sorted({int(each) for row in rows if (each := finite(row, "steps")) is not None})
    heads = "".join(f'<th scope="col">{n} step{"s" if n > 1 else ""}</th>' for n in steps)
    lines = []
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        own = {finite(row, "steps"): row for row in rows if str(row["method"]) == method}
        shown = (with_error(finite(own.get(n, {}), "rmse"), finite(own.get(n, {}), "stderr")) for n in steps)
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in shown)
        lines.append(f'<tr><th scope="row">{escape(method)}</th>{cells}</tr>')
    return (
        '<div class="scroll card"><table class="figures">\n<thead><tr><th scope="col">Samples in</th>'
        f"{heads}</tr></thead>\n<tbody>{''.join(lines)}</tbody>\n</table></div>\n"
        '<p class="note">How far samples end from the teacher\'s ODE from the same noise, measured likewise.</p>\n'
    )


def _stops(rows: Sequence[dict[str, Any]]) -> str:
    """Errors where the samples of several steps stop on their way; rows stored without them are left out."""
    shown = [row for row in rows if len(row.get("stops", ())) > 1]
    if not shown:
        return ""
    lines = []
    for row in shown:
        stops = zip(row["times"][1:], row["stops"], row["stops_stderr"], strict=True)
        cells = "; ".join(f"{with_error(value, error)} at {tick(time)}" for time, value, error in stops)
        name = f"{row['method']}, {row['steps']} steps"
        lines.append(f'<tr><th scope="row">{escape(name)}</th><td>{escape(cells)}</td></tr>')
    return (
        '<div class="scroll card"><table class="figures">\n<thead><tr><th scope="col">On the way</th>'
        f'<th scope="col">error at each stop</th></tr></thead>\n<tbody>{"".join(lines)}</tbody>\n</table></div>\n'
        '<p class="note">How far the same samples are from the teacher\'s ODE at each time where they stop.</p>\n'
    )


def _training(report: RunReport) -> str:
    logs = {name: log for name, log in report.logs.items() if any(finite(record, "loss") is not None for record in log)}
    if not logs:
        return ""
    alt = f"Loss, gradient norm and learning rate against images seen: {', '.join(logs)}"
    caption = (
        "Means since the previous line of the log, against the number of images seen. Quantiles of the gradient norm "
        "are of the last 1,000 steps; what each term gives to it is measured at the last step of a line, on the "
        "part of the batch that the first process takes first."
    )
    figure = plot(lambda columns, dark: loss_curves(logs, columns=columns, dark=dark), 2, alt, caption)
    return f"<section>\n<h2>Training</h2>\n{figure}</section>"


def _cost(report: RunReport) -> str:
    if not report.cost:
        return ""
    lines = "\n".join(_pair(label, value) for label, value in report.cost)
    return (
        '<section>\n<h2>Cost</h2>\n<div class="card"><table class="pairs"><tbody>\n'
        f"{lines}\n</tbody></table></div>\n</section>"
    )


def _settings(report: RunReport) -> str:
    lines = list(_dotted(report.settings))
    if not lines:
        return ""
    groups = groupby(lines, key=lambda line: tuple(line[0].split(".")[:2]))
    bodies = "\n".join(
        "<tbody>" + "\n".join(_pair(key, value) for key, value in group) + "</tbody>" for _, group in groups
    )
    return (
        f'<section>\n<details class="card"><summary>Settings <span class="note">{len(lines)} values</span></summary>\n'
        f'<table class="pairs settings">\n{bodies}\n</table>\n</details>\n</section>'
    )


def _dotted(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of a nested configuration as (dotted key, JSON value); the `type` of a part stands under its own key."""
    if not isinstance(value, dict):
        yield key, value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
        return
    for name, item in value.items():
        path = key if name == "type" and key else f"{key}.{name}" if key else str(name)
        yield from _dotted(item, path)


def _pair(label: str, value: str) -> str:
    return f'<tr><th scope="row">{escape(label)}</th><td>{escape(value)}</td></tr>'
