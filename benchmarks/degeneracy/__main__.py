"""What does self-distillation converge to without its anchor, and with a weak one?

First the expected updates on Gaussian data: are they zero at the data's flow map and at others, which eigenvalues have
their Jacobians there, how much anchor does stability need? Then small networks, trained by the library's objectives
with both of their terms, with the distillation alone, and with each term normalised by its own loss.
"""

from statistics import fmean

from benchmarks.degeneracy.expected import ZERO, fixed_points, matrices, slopes, thresholds
from benchmarks.degeneracy.figure import draw
from benchmarks.degeneracy.networks import DIGITS, EVERY, PLAN, Truth, on_digits, train
from benchmarks.harness import FIGURES, RESULTS, Row, Study, chosen, grouped, interval, markdown, read, write
from fewstep.evaluation.report.numbers import NOTHING, number

STORED = RESULTS / "degeneracy.json"
AT = {"exact": "data's map", "identity": "identity", "contraction, k = 9": "contraction to -1, `k = 9`"}
CRITICAL = ("iSD", "LSD", "PSD", "ESD", "MeanFlow")


def tables() -> dict[str, str]:
    """The page's tables."""
    found = grouped(read(STORED), lambda row: str(row["kind"]))
    fixed, networks = found["fixed point"], found["network"]
    others = grouped((row for row in networks if row["loss"] not in EVERY), lambda row: str(row["loss"]))
    return {
        "Jacobians of iSD": matrices(),
        "Zeros and eigenvalues, linear path": fixed_point_table(chosen(fixed, path="linear"), "linear"),
        "Zeros and eigenvalues, trigonometric path": fixed_point_table(chosen(fixed, path="trig"), "trigonometric"),
        "The least weight of the anchor": threshold_table(found["threshold"]),
        "Where one slope settles": slope_table(found["slope"]),
        "iSD on digits": digit_table(found["digits"]),
        "Networks, with anchor and without": network_table(networks),
        "Networks, other weights": markdown(
            ("iSD", "inconsistency", "error", "variance"), [(loss, *measured(own)) for loss, own in others.items()]
        ),
    }


def fixed_point_table(rows: list[Row], path: str) -> str:
    """A line for each map and objective of a path."""
    heads = ("update", "null eigenvalues", "largest other", "update with anchor", "largest with anchor")
    lines = []
    for row in rows:
        still, anchored = row["update"] < ZERO, row["update_anchored"] < ZERO
        alone = (0, row["null"], f"{row['largest']:.4f}") if still else (f"{row['update']:.1f}", NOTHING, NOTHING)
        moved = f"{row['update_anchored']:.1f}"
        held = (0, f"{row['largest_anchored']:.4f}") if anchored else (moved, "no fixed point")
        lines.append((f"{AT[row['map']]}: {row['objective']}", *alone, *held))
    return markdown((f"map, {path} path", *heads), lines)


def threshold_table(rows: list[Row]) -> str:
    """Critical weights, a line for each width of the data and degree; 0: none down to 1e-4."""
    heads = ("sd of data, degree", *CRITICAL, "enough for iSD, `C^2/2`", "weight if normalised apart")
    lines = []
    for (sd, degree), group in grouped(rows, lambda row: (row["sd"], row["degree"])).items():
        weights = {row["objective"]: row["critical"] for row in group}
        shown = (f"{weights[name]:.3f}" if weights[name] else "0" for name in CRITICAL)
        lines.append((f"{sd:g}, {degree}", *shown, f"{group[0]['sufficient']:.3f}", f"{group[0]['apart']:.4f}"))
    return markdown(heads, lines)


def slope_table(rows: list[Row]) -> str:
    """A line for each width of the data."""
    keys = ("anchor alone", "weight 1", "weight 0.1", "weight 0.01")
    lines = []
    for row in rows:
        apart, weight = row["apart"], number(row["apart's weight"], 2)
        lines.append((f"{row['sd']:g}", *(number(row[key]) for key in keys), f"{apart:.3f} ({weight})"))
    return markdown(("sd", *keys[:2], "0.1", "0.01", "normalised apart (weight there)"), lines)


def digit_table(rows: list[Row]) -> str:
    """A line for each run, and one for the translation by the data's mean."""
    heads = (
        "digits, iSD", "learning rate", "anchor", "distill", "variance of samples / data", "distance of means",
        "variance between classes / data",
    )  # fmt: skip
    keys, first = ("anchor", "distill", "variance", "mean", "classes"), rows[0]
    lines = [(row["loss"], f"{row['lr']:g}", *(number(row[key]) for key in keys)) for row in rows]
    known = map(number, (first["translation"], 0.0, first["noise_variance"], 0.0))
    by_chance = f"{number(first['noise_classes'])} by chance"
    return markdown(heads, [*lines, ("the map `x + m`", NOTHING, *known, by_chance)])


def network_table(rows: list[Row]) -> str:
    """A line for each objective and start."""
    lines = []
    for (name, start), own in grouped(rows, lambda row: (row["objective"], row["start"])).items():
        title = name if start == "random" else f"{name}, from a collapsed start"
        lines.append((title, *(figure for loss in EVERY for figure in measured(chosen(own, loss=loss)))))
    heads = ("with anchor: inconsistency", "error", "variance", "without: inconsistency", "error", "variance")
    return markdown(("", *heads), lines)


def measured(rows: list[Row]) -> tuple[str, str, str]:
    """Means over seeds of inconsistency, error (lowest to highest) and variance."""
    inconsistency, error, variance = ([row[key] for row in rows] for key in ("inconsistency", "error", "variance"))
    return (f"{fmean(inconsistency):.3f}", interval(error, 3, "–"), f"{fmean(variance):.2f}")


STUDY = Study("degeneracy", tables)


def run(digits: bool = False) -> None:
    """Compute the updates, train the networks, draw the figure: three minutes.

    Args:
        digits: train on digits too, a minute more; without it the rows of an earlier run are kept
    """
    rows, maps, truth = [*fixed_points(), *thresholds(), *slopes()], {}, Truth()
    for cell in PLAN:
        maps[cell], found = train(*cell, truth)
        rows += found
    draw(rows, maps, truth, FIGURES / "degeneracy.png")
    rows += [on_digits(*cell) for cell in DIGITS] if digits else chosen(read(STORED), kind="digits")
    write(STORED, [{key: value for key, value in row.items() if key != "curve"} for row in rows])
    print(STUDY.text())


if __name__ == "__main__":
    STUDY.main(run=run)
