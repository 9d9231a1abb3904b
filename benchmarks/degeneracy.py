"""What self-distillation converges to without its anchor, and with a weak one: Gaussian data exactly, then networks.

    python benchmarks/degeneracy.py [--digits]

studies/degeneracy.md states and proves what is measured here. First the expected updates on Gaussian data
(degeneracy_gaussian.py): are they zero at the data's flow map and at others, which eigenvalues have their Jacobians
there, how much anchor does stability need? Then small networks (degeneracy_networks.py), trained by the library's
objectives with both of their terms, with the distillation alone, and with each term normalised by its own loss. Prints
the tables, writes benchmarks/results/degeneracy.json and docs/figures/degeneracy.png; about three minutes of one core.
--digits adds iSD on scikit-learn's digits, a minute more; without it the rows of an earlier run are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor

from degeneracy_gaussian import (
    ERRORS,
    Case,
    OneSlope,
    Shared,
    Tangent,
    anchor_error,
    contraction,
    critical_weight,
    exact,
    features,
    gram,
    jacobian,
    points,
    spectrum,
    sufficient_weight,
    update,
    weight_apart,
)
from degeneracy_networks import DIGITS, F64, LOSSES, OBJECTIVES, PLAN, SEEDS, Truth, digits, exact_jump, mixture, train
from fewstep.evaluation.report.canvas import LIGHT, figure_style, make_panels, to_png
from fewstep.evaluation.report.comparison import Table, aligned
from fewstep.evaluation.report.numbers import number, tick
from fewstep.flow.closed_form import GaussianData
from fewstep.flow.flow_map import FlowMap, at
from fewstep.flow.paths import Linear, Trig
from fewstep.flow.preconditioning import LinearPreconditioning, TrigPreconditioning
from fewstep.utils.files import write_atomically

RESULTS = Path(__file__).parent / "results" / "degeneracy.json"
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "degeneracy.png"
Row = dict[str, Any]
Maps = dict[tuple[str, str, str], FlowMap]

ZERO = 1e-9
"""Eigenvalues are null up to here: those that are not are 1e5 times larger."""
DEGREES = (1, 2, 3)
WEIGHTS: list[float] = torch.logspace(1, -3, 81, dtype=F64).tolist()
DRAWN = 60
SHOWN = {"no anchor": "iSD without its anchor", "both terms": "iSD with its anchor"}


def gaussian(sd: float = 0.5, mean: float = 1.0, trig: bool = False) -> Case:
    """Data N(mean, sd^2) on the linear or the trigonometric path."""
    data = GaussianData(torch.tensor(mean, dtype=F64), sd)
    return Case(Trig(), TrigPreconditioning(), data) if trig else Case(Linear(), LinearPreconditioning(), data)


def fixed_points() -> list[Row]:
    """Updates and eigenvalues of every objective at three flow maps, without an anchor and with one of weight 1."""
    rows = []
    for trig in (False, True):
        case = gaussian(trig=trig)
        for flow in (exact(case), contraction(-1.0, 0.0), contraction(-1.0, 9.0)):
            family = Tangent(case, flow, velocity=(1, 2), departures=(2, 3))
            origin = torch.zeros(family.size, dtype=F64)
            anchor, anchored = update(family, anchor_error, case, origin), jacobian(family, anchor_error, case)
            for name, error in ERRORS.items():
                alone, moved = jacobian(family, error, case), update(family, error, case, origin)
                values = spectrum(alone)
                rows.append(
                    {
                        "kind": "fixed point", "path": "trig" if trig else "linear", "map": flow.name,
                        "objective": name, "parameters": family.size, "update": float(moved.norm()),
                        "null": int((values.abs() < ZERO).sum()), "largest": float(values[values.abs() >= ZERO].max()),
                        "update_anchored": float((moved + anchor).norm()),
                        "largest_anchored": float(spectrum(alone + anchored)[-1]),
                    }
                )  # fmt: skip
    return rows


def thresholds() -> list[Row]:
    """How much anchor the data's flow map needs to be stable in families whose parameters all times share."""
    rows = []
    for sd in (0.5, 1.0, 2.0):
        case = gaussian(sd, 0.0)
        quadrature, apart = points(case), weight_apart(case)
        for degree in DEGREES:
            family = Shared(case, exact(case), degree)
            metric = gram(features(family, quadrature), quadrature.weight)
            anchor = jacobian(family, anchor_error, case)
            for name, error in ERRORS.items():
                alone = jacobian(family, error, case)
                rows.append(
                    {
                        "kind": "threshold", "sd": sd, "degree": degree, "objective": name,
                        "critical": critical_weight(alone, anchor, metric), "sufficient": sufficient_weight(case),
                        "apart": apart, "largest_apart": float(spectrum(alone + apart * anchor, metric)[-1]),
                        "curve": [float(spectrum(alone + weight * anchor, metric)[-1]) for weight in WEIGHTS],
                    }
                )  # fmt: skip
    return rows


def slopes() -> list[Row]:
    """Where N = a x settles on N(0, sd^2) by iSD with an anchor of some weight."""
    rows = []
    for sd in (0.5, 1.0):
        one = OneSlope.of(gaussian(sd, 0.0))
        settled = {f"weight {weight:g}": one.settled(weight) for weight in (1.0, 0.1, 0.01)}
        apart = one.settled_apart()
        ends = {"anchor alone": one.pull / one.size, **settled, "apart": apart}
        rows.append({"kind": "slope", "sd": sd, **ends, "apart's weight": one.weight_apart(apart)})
    return rows


def networks(truth: Truth) -> tuple[list[Row], Maps]:
    """Every run of the plan: a row for each seed, and the maps."""
    rows, maps = [], {}
    for name, loss, start in PLAN:
        flow_map, before = train(OBJECTIVES[name], LOSSES[loss], start, truth)
        maps[name, loss, start] = flow_map
        after = truth.measure(flow_map)
        for seed in range(SEEDS):
            found = {key: values[seed] for key, values in after.items()}
            first = {f"{key}_before": values[seed] for key, values in before.items()}
            row = {"kind": "network", "objective": name, "loss": loss, "start": start, "seed": seed}
            rows.append(row | found | first)
    return rows, maps


def matrices() -> str:
    """iSD's Jacobian at the data's flow map for the smallest family, without an anchor and with one of weight 1."""
    case = gaussian()
    family = Tangent(case, exact(case))
    alone, anchor = jacobian(family, ERRORS["iSD"], case), jacobian(family, anchor_error, case)
    lines = []
    for title, matrix in (("no anchor", alone), ("anchor of weight 1", alone + anchor)):
        cells = (" ".join(f"{value + 0.0:9.5f}" for value in row) for row in matrix.tolist())
        values = " ".join(f"{value + 0.0:.5f}" for value in spectrum(matrix).tolist())
        lines += [f"iSD, {title}; parameters theta, c, mu, d", *cells, f"eigenvalues {values}"]
    return "\n".join(lines)


def fixed_point_table(rows: list[Row]) -> str:
    """A line for each path, map and objective."""
    heads = ("at", "update", "null", "largest other", "update, anchored", "largest, anchored")
    lines = [
        (
            f"{row['path']}, {row['map']}, {row['objective']}", f"{row['update']:.1e}",
            f"{row['null']} of {row['parameters']}", f"{row['largest']:.4f}", f"{row['update_anchored']:.1e}",
            f"{row['largest_anchored']:.4f}" if row["update_anchored"] < ZERO else "no fixed point",
        )
        for row in rows
    ]  # fmt: skip
    return aligned([Table(heads, tuple(lines))])


def threshold_table(rows: list[Row]) -> str:
    """Critical weights, a line for each width of the data and degree."""
    heads = ("sd, degree", *(f"{name} critical" for name in ERRORS), "iSD enough", "apart", "iSD largest, apart")
    lines = []
    for sd, degree in dict.fromkeys((row["sd"], row["degree"]) for row in rows):
        own = {row["objective"]: row for row in rows if (row["sd"], row["degree"]) == (sd, degree)}
        weights = tuple(f"{own[name]['critical']:.3f}" for name in ERRORS)
        first = own["iSD"]
        rest = (f"{first['sufficient']:.3f}", f"{first['apart']:.4f}", f"{first['largest_apart']:.3f}")
        lines.append((f"{sd:g}, {degree}", *weights, *rest))
    return aligned([Table(heads, tuple(lines))])


def slope_table(rows: list[Row]) -> str:
    """A line for each width of the data."""
    heads = [key for key in rows[0] if key != "kind"]
    lines = [(f"{row['sd']:g}", *(number(row[key]) for key in heads[1:])) for row in rows]
    return aligned([Table(tuple(heads), tuple(lines))])


def network_table(rows: list[Row]) -> str:
    """Mean and, in brackets, lowest and highest over seeds; a line for each run."""
    keys = ("inconsistency_before", "inconsistency", "error_before", "error", "variance_before", "variance")
    lines = []
    for name, loss, start in dict.fromkeys((row["objective"], row["loss"], row["start"]) for row in rows):
        own = [row for row in rows if (row["objective"], row["loss"], row["start"]) == (name, loss, start)]
        lines.append((f"{name}, {loss}, {start}", *(_spread([row[key] for row in own]) for key in keys)))
    return aligned([Table(("run", *(key.replace("_before", " at start") for key in keys)), tuple(lines))])


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f}..{max(values):.3f})"


def figure(rows: list[Row], maps: Maps, truth: Truth) -> bytes:
    """Eigenvalues, thresholds, networks' errors; then samples with their paths by the exact and by learned maps."""
    with rc_context(figure_style(LIGHT)):
        drawn, axes = make_panels(6, 3, height=3.4)
        _eigenvalues(axes[0])
        _stability(
            axes[1], [row for row in rows if row["kind"] == "threshold" and (row["sd"], row["degree"]) == (1, 2)]
        )
        _errors(axes[2], [row for row in rows if row["kind"] == "network" and row["start"] == "random"])
        noise, data = truth.noise[:DRAWN], mixture()
        _paths(axes[3], "The data's flow map", truth, lambda s: exact_jump(data, noise, at(1.0, noise), at(s, noise)))
        for axis, (loss, title) in zip(axes[4:], SHOWN.items(), strict=True):
            _paths(axis, title, truth, _learned(maps["iSD", loss, "random"], truth))
        return to_png(drawn)


def _eigenvalues(axis: Axes) -> None:
    """Of every objective at the data's flow map, in the metric of N, without an anchor and with one of weight 1."""
    case = gaussian()
    family, quadrature = Tangent(case, exact(case), (1, 2), (2, 3)), points(case)
    metric = gram(features(family, quadrature), quadrature.weight)
    anchor = jacobian(family, anchor_error, case)
    for height, error in enumerate(ERRORS.values()):
        alone = jacobian(family, error, case)
        for shift, matrix, colour in ((-0.15, alone, 1), (0.15, alone + anchor, 0)):
            values = spectrum(matrix, metric)
            values = torch.where(values.abs() < ZERO, 0.0, values)
            axis.plot(values, [height + shift] * len(values), "o", color=LIGHT.colour(colour), alpha=0.6, mew=0)
    axis.axvline(0, color=LIGHT.muted, linewidth=1)
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(-40, 0.4)
    axis.set_xticks([-10, -1, 0], ["−10", "−1", "0"])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_yticks(range(len(ERRORS)), list(ERRORS))
    axis.invert_yaxis()
    axis.set_title("Eigenvalues at the data's flow map")
    axis.set_xlabel("real part; orange: no anchor, blue: anchor of weight 1")


def _stability(axis: Axes, rows: list[Row]) -> None:
    """The largest real part at the data's flow map against the anchor's weight."""
    for index, row in enumerate(rows):
        axis.plot(WEIGHTS, row["curve"], color=LIGHT.colour(index), label=row["objective"])
    for weight, name in ((1.0, "together"), (rows[0]["apart"], "apart")):
        axis.axvline(weight, color=LIGHT.muted, linewidth=1, linestyle=(0, (5, 3)))
        axis.annotate(f" {name}", (weight, 0.97), xycoords=("data", "axes fraction"), color=LIGHT.muted, va="top")
    axis.axhline(0, color=LIGHT.muted, linewidth=1)
    axis.set_xscale("log")
    axis.set_ylim(-1.3, 0.6)
    axis.set_title("Stability in a shared family")
    axis.set_xlabel("weight of the anchor")
    axis.set_ylabel("largest real part; above 0 unstable")
    axis.legend(loc="lower left", ncols=2, columnspacing=1.0, handlelength=1.2)


def _errors(axis: Axes, rows: list[Row]) -> None:
    """Error against inconsistency, a mark a seed."""
    for row in rows:
        if row["loss"] in SHOWN:
            colour = LIGHT.colour(list(OBJECTIVES).index(row["objective"]))
            marker, face = ("o", colour) if row["loss"] == "both terms" else ("^", "none")
            axis.plot(row["inconsistency"], row["error"], marker, color=colour, markerfacecolor=face)
    handles = [Line2D([], [], color=LIGHT.colour(i), linewidth=4) for i in range(len(OBJECTIVES))]
    axis.legend(handles, list(OBJECTIVES), loc="lower left", ncols=2, columnspacing=1.0, handlelength=1.0)
    for each, scale in ((axis.xaxis, axis.set_xscale), (axis.yaxis, axis.set_yscale)):
        scale("log")
        each.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        each.set_minor_locator(NullLocator())
        each.set_major_formatter(FuncFormatter(tick))
    axis.set_title("Trained networks")
    axis.set_xlabel("inconsistency; triangles: no anchor")
    axis.set_ylabel("error to the data's flow map")


def _learned(flow_map: FlowMap, truth: Truth) -> Callable[[float], Tensor]:
    """Jumps of the first seed's network from the noise to a time."""

    def jumped(s: float) -> Tensor:
        with torch.no_grad():
            whole: Tensor = flow_map.jump(truth.noise, at(1.0, truth.noise), at(s, truth.noise))
        return whole[:DRAWN]

    return jumped


def _paths(axis: Axes, title: str, truth: Truth, jumped: Callable[[float], Tensor]) -> None:
    """X(x, 1, s) as s falls from 1 to 0, its ends, and the data's samples in grey."""
    states = torch.stack([truth.noise[:DRAWN], *(jumped(s) for s in torch.linspace(0.95, 0, 20).tolist())])
    axis.scatter(*truth.samples.T, s=4, color=LIGHT.line, zorder=1)
    axis.plot(states[..., 0], states[..., 1], color=LIGHT.muted, linewidth=0.5, alpha=0.6, zorder=2)
    axis.scatter(*states[-1].T, s=9, color=LIGHT.colour(1), zorder=3)
    axis.set_aspect("equal")
    axis.set_xlim(-3.2, 3.8)
    axis.set_ylim(-3.0, 3.4)
    axis.set_title(title)


def digit_rows() -> list[Row]:
    """iSD on digits, a row for each loss and learning rate."""
    return [{"kind": "digits", "loss": loss, "lr": lr} | digits(loss, lr) for loss, lr in DIGITS]


def digit_table(rows: list[Row]) -> str:
    """A line for each run, and one for the translation by the data's mean."""
    heads = ("digits, iSD", "anchor", "distill", "variance", "mean", "classes")
    lines = [(f"{row['loss']}, {row['lr']:g}", *(number(row[key]) for key in heads[1:])) for row in rows]
    known = (rows[0]["translation"], 0.0, rows[0]["noise_variance"], 0.0, rows[0]["noise_classes"])
    return aligned([Table(heads, (*lines, ("x + m", *map(number, known))))])


def kept_digits() -> list[Row]:
    """The rows of an earlier run."""
    return [row for row in json.loads(RESULTS.read_text()) if row["kind"] == "digits"] if RESULTS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", action="store_true", help="train on digits too")
    with_digits = parser.parse_args().digits
    parts = (fixed_points(), thresholds(), slopes())
    print(matrices(), fixed_point_table(parts[0]), threshold_table(parts[1]), slope_table(parts[2]), sep="\n\n")
    truth = Truth.draw()
    trained, maps = networks(truth)
    print("", network_table(trained), sep="\n")
    write_atomically(FIGURE, figure([*parts[1], *trained], maps, truth))
    seen = digit_rows() if with_digits else kept_digits()
    if seen:
        print("", digit_table(seen), sep="\n")
    kept = [{k: v for k, v in row.items() if k != "curve"} for part in (*parts, trained, seen) for row in part]
    write_atomically(RESULTS, json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
