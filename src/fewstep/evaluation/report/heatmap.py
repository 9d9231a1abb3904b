"""Heat maps of alignment: the error of a student's jumps over the grid of their starts and ends."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator

from fewstep.evaluation.report.canvas import Record, make_panels, shorten, styled, to_png
from fewstep.evaluation.report.numbers import number, tick
from fewstep.utils.errors import DataError, ShapeError

Cells = list[list[float | None]]

_RAMP_LIGHT = ("#dfeafa", "#b4cef3", "#7ba5ea", "#3f6fd1", "#24459a", "#12245c")
_RAMP_DARK = ("#263552", "#2b4d89", "#3f6fc8", "#6f9df5", "#aecbff", "#eaf2ff")
_NUMBERED = 8
_LABELLED = 14
_GAP = 0.03


def alignment_heatmap(records: Sequence[Record], *, columns: int = 2, dark: bool = False) -> bytes:
    """The error of jumps from t (down the side, noise on top) to s (along the foot), one panel for each student.

    records: of `Alignment.row()`. One logarithmic colour scale for all, which stronger colour climbs; the errors are
    written into the cells when a grid has at most 8 times. Errors that are not positive are left blank. Raises
    ShapeError when a matrix does not fit its times and DataError when there is nothing to draw.
    """
    grids = [(_times(record), _cells(record)) for record in records]
    values = [value for _, cells in grids for value in chain.from_iterable(cells) if value is not None]
    if not values:
        raise DataError("there is no alignment to draw: no jump has a positive, finite error")
    shades = _shades(values, _RAMP_DARK if dark else _RAMP_LIGHT)
    with styled(dark):
        figure, axes = make_panels(len(grids), columns, height=3.9)
        if len(grids) == 1 < columns:
            figure.set_size_inches(8.0, 3.9)
        for axis, record, (times, cells) in zip(axes, records, grids, strict=True):
            _draw_cells(axis, times, cells, shades)
            axis.set_title(shorten(str(record["method"]), 44))
        _colour_bar(figure, axes, shades)
        return to_png(figure, shades=True)


def _shades(values: Sequence[float], stops: Sequence[str]) -> ScalarMappable:
    """A logarithmic scale of colour over positive values.

    At least a factor of three wide, so that like values look alike, and at most of 1e4, so that an exact zero lost to
    rounding does not take the colours from the rest.
    """
    high = max(values)
    low = max(min(values), high / 1e4)
    room = max(1.0, math.sqrt(3 * low / high))
    ramp = LinearSegmentedColormap.from_list("alignment", list(stops))
    return ScalarMappable(LogNorm(low / room, high * room, clip=True), ramp)


def _times(record: Record) -> list[float]:
    return [float(time) for time in cast(Sequence[float], record["times"])]


def _cells(record: Record) -> Cells:
    """Errors without the row of the last time and the column of the first, where no jump starts or ends."""
    matrix = cast(Sequence[Sequence[float | None]], record["rmse"])
    count = len(_times(record))
    if count < 2 or len(matrix) != count or any(len(row) != count for row in matrix):
        raise ShapeError(f"alignment of {record['method']!r}: the matrix of errors does not fit its {count} times")
    return [[x if x is not None and 0 < x < math.inf else None for x in row[1:]] for row in matrix[:-1]]


def _draw_cells(axis: Axes, times: Sequence[float], cells: Cells, shades: ScalarMappable) -> None:
    count = len(cells)
    for i, row in enumerate(cells):
        for j, value in enumerate(row):
            if value is not None:
                face = cast(tuple[float, ...], shades.to_rgba(cast(Any, value)))
                axis.add_patch(Rectangle((j + _GAP, i + _GAP), 1 - 2 * _GAP, 1 - 2 * _GAP, facecolor=face, linewidth=0))
                if len(times) <= _NUMBERED:
                    _write(axis, j + 0.5, i + 0.5, value, face, count)
    axis.set_xlim(0, count)
    axis.set_ylim(count, 0)
    axis.grid(False)
    axis.spines["bottom"].set_visible(False)
    every = -(-count // _LABELLED)
    shown = range(0, count, every)
    axis.set_xticks([k + 0.5 for k in shown], [_level(times[k + 1]) for k in shown])
    axis.set_yticks([k + 0.5 for k in shown], [_level(times[k]) for k in shown])
    axis.set_xlabel("to s")
    axis.set_ylabel("from t")


def _write(axis: Axes, x: float, y: float, value: float, face: Sequence[float], count: int) -> None:
    """The error in its cell, black or white by the luminance of the cell's colour."""
    luminance = 0.2126 * face[0] + 0.7152 * face[1] + 0.0722 * face[2]
    ink = "#10151d" if luminance > 0.5 else "#ffffff"
    axis.text(x, y, _short(value), color=ink, fontsize=8.5 if count < 6 else 7.5, ha="center", va="center")


def _short(value: float) -> str:
    """Two digits, without the zero before the point: .083, 1.2, 12, 5e-5."""
    if value < 1e-3:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e−{-int(exponent)}"
    return number(value, 2).removeprefix("0") if value < 1 else number(value, 2)


def _level(time: float) -> str:
    return tick(float(f"{time:.2g}"))


def _colour_bar(figure: Figure, axes: Sequence[Axes], shades: ScalarMappable) -> None:
    low, high = shades.get_clim()
    subs = (1.0, 2.0, 5.0) if high < 30 * low else (1.0, 3.0) if high < 3000 * low else (1.0,)
    bar = figure.colorbar(shades, ax=list(axes), aspect=30, pad=0.02, fraction=0.05)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=9))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(tick)
    bar.set_label("RMS error per element")
