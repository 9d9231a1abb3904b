"""The figure of the degeneracy study: eigenvalues, thresholds, networks' errors, and samples with their paths."""

from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor

from benchmarks.degeneracy.expected import WEIGHTS, ZERO
from benchmarks.degeneracy.networks import OBJECTIVES, Truth, exact_jump
from benchmarks.harness import Row, chosen, figure
from fewstep import FlowMap
from fewstep.evaluation.report.canvas import LIGHT
from fewstep.evaluation.report.numbers import tick
from fewstep.flow.flow_map import at
from tests.support import gaussian_updates as G

DRAWN = 60
SHOWN = {"no anchor": "iSD without its anchor", "both terms": "iSD with its anchor"}
LEGEND = {"loc": "lower left", "ncols": 2, "columnspacing": 1.0}
Maps = dict[tuple[str, str, str], FlowMap]


def draw(rows: list[Row], maps: Maps, truth: Truth, file: Path) -> None:
    """Eigenvalues, thresholds, networks' errors; then samples with their paths by the exact and by learned maps."""
    noise = truth.noise
    with figure(file, 6, 3, height=3.4) as axes, torch.no_grad():
        _eigenvalues(axes[0])
        _stability(axes[1], chosen(rows, kind="threshold", sd=1, degree=2))
        _errors(axes[2], chosen(rows, kind="network", start="random"))
        few = noise[:DRAWN]
        _paths(axes[3], "The data's flow map", truth, lambda s: exact_jump(few, at(1.0, few), at(s, few)))
        for axis, (loss, title) in zip(axes[4:], SHOWN.items(), strict=True):
            jump = maps["iSD", loss, "random"].jump  # of all seeds; the first is drawn
            _paths(axis, title, truth, lambda s, jump=jump: jump(noise, at(1.0, noise), at(s, noise))[:DRAWN])  # type: ignore[misc]


def _eigenvalues(axis: Axes) -> None:
    """Of every objective at the data's flow map, in the metric of N, without an anchor and with one of weight 1."""
    case = G.case()
    family, quadrature = G.Tangent(case, G.exact(case), (1, 2), (2, 3)), G.points(case)
    metric = G.gram(G.features(family, quadrature), quadrature.weight)
    anchor = G.jacobian(family, G.anchor_error, case)
    for height, error in enumerate(G.ERRORS.values()):
        alone = G.jacobian(family, error, case)
        for shift, matrix, colour in ((-0.15, alone, 1), (0.15, alone + anchor, 0)):
            values = G.spectrum(matrix, metric)
            values = torch.where(values.abs() < ZERO, 0.0, values)
            axis.plot(values, [height + shift] * len(values), "o", color=LIGHT.colour(colour), alpha=0.6, mew=0)
    axis.axvline(0, color=LIGHT.muted, linewidth=1)
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xticks([-10, -1, 0], ["−10", "−1", "0"])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_yticks(range(len(G.ERRORS)), list(G.ERRORS))
    axis.invert_yaxis()
    axis.set(title="Eigenvalues at the data's flow map", xlim=(-40, 0.4))
    axis.set_xlabel("real part; orange: no anchor, blue: anchor of weight 1")


def _stability(axis: Axes, rows: list[Row]) -> None:
    """The largest real part at the data's flow map against the anchor's weight."""
    for index, row in enumerate(rows):
        axis.plot(WEIGHTS, row["curve"], color=LIGHT.colour(index), label=row["objective"])
    for weight, name in ((1.0, "together"), (rows[0]["apart"], "apart")):
        axis.axvline(weight, color=LIGHT.muted, linewidth=1, linestyle=(0, (5, 3)))
        axis.annotate(f" {name}", (weight, 0.97), xycoords=("data", "axes fraction"), color=LIGHT.muted, va="top")
    axis.axhline(0, color=LIGHT.muted, linewidth=1)
    axis.set(title="Stability in a shared family", xscale="log", ylim=(-1.3, 0.6))
    axis.set(xlabel="weight of the anchor", ylabel="largest real part; above 0 unstable")
    axis.legend(**LEGEND, handlelength=1.2)


def _errors(axis: Axes, rows: list[Row]) -> None:
    """Error against inconsistency, a mark a seed."""
    for row in (row for row in rows if row["loss"] in SHOWN):
        colour = LIGHT.colour(list(OBJECTIVES).index(row["objective"]))
        marker, face = ("o", colour) if row["loss"] == "both terms" else ("^", "none")
        axis.plot(row["inconsistency"], row["error"], marker, color=colour, markerfacecolor=face)
    handles = [Line2D([], [], color=LIGHT.colour(i), linewidth=4) for i in range(len(OBJECTIVES))]
    axis.legend(handles, list(OBJECTIVES), **LEGEND, handlelength=1.0)
    axis.set(title="Trained networks", xscale="log", yscale="log")
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        each.set_minor_locator(NullLocator())
        each.set_major_formatter(FuncFormatter(tick))
    axis.set(xlabel="inconsistency; triangles: no anchor", ylabel="error to the data's flow map")


def _paths(axis: Axes, title: str, truth: Truth, jumped: Callable[[float], Tensor]) -> None:
    """X(x, 1, s) as s falls from 1 to 0, its ends, and the data's samples in grey."""
    states = torch.stack([truth.noise[:DRAWN], *(jumped(s) for s in torch.linspace(0.95, 0, 20).tolist())])
    axis.scatter(*truth.samples.T, s=4, color=LIGHT.line, zorder=1)
    axis.plot(states[..., 0], states[..., 1], color=LIGHT.muted, linewidth=0.5, alpha=0.6, zorder=2)
    axis.scatter(*states[-1].T, s=9, color=LIGHT.colour(1), zorder=3)
    axis.set(title=title, aspect="equal", xlim=(-3.2, 3.8), ylim=(-3.0, 3.4))
