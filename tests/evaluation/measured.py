"""What `fewstep advise` cites, read off the studies' own files."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]


def figures_of(entry: Row) -> tuple[dict[int, float], float | None, float | None]:
    """(figure by calls, seconds of training, the real data's own figure) of an entry of measured.json.

    Means over seeds; of policies the share of all episodes at the goal.
    """
    file = ROOT / entry["file"]
    text = file.read_text()
    rows = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    own = [row for row in rows if all(row.get(key) == value for key, value in entry["where"].items())]
    assert own, entry
    real = [row["frechet"] for row in rows if row.get("nfe") == 0]
    if "successes" in own[0]:
        return _of_policies(own), max(row["seconds"] for row in own), None
    if "frechet_1" in own[0]:
        figures = {calls: fmean(row[f"frechet_{calls}"] for row in own) for calls in (1, 2, 4)}
        return figures, fmean(row["seconds"] for row in own), None
    key = "nfe" if "nfe" in own[0] else "calls"
    figures = {calls: fmean(row["frechet"] for row in own if row[key] == calls) for calls in {row[key] for row in own}}
    return figures, own[0].get("seconds"), real[0] if real else None


def _of_policies(rows: list[Row]) -> dict[int, float]:
    shares = {}
    for steps in {row["steps"] for row in rows}:
        same = [row for row in rows if row["steps"] == steps]
        shares[steps] = sum(row["successes"] for row in same) / sum(row["episodes"] for row in same)
    return shares
