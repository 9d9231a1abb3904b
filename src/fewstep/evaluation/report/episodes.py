"""A policy's rollouts on the report page: who reached the goal, how often, how fast, by which way."""

from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.evaluation.report.numbers import NOTHING, finite, number

Row = Mapping[str, Any]


def episode_tables(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Values of a table for each task and set of starts, a line for each row of rollouts.json."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["first_seed"], row["episodes"]), []).append(row)
    return [_table(group) for group in groups.values()]


def _table(rows: Sequence[Row]) -> dict[str, Any]:
    routes = sorted({name for row in rows for name in row["routes"]})
    scored = any(abs(row["score"] - row["success"]) > 1e-9 for row in rows)
    first, ordered = rows[0], sorted(rows, key=lambda row: (row["method"], row["steps"]))
    return {
        "heads": ["Method", "Calls", "Success", "95 %", "Length", *(["Score"] if scored else []), *routes, "ms"],
        "rows": [_line(row, routes, scored) for row in ordered],
        **{key: first[key] for key in ("task", "episodes", "first_seed")},
        "unseen": first["first_seed"] >= FIRST_TEST_SEED,
        "scored": scored,
        "routes": routes,
        "errors": [f"{row['method']}: {error}" for row in rows for error in row["errors"]],
    }


def _line(row: Row, routes: Sequence[str], scored: bool) -> list[str]:
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
