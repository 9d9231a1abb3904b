"""Figures of a run as PNG bytes: the course of its training, and quality against network calls."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from fewstep.evaluation.report.canvas import (
    Palette,
    Record,
    legend_above,
    legend_beside_title,
    make_panels,
    scale_images,
    scale_values,
    shorten,
    spreads,
    styled,
    to_png,
)
from fewstep.evaluation.report.numbers import finite, tick
from fewstep.utils.errors import DataError, ShapeError

Points = tuple[list[float], list[float]]
Style = Literal["-", "--", ":", "-."]

_MOST_KEYS = 40
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLES: tuple[Style, ...] = ("-", "--", ":", "-.")
_NORMS = {"grad_norm": "mean", "grad_norm_max": "largest", "grad_norm_q50": "median", "grad_norm_q99": "99 % quantile"}
_LOGARITHMIC = ("Gradient norm", "Gradient norm of each term", "Root mean square")
_SIZES = {"prediction_rms": "prediction", "target_rms": "target", "derivative_rms": "derivative"}
_QUALITY = {
    "Fréchet distance": ("frechet",),
    "Class accuracy": ("accuracy",),
    "Precision, recall": ("precision", "recall"),
}
_SPENT = {
    "seconds", "images_per_second", "peak_memory_mib", "data_wait", "compiled", "flops_per_second", "utilisation",
}  # fmt: skip
_LEFT_OUT = {"step", "images", "loss", "clipped", "lr", "grad_norm_q90", *_SPENT, *_SIZES}


def loss_curves(logs: Mapping[str, Sequence[Record]], *, columns: int = 2, dark: bool = False) -> bytes:
    """The course of one or several runs against images seen: loss, gradient and what they are made of.

    logs: by name of the run, the records of its log. Panels without a finite value are left out. Gradient norms
    and sizes are on a log axis, losses too when they are positive and spread over more than a factor of three. Of
    quantities that objectives name themselves 40 are drawn.
    Raises DataError when nothing is left.
    """
    logged = sorted({key for log in logs.values() for record in log for key in record} - _LEFT_OUT)[:_MOST_KEYS]
    norms = {key: key.removeprefix("grad_norm_") for key in logged if key.startswith("grad_norm")}
    panels = {
        "Loss": {"loss": "loss"},
        "Terms of the loss": {key: key for key in logged if key not in norms},
        "Gradient norm": _NORMS,
        "Gradient norm of each term": {key: name for key, name in norms.items() if key not in _NORMS},
        "Root mean square": _SIZES,
        "Share of clipped steps": {"clipped": "clipped"},
        "Learning rate": {"lr": "learning rate"},
    }
    seen = {key for log in logs.values() for record in log for key in record if _points([record], "images", key)[0]}
    present = {title: {key: name for key, name in keys.items() if key in seen} for title, keys in panels.items()}
    drawn = [(title, keys) for title, keys in present.items() if keys]
    if not drawn:
        raise DataError("there is no training log to draw: no record has a finite value")
    with styled(dark) as palette:
        figure, axes = make_panels(len(drawn), columns, height=2.75)
        for axis, (title, keys) in zip(axes, drawn, strict=True):
            _draw_courses(axis, title, keys, logs, palette)
        if len(logs) > 1:
            colours = [Line2D([], [], color=palette.colour(i)) for i in range(len(logs))]
            legend_above(figure, colours, [shorten(name, 40) for name in logs])
        return to_png(figure)


def quality_curves(rows: Sequence[Record], *, columns: int = 3, dark: bool = False) -> bytes:
    """Fréchet distance, class accuracy, precision and recall against network calls, one line per method.

    rows: of `Evaluator.measure`; those with nfe 0 are real data, drawn as dashed levels. Panels without a finite value
    are left out. Raises ShapeError on rows of several extractors, whose distances do not compare, and DataError when
    nothing is left.
    """
    extractors = sorted({str(row["extractor"]) for row in rows})
    if len(extractors) > 1:
        raise ShapeError(f"distances between different features do not compare: draw {', '.join(extractors)} apart")
    drawn = [
        (title, keys)
        for title, keys in _QUALITY.items()
        if any(finite(row, key) is not None for row in rows for key in keys)
    ]
    if not drawn:
        raise DataError("there are no measurements to draw")
    with styled(dark) as palette:
        figure, axes = make_panels(len(drawn), columns, height=3.35)
        for axis, (title, keys) in zip(axes, drawn, strict=True):
            _draw_quality(axis, title, keys, rows, palette)
        axes[0].set_ylabel(f"features: {shorten(extractors[0], 36)}", fontsize=8)
        legend_above(figure, *_methods_key(rows, palette))
        return to_png(figure)


def _draw_courses(
    axis: Axes, title: str, keys: Mapping[str, str], logs: Mapping[str, Sequence[Record]], palette: Palette
) -> None:
    """One panel of a log: runs differ in colour and keys in style, or keys in colour when there is one run."""
    values: list[float] = []
    for i, log in enumerate(logs.values()):
        for j, key in enumerate(keys):
            images, course = _points(log, "images", key)
            if not course:
                continue
            colour = palette.colour(j if len(logs) == 1 else i)
            marker = "o" if len(course) < 30 else ""
            axis.plot(images, course, color=colour, linestyle=_line(j, len(logs)), marker=marker, markersize=3)
            values += course
    axis.set_title(title)
    scale_images(axis)
    if "lr" in keys or "clipped" in keys:
        values.append(0.0)
    scale_values(axis, values, logarithmic=title in _LOGARITHMIC or spreads(values))
    if len(keys) > 1:
        handles = [
            Line2D([], [], color=palette.colour(j) if len(logs) == 1 else palette.muted, linestyle=_line(j, len(logs)))
            for j in range(len(keys))
        ]
        legend_beside_title(axis, handles, [shorten(label, 24) for label in keys.values()])


def _line(index: int, runs: int) -> Style:
    return "-" if runs == 1 else _STYLES[index % len(_STYLES)]


def _draw_quality(axis: Axes, title: str, keys: Sequence[str], rows: Sequence[Record], palette: Palette) -> None:
    """One panel against network calls: solid for the first key, dotted for the second; real data as levels."""
    values: list[float] = []
    logarithmic = keys == ("frechet",)
    for j, key in enumerate(keys):
        for i, method in enumerate(_methods(rows)):
            own = [row for row in rows if row["method"] == method and finite(row, "nfe")]
            calls, measured = _points(own, "nfe", key, positive=logarithmic)
            style, face = ("-", palette.colour(i)) if j == 0 else (":", palette.ground)
            axis.plot(
                calls, measured, color=palette.colour(i), linestyle=style, marker=_MARKERS[i % 7], markerfacecolor=face
            )
            values += measured
        real = [row for row in rows if finite(row, "nfe") == 0]
        for level in _points(real, "nfe", key, positive=logarithmic)[1]:
            axis.axhline(level, color=palette.muted, linewidth=1.2, linestyle=(0, (5, 3)) if j == 0 else ":")
            values.append(level)
    axis.set_title(title)
    _scale_calls(axis, rows)
    if logarithmic:
        scale_values(axis, values, logarithmic=True)
    else:
        _scale_share(axis, values, percent=keys == ("accuracy",))
    if len(keys) > 1:
        styles = [
            Line2D([], [], color=palette.muted, linestyle=":" if j else "-", marker="o", markerfacecolor=face)
            for j, face in enumerate((palette.muted, palette.ground))
        ]
        legend_beside_title(axis, styles, keys)


def _methods_key(rows: Sequence[Record], palette: Palette) -> tuple[list[Line2D], list[str]]:
    """Handles and labels that name the methods and the real data."""
    names = _methods(rows)
    handles = [Line2D([], [], color=palette.colour(i), marker=_MARKERS[i % len(_MARKERS)]) for i in range(len(names))]
    if any(finite(row, "nfe") == 0 for row in rows):
        handles.append(Line2D([], [], color=palette.muted, linewidth=1.2, linestyle=(0, (5, 3))))
        names.append(" / ".join(dict.fromkeys(str(row["method"]) for row in rows if finite(row, "nfe") == 0)))
    return handles, [shorten(name, 40) for name in names]


def _methods(rows: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(str(row["method"]) for row in rows if finite(row, "nfe") != 0))


def _points(rows: Sequence[Record], across: str, key: str, positive: bool = False) -> Points:
    """The finite values under `across`, ascending, and under `key`; with `positive` none of 0 or less under that."""
    pairs = [(finite(row, across), finite(row, key)) for row in rows]
    kept = sorted((x, y) for x, y in pairs if x is not None and y is not None and (y > 0 or not positive))
    return [x for x, _ in kept], [y for _, y in kept]


def _scale_calls(axis: Axes, rows: Sequence[Record]) -> None:
    """Log axis of network calls, with a tick at each count that occurs, or at powers of two when they are many."""
    calls = sorted({int(nfe) for row in rows if (nfe := finite(row, "nfe"))}) or [1]
    if len(calls) > 7:
        calls = [2**i for i in range(math.floor(math.log2(calls[0])), math.ceil(math.log2(calls[-1])) + 1)]
    axis.set_xscale("log", base=2)
    axis.set_xlim(calls[0] / 1.3, calls[-1] * 1.3)
    axis.xaxis.set_major_locator(FixedLocator(legible_ticks(calls)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(tick)
    axis.set_xlabel("network calls per sample (NFE)")


def legible_ticks(rising: Sequence[int], apart: float = 1.25) -> list[int]:
    """Those whose labels do not run into the next one's on a log axis: each less than the next kept one by a factor."""
    kept: list[int] = []
    for value in reversed(rising):
        if not kept or kept[-1] >= apart * value:
            kept.append(value)
    return kept[::-1]


def _scale_share(axis: Axes, values: Sequence[float], percent: bool) -> None:
    """Linear axis of shares up to 1, from the lowest value down to the next tenth."""
    low = math.floor(min(values, default=0.0) * 10 - 0.2) / 10
    axis.set_ylim(max(low, 0), 1.02)
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if percent else f"{value:.4g}")
