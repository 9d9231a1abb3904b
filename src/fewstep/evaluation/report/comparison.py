"""Learning curves of the runs of one study, side by side, as a figure."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fewstep.evaluation.report.canvas import (
    Palette,
    legend_above,
    make_panels,
    scale_images,
    scale_values,
    shorten,
    spreads,
    styled,
    to_png,
)
from fewstep.utils.errors import DataError


@dataclass(frozen=True)
class Course:
    """One method's line: images seen, the mean over its runs, and their lowest and highest value."""

    method: str
    images: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """The lines of one measure, and the levels that the table's targets lie at."""

    title: str
    courses: tuple[Course, ...]
    levels: tuple[float, ...] = ()


def comparison_curves(panels: Sequence[Panel], *, columns: int = 3, dark: bool = False) -> bytes:
    """Values against images seen as PNG: a panel for every measure, a line and a band for every method.

    Three panels stand in one row where `columns` allows it, other numbers in pairs. Dashed levels are targets. Raises
    DataError when no panel has a point.
    """
    drawn = [panel for panel in panels if any(course.images for course in panel.courses)]
    if not drawn:
        raise DataError("there is no learning curve to draw: no measured value is finite")
    methods = list(dict.fromkeys(course.method for panel in drawn for course in panel.courses))
    with styled(dark) as palette:
        figure, axes = make_panels(len(drawn), min(columns, 2 if len(drawn) % 3 else 3), height=3.1)
        for axis, panel in zip(axes, drawn, strict=True):
            _draw(axis, panel, methods, palette)
        handles = [Line2D([], [], color=palette.colour(i)) for i in range(len(methods))]
        names = [shorten(method, 40) for method in methods]
        if any(panel.levels for panel in drawn):
            handles.append(Line2D([], [], color=palette.muted, linewidth=1.0, linestyle=(0, (5, 3))))
            names.append("targets")
        legend_above(figure, handles, names)
        return to_png(figure)


def _draw(axis: Axes, panel: Panel, methods: Sequence[str], palette: Palette) -> None:
    values = list(panel.levels)
    for level in panel.levels:
        axis.axhline(level, color=palette.muted, linewidth=1.0, linestyle=(0, (5, 3)))
    for course in panel.courses:
        colour = palette.colour(methods.index(course.method))
        axis.fill_between(course.images, course.low, course.high, color=colour, alpha=0.18, linewidth=0)
        marker = "o" if len(course.images) < 30 else ""
        axis.plot(course.images, course.mean, color=colour, marker=marker, markersize=3)
        values += [*course.low, *course.high]
    axis.set_title(shorten(panel.title, 44))
    scale_images(axis)
    scale_values(axis, values, logarithmic=spreads(values))
