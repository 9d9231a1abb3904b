"""Figures of merit on a run's page: a figure and a table for each extractor of features, and of a policy's rollouts who
reached the goal, how often, how fast, by which way.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.evaluation.metrics.measure import ENOUGH
from fewstep.evaluation.report.figures import quality_curves
from fewstep.evaluation.report.html import Plot, plot
from fewstep.evaluation.report.numbers import NOTHING, count, finite, number, with_error

Row = Mapping[str, Any]
_MOST_DRAWN, _MOST_LINES = 8, 40  # extractors, and methods in a figure: no run has as many


def quality_parts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the section shows of the first eight extractors, each apart: distances between features do not compare."""
    extractors = list(dict.fromkeys(str(row["extractor"]) for row in rows))
    return [_part(name, [row for row in rows if str(row["extractor"]) == name]) for name in extractors[:_MOST_DRAWN]]


def _part(extractor: str, rows: Sequence[Row]) -> dict[str, Any]:
    counts = sorted({int(n) for row in _sampled(rows) if (n := finite(row, "samples")) is not None})
    columns, best = _columns(rows), _best_at_equal_calls(rows)
    return {
        "extractor": extractor,
        "is_fid": extractor.startswith("inception"),
        "samples": " or ".join(f"{n:,}" for n in counts),
        "few": any((finite(row, "samples") or 0) < ENOUGH * (finite(row, "features") or 0) for row in rows),
        "references": " or ".join(dict.fromkeys(str(row["reference"]) for row in rows)),
        "figure": _figure(extractor, rows),
        "heads": list(columns),
        "groups": _groups(rows, columns, best),
        "has_best": bool(best),
    }


def _sampled(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if finite(row, "nfe") != 0]


def _figure(extractor: str, rows: Sequence[Row]) -> Plot | None:
    if all(finite(row, key) is None for row in rows for key in ("frechet", "accuracy", "precision", "recall")):
        return None
    shown = list(dict.fromkeys(str(row["method"]) for row in rows))[:_MOST_LINES]
    rows = [row for row in rows if row["method"] in shown]
    methods = ", ".join(dict.fromkeys(str(row["method"]) for row in _sampled(rows)))
    alt = f"Fréchet distance with features {extractor} against network calls: {methods}"
    return plot(lambda columns, dark: quality_curves(rows, columns=columns, dark=dark), 3, alt)


def _groups(
    rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]], best: frozenset[int]
) -> list[dict[str, Any]]:
    """Consecutive rows of one method under one heading, real data last; a cell is its text and whether it is best."""
    ordered = sorted(rows, key=lambda row: finite(row, "nfe") == 0)
    groups: list[dict[str, Any]] = []
    for (method, real), group in groupby(ordered, key=lambda row: (row["method"], finite(row, "nfe") == 0)):
        cells = [
            [(show(row), head == "Fréchet" and id(row) in best) for head, show in columns.items()] for row in group
        ]
        groups.append({"method": method, "real": real, "rows": cells})
    return groups


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
        columns["Accuracy"] = lambda row: NOTHING if (share := finite(row, "accuracy")) is None else f"{share:.1%}"
    if any(finite(row, "latency_ms") is not None for row in rows):
        columns["Latency (ms)"] = lambda row: number(finite(row, "latency_ms"))
    if len({finite(row, "samples") for row in rows}) > 1:
        columns["Samples"] = lambda row: count(finite(row, "samples"))
    if len({row["reference"] for row in rows}) > 1:
        columns["Reference"] = lambda row: str(row["reference"])
    return columns


def _best_at_equal_calls(rows: Sequence[Row]) -> frozenset[int]:
    """Identities of the rows with the lowest Fréchet distance among several methods with the same, positive NFE."""
    best = set()
    for nfe in {finite(row, "nfe") for row in rows} - {0.0, None}:
        same = [row for row in rows if finite(row, "nfe") == nfe]
        rivals = [(f, id(row)) for row in same if (f := finite(row, "frechet")) is not None]
        if len(rivals) > 1:
            best.add(min(rivals)[1])
    return frozenset(best)


def episode_tables(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Values of a table for each task and set of starts, a line for each row of rollouts.json."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["first_seed"], row["episodes"]), []).append(row)
    return [_episode_table(group) for group in groups.values()]


def _episode_table(rows: Sequence[Row]) -> dict[str, Any]:
    routes = sorted({name for row in rows for name in row["routes"]})
    scored = any(abs(row["score"] - row["success"]) > 1e-9 for row in rows)
    first, ordered = rows[0], sorted(rows, key=lambda row: (not row["steps"], row["method"], row["steps"]))
    return {
        "heads": ["Method", "Calls", "Success", "95 %", "Length", *(["Score"] if scored else []), *routes, "ms"],
        "own": ordered,
        "rows": [_episode_line(row, routes, scored) for row in ordered],
        **{key: first[key] for key in ("task", "episodes", "first_seed")},
        "unseen": first["first_seed"] >= FIRST_TEST_SEED,
        "scored": scored,
        "routes": routes,
        "errors": [f"{row['method']}: {error}" for row in rows for error in row["errors"]],
    }


def _episode_line(row: Row, routes: Sequence[str], scored: bool) -> list[str]:
    return [
        str(row["method"]),
        str(row["steps"] or NOTHING),
        f"{row['successes']} of {row['episodes']}",
        f"{row['low']:.2f} to {row['high']:.2f}",
        number(finite(row, "mean_steps")),
        *([number(finite(row, "score"))] if scored else []),
        *(str(row["routes"].get(name, 0)) for name in routes),
        number(finite(row, "latency_ms")),
    ]
