"""The tables of the degeneracy study, from stored rows."""

import statistics

from benchmarks.degeneracy.expected import ZERO, gaussian
from benchmarks.degeneracy.gaussian import ERRORS, Tangent, anchor_error, exact, jacobian, spectrum
from benchmarks.harness import RESULTS, Row, chosen, grouped, interval, markdown, read
from fewstep.evaluation.report.numbers import NOTHING, number

STORED = RESULTS / "degeneracy.json"
AT = {"exact": "data's map", "identity": "identity", "contraction, k = 9": "contraction to -1, `k = 9`"}
APART = "apart's weight"
CRITICAL = ("iSD", "LSD", "PSD", "ESD", "MeanFlow")
LOSSES = {
    "both terms": "no weights", "together, by sample": "normalised together", "apart, by sample": "normalised apart",
}  # fmt: skip


def tables() -> dict[str, str]:
    """The page's tables."""
    found = grouped(read(STORED), lambda row: str(row["kind"]))
    networks = found["network"]
    others = [row for row in networks if row["loss"] not in ("both terms", "no anchor")]
    return {
        "Zeros and eigenvalues, linear path": fixed_point_table(found["fixed point"], "linear"),
        "Zeros and eigenvalues, trigonometric path": fixed_point_table(found["fixed point"], "trig"),
        "The least weight of the anchor": threshold_table(found["threshold"]),
        "Where one slope settles": slope_table(found["slope"]),
        "iSD on digits": digit_table(found["digits"]),
        "Networks, with anchor and without": network_table(networks),
        "Networks, other weights": markdown(
            ("iSD", "inconsistency", "error", "variance"),
            [(loss, *measured(others, loss=loss)) for loss in dict.fromkeys(row["loss"] for row in others)],
        ),
    }


def matrices() -> str:
    """Without an anchor and with one of weight 1, in the smallest family; order theta, c, mu, d."""
    case = gaussian()
    family = Tangent(case, exact(case))
    alone, anchor = jacobian(family, ERRORS["iSD"], case), jacobian(family, anchor_error, case)
    lines = []
    for title, matrix in (("no anchor", alone), ("anchor of weight 1", alone + anchor)):
        cells = (" ".join(f"{round(value, 5) + 0.0:9.5f}" for value in row) for row in matrix.tolist())
        values = ", ".join(f"{round(value, 5) + 0.0:.5f}" for value in spectrum(matrix).tolist())
        lines += [title, *cells, f"eigenvalues {values}"]
    return "\n".join(["```", *lines, "```"])


def fixed_point_table(rows: list[Row], path: str) -> str:
    """A line for each map and objective of a path."""
    heads = ("update", "null eigenvalues", "largest other", "update with anchor", "largest with anchor")
    lines = []
    for row in chosen(rows, path=path):
        still, anchored = row["update"] < ZERO, row["update_anchored"] < ZERO
        alone = (str(row["null"]), f"{row['largest']:.4f}") if still else (NOTHING, NOTHING)
        lines.append(
            (
                f"{AT[row['map']]}: {row['objective']}", "0" if still else f"{row['update']:.1f}", *alone,
                "0" if anchored else f"{row['update_anchored']:.1f}",
                f"{row['largest_anchored']:.4f}" if anchored else "no fixed point",
            )
        )  # fmt: skip
    return markdown((f"map, {'trigonometric' if path == 'trig' else path} path", *heads), lines)


def threshold_table(rows: list[Row]) -> str:
    """Critical weights, a line for each width of the data and degree; 0: none down to 1e-4."""
    heads = ("sd of data, degree", *CRITICAL, "enough for iSD, `C^2/2`", "weight if normalised apart")
    lines = []
    for sd, degree in dict.fromkeys((row["sd"], row["degree"]) for row in rows):
        own = {row["objective"]: row for row in chosen(rows, sd=sd, degree=degree)}
        weights = (own[name]["critical"] for name in CRITICAL)
        shown = (f"{weight:.3f}" if weight else "0" for weight in weights)
        first = own["iSD"]
        lines.append((f"{sd:g}, {degree}", *shown, f"{first['sufficient']:.3f}", f"{first['apart']:.4f}"))
    return markdown(heads, lines)


def slope_table(rows: list[Row]) -> str:
    """A line for each width of the data."""
    keys = ("anchor alone", "weight 1", "weight 0.1", "weight 0.01")
    heads = ("sd", *keys[:2], "0.1", "0.01", "normalised apart (weight there)")
    lines = [
        (f"{row['sd']:g}", *(number(row[key]) for key in keys), f"{row['apart']:.3f} ({number(row[APART], 2)})")
        for row in rows
    ]
    return markdown(heads, lines)


def digit_table(rows: list[Row]) -> str:
    """A line for each run, and one for the translation by the data's mean."""
    heads = (
        "digits, iSD", "learning rate", "anchor", "distill", "variance of samples / data", "distance of means",
        "variance between classes / data",
    )  # fmt: skip
    keys = ("anchor", "distill", "variance", "mean", "classes")
    lines = [
        (LOSSES[row["loss"]], f"{row['lr']:.0e}".replace("e-0", "e-"), *(number(row[key]) for key in keys))
        for row in rows
    ]
    known = (rows[0]["translation"], 0.0, rows[0]["noise_variance"], 0.0)
    by_chance = f"{number(rows[0]['noise_classes'])} by chance"
    return markdown(heads, [*lines, ("the map `x + m`", NOTHING, *map(number, known), by_chance)])


def network_table(rows: list[Row]) -> str:
    """A line for each objective and start."""
    lines = []
    for name, start in dict.fromkeys((row["objective"], row["start"]) for row in rows):
        own = chosen(rows, objective=name, start=start)
        title = name if start == "random" else f"{name}, from a collapsed start"
        lines.append((title, *measured(own, loss="both terms"), *measured(own, loss="no anchor")))
    heads = ("with anchor: inconsistency", "error", "variance", "without: inconsistency", "error", "variance")
    return markdown(("", *heads), lines)


def measured(rows: list[Row], loss: str) -> tuple[str, str, str]:
    """Means over seeds of inconsistency, error (lowest to highest) and variance."""
    own = chosen(rows, loss=loss)
    inconsistency, error, variance = ([row[key] for row in own] for key in ("inconsistency", "error", "variance"))
    return (f"{statistics.fmean(inconsistency):.3f}", interval(error, 3, "–"), f"{statistics.fmean(variance):.2f}")
