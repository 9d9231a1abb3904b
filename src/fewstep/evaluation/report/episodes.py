"""A policy's rollouts on the report page: who reached the goal, how often, how fast, by which way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.evaluation.report.numbers import NOTHING, finite, number

Row = Mapping[str, Any]


def episode_section(rows: Sequence[Row]) -> str:
    """A table for each task and set of starts, a line for each row of rollouts.json; empty without rows."""
    if not rows:
        return ""
    groups = dict.fromkeys((row["task"], row["first_seed"], row["episodes"]) for row in rows)
    parts = [
        _table([row for row in rows if (row["task"], row["first_seed"], row["episodes"]) == group]) for group in groups
    ]
    return "<section>\n<h2>Success in the task</h2>\n" + "\n".join(parts) + "\n</section>"


def _table(rows: Sequence[Row]) -> str:
    routes = sorted({name for row in rows for name in row["routes"]})
    scored = any(abs(row["score"] - row["success"]) > 1e-9 for row in rows)
    heads = ["Method", "Calls", "Success", "95 %", "Length", *(["Score"] if scored else []), *routes, "ms"]
    first = rows[0]
    lines = "\n".join(_line(row, routes, scored) for row in sorted(rows, key=lambda row: (row["method"], row["steps"])))
    errors = [f"{row['method']}: {error}" for row in rows for error in row["errors"]]
    unseen = ", which no demonstration had" if first["first_seed"] >= FIRST_TEST_SEED else ""
    note = (
        f"{escape(str(first['task']))}: {first['episodes']} episodes from the starts {first['first_seed']} on{unseen}. "
        "Network calls for each decision, which gives several actions; success with Wilson's interval; mean length of "
        "all episodes in actions; "
        + ("score: the task's own measure at its best; " if scored else "")
        + ("which way episodes went; " if routes else "")
        + "median time of a decision for one episode alone."
    )
    failed = "".join(f'<p class="note">Simulation failed, {escape(error)}</p>\n' for error in errors)
    columns = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    return (
        f'<div class="scroll card"><table class="figures">\n<thead><tr>{columns}</tr></thead>\n'
        f'<tbody>{lines}</tbody>\n</table></div>\n<p class="note">{note}</p>\n{failed}'
    )


def _line(row: Row, routes: Sequence[str], scored: bool) -> str:
    cells = [
        str(row["steps"] or NOTHING),
        f"{row['successes']} of {row['episodes']}",
        f"{row['low']:.2f} to {row['high']:.2f}",
        number(finite(row, "mean_steps")),
        *([number(finite(row, "score"))] if scored else []),
        *(str(row["routes"].get(name, 0)) for name in routes),
        number(finite(row, "latency_ms")),
    ]
    shown = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr><th scope="row">{escape(str(row["method"]))}</th>{shown}</tr>'
