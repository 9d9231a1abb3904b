"""The statistics behind an analytic preconditioning, and the jump coefficients that follow from them, as a figure."""

import math
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from fewstep.evaluation.report.canvas import Palette, legend_beside_title, make_panels, styled, to_png
from fewstep.evaluation.report.numbers import tick
from fewstep.flow.paths import EDM
from fewstep.flow.preconditioning.analytic import AnalyticPreconditioning
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics

_STARTS = (80.0, 12.9, 1.9)
_BAND = 2.0
_VISIBLE = 0.01
_DASHED = (0, (4, 2.5))


def statistics_figure(
    before: TrajectoryStatistics, after: TrajectoryStatistics, *, columns: int = 2, dark: bool = False
) -> bytes:
    """l and s against the noise level with bands of two standard errors; f and g of jumps against where they end.

    before, after: as estimated, and as used after shrinking; where that moved a curve, the estimate is dotted. f and g
    are those of the EDM path from a few noise levels down, Euler's dashed. Returns PNG.
    """
    levels = after.tau.tolist()
    starts = dict.fromkeys(min(start, levels[0]) for start in _STARTS if start > levels[-1])
    with styled(dark) as palette:
        figure, axes = make_panels(4, columns, height=3.0)
        _draw_curve(axes[0], levels, before.l, before.l_stderr, after.l, palette)
        axes[0].set_title("l: share of x in the denoiser")
        _draw_curve(axes[1], levels, before.s, before.s_stderr, after.s, palette)
        axes[1].set_title("s: growth of what is left")
        _draw_coefficients(axes[2:], after, list(starts), palette)
        return to_png(figure)


def _draw_curve(
    axis: Axes, levels: Sequence[float], estimate: Tensor, stderr: Tensor, used: Tensor, palette: Palette
) -> None:
    """One statistic; the height fits the lines, wherever the band of uncertain estimates goes."""
    colour = palette.colour(0)
    below, above = ((estimate + side * _BAND * stderr).tolist() for side in (-1, 1))
    axis.fill_between(levels, below, above, color=colour, alpha=0.2, linewidth=0)
    handles: list[Line2D | Patch] = [Line2D([], [], color=colour), Patch(color=colour, alpha=0.2, linewidth=0)]
    names = ["used", "estimate ± 2 s.e."]
    if bool(((estimate - used).abs() > _VISIBLE).any()):
        axis.plot(levels, estimate.tolist(), color=palette.text, linestyle=":", linewidth=1.4)
        handles.insert(1, Line2D([], [], color=palette.text, linestyle=":", linewidth=1.4))
        names.insert(1, "before shrinking")
    axis.plot(levels, used.tolist(), color=colour)
    shown = [*used.tolist(), *estimate.tolist()]
    low, high = min(*shown, 0.0), max(*shown, 1.0)
    axis.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axis.legend(handles, names, loc="best")
    _scale_levels(axis, levels)
    axis.set_xlabel("noise level")


def _draw_coefficients(
    axes: Sequence[Axes], found: TrajectoryStatistics, starts: Sequence[float], palette: Palette
) -> None:
    """f and g from every starting level against the level where the jump ends, with Euler's."""
    path, lowest = EDM(), float(found.tau[-1])
    analytic, euler = AnalyticPreconditioning(found, "backward", path), EulerPreconditioning(path)
    for i, start in enumerate(starts):
        ends = torch.logspace(math.log10(start), math.log10(lowest), 120, dtype=torch.float64).clamp(lowest, start)
        jumps = (each.coefficients(torch.full_like(ends, start), ends) for each in (analytic, euler))
        for axis, own, other in zip(axes, *jumps, strict=True):
            axis.plot(ends.tolist(), own.tolist(), color=palette.colour(i), label=f"from {tick(float(f'{start:.3g}'))}")
            axis.plot(ends.tolist(), other.tolist(), color=palette.colour(i), linestyle=_DASHED, linewidth=1.2)
    for axis, name in zip(axes, "fg", strict=True):
        axis.set_title(f"{name} of a jump")
        _scale_levels(axis, [lowest, *starts])
        axis.set_xlabel("noise level where it ends")
    axes[0].legend(*axes[0].get_legend_handles_labels(), loc="best")
    dashed = Line2D([], [], color=palette.muted, linestyle=_DASHED, linewidth=1.2)
    legend_beside_title(axes[1], [Line2D([], [], color=palette.muted), dashed], ["analytic", "Euler"])


def _scale_levels(axis: Axes, levels: Sequence[float]) -> None:
    axis.set_xscale("log")
    axis.set_xlim(min(levels) / 1.15, max(levels) * 1.15)
    axis.xaxis.set_major_locator(LogLocator(numticks=7))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(tick)
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(tick)
