"""The statistics behind an analytic preconditioning, and the jump coefficients that follow from them, as a figure."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from fewstep.evaluation.report.canvas import Palette, legend_beside_title, make_panels, styled, to_png
from fewstep.evaluation.report.numbers import tick
from fewstep.utils.errors import DataError, ShapeError

_BAND = 2.0
_VISIBLE = 0.01
_DASHED = (0, (4, 2.5))


@dataclass(frozen=True)
class Curve:
    """One statistic at the noise levels: the estimate, its standard errors, and what is used of it after shrinking."""

    estimate: Sequence[float]
    stderr: Sequence[float]
    used: Sequence[float]

    @property
    def shrunk(self) -> bool:
        """Whether what is used differs visibly from the estimate."""
        return any(abs(x - y) > _VISIBLE for x, y in zip(self.estimate, self.used, strict=True))


@dataclass(frozen=True)
class Jumps:
    """Coefficients of the jumps from noise level `start` to `levels`: of this preconditioning, and Euler's."""

    start: float
    levels: Sequence[float]
    f: Sequence[float]
    g: Sequence[float]
    euler_f: Sequence[float]
    euler_g: Sequence[float]


def statistics_figure(
    levels: Sequence[float],
    l: Curve,  # noqa: E741  (math.md §3.1)
    s: Curve,
    jumps: Sequence[Jumps],
    *,
    columns: int = 2,
    dark: bool = False,
) -> bytes:
    """l and s against the noise level with bands of two standard errors; f and g of jumps against where they end.

    levels: the noise levels of the curves. Where shrinking moved a curve, the estimate before it is dotted. f and g are
    solid lines, Euler's dashed, a colour for each starting level. Returns PNG. Raises ShapeError when curves do not fit
    their levels and DataError when there are none.
    """
    if len(levels) < 2:
        raise DataError("there are no statistics to draw: give at least two noise levels")
    if any(len(part) != len(levels) for curve in (l, s) for part in (curve.estimate, curve.stderr, curve.used)):
        raise ShapeError(f"curves of statistics do not fit their {len(levels)} noise levels")
    with styled(dark) as palette:
        figure, axes = make_panels(4 if jumps else 2, columns, height=3.0)
        _draw_curve(axes[0], "l: share of x in the denoiser", levels, l, palette.colour(0), palette)
        _draw_curve(axes[1], "s: growth of what is left", levels, s, palette.colour(0), palette)
        for axis, name in zip(axes[2:], ("f", "g"), strict=False):
            _draw_coefficient(axis, name, jumps, palette)
        return to_png(figure)


def _draw_curve(axis: Axes, title: str, levels: Sequence[float], curve: Curve, colour: str, palette: Palette) -> None:
    """One statistic; the height fits the lines, wherever the band of uncertain estimates goes."""
    pairs = list(zip(curve.estimate, curve.stderr, strict=True))
    below, above = ([x + side * _BAND * e for x, e in pairs] for side in (-1, 1))
    axis.fill_between(levels, below, above, color=colour, alpha=0.2, linewidth=0)
    handles: list[Line2D | Patch] = [Line2D([], [], color=colour), Patch(color=colour, alpha=0.2, linewidth=0)]
    names = ["used", "estimate ± 2 s.e."]
    if curve.shrunk:
        axis.plot(levels, curve.estimate, color=palette.text, linestyle=":", linewidth=1.4)
        handles.insert(1, Line2D([], [], color=palette.text, linestyle=":", linewidth=1.4))
        names.insert(1, "before shrinking")
    axis.plot(levels, curve.used, color=colour)
    shown = [*curve.used, *curve.estimate]
    low, high = min(*shown, 0.0), max(*shown, 1.0)
    axis.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axis.set_title(title)
    axis.legend(handles, names, loc="best")
    _scale_levels(axis, levels)
    axis.set_xlabel("noise level")


def _draw_coefficient(axis: Axes, name: str, jumps: Sequence[Jumps], palette: Palette) -> None:
    """f or g of every starting level against the level where the jump ends, with Euler's."""
    for i, each in enumerate(jumps):
        own, euler = (each.f, each.euler_f) if name == "f" else (each.g, each.euler_g)
        axis.plot(each.levels, own, color=palette.colour(i), label=f"from {tick(float(f'{each.start:.3g}'))}")
        axis.plot(each.levels, euler, color=palette.colour(i), linestyle=_DASHED, linewidth=1.2)
    axis.set_title(f"{name} of a jump")
    handles, names = axis.get_legend_handles_labels()
    if name == "f":
        axis.legend(handles, names, loc="best")
    else:
        dashed = Line2D([], [], color=palette.muted, linestyle=_DASHED, linewidth=1.2)
        legend_beside_title(axis, [Line2D([], [], color=palette.muted), dashed], ["analytic", "Euler"])
    _scale_levels(axis, [level for each in jumps for level in each.levels])
    axis.set_xlabel("noise level where it ends")


def _scale_levels(axis: Axes, levels: Sequence[float]) -> None:
    axis.set_xscale("log")
    axis.set_xlim(min(levels) / 1.15, max(levels) * 1.15)
    axis.xaxis.set_major_locator(LogLocator(numticks=7))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(tick)
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(tick)
