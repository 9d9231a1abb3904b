"""What `fewstep advise` cites: src/fewstep/evaluation/advice/measured.json, its figures read off the studies' files.

An entry of that file says by hand which rows of which file it is about (`file`, `where`), and what they were:
situation, recipe, objective, network, data, machine. `python -m benchmarks.advice page` reads its figures, seconds and
the real data's own distance anew, after a study has more seeds, and writes the table of docs/guides/which-one.md.
"""

import json
from collections.abc import Iterator
from statistics import fmean

from benchmarks.harness import ROOT, Row, Study, markdown, read
from fewstep.utils.files import write_atomically

MEASURED = ROOT / "src" / "fewstep" / "evaluation" / "advice" / "measured.json"
FEW = ("1", "2", "4")
HEADS = ("recipe", "objective", "data", "1 call", "2 calls", "4 calls", "more", "real data", "time")


def entries() -> list[Row]:
    """The entries with today's figures: of those calls that they cite, rounded to three digits."""
    return [entry | measured(entry) for entry in read(MEASURED)]


def measured(entry: Row) -> Row:
    """figures by calls, seconds of training (None where not stored), the real data's own figure (or None) of an entry.

    Means over seeds; of policies the share of all episodes at the goal.
    """
    file = ROOT / entry["file"]
    rows = read(file) if file.suffix == ".json" else [json.loads(line) for line in file.read_text().splitlines()]
    own = [row for row in rows if all(row.get(key) == value for key, value in entry["where"].items())]
    if not own:
        raise LookupError(f"{entry['file']} has no row with {entry['where']}")
    figures, real = dict(_figures(own)), next((row["frechet"] for row in rows if row.get("nfe") == 0), None)
    seconds = fmean(row["seconds"] for row in own) if "seconds" in own[0] else None
    return {
        "figures": {calls: round(figures[calls], 3) for calls in entry["figures"]},
        "real": None if real is None else round(real, 3),
        "seconds": None if seconds is None else round(seconds, 1),
    }


def _figures(rows: list[Row]) -> Iterator[tuple[str, float]]:
    """(calls, figure) of rows of any of the studies."""
    if "frechet_1" in rows[0]:
        yield from ((calls, fmean(row[f"frechet_{calls}"] for row in rows)) for calls in FEW)
        return
    key = next(name for name in ("steps", "nfe", "calls") if name in rows[0])
    for calls in sorted({row[key] for row in rows}):
        same = [row for row in rows if row[key] == calls]
        if "successes" in same[0]:
            yield str(calls), sum(row["successes"] for row in same) / sum(row["episodes"] for row in same)
        else:
            yield str(calls), fmean(row["frechet"] for row in same)


def table() -> str:
    """All entries, nearest distance or share of episodes at the goal by calls."""
    return markdown(HEADS, [_line(entry) for entry in entries()])


def _line(entry: Row) -> tuple[str, ...]:
    figures = {calls: _shown(entry, value) for calls, value in entry["figures"].items()}
    more = [f"{value} in {calls}" for calls, value in figures.items() if calls not in FEW]
    time = f"{entry['seconds']:,.0f} s, {entry['machine']}" if entry["seconds"] else ""
    real = "" if entry["real"] is None else f"{entry['real']:.2f}"
    few = [figures.get(calls, "") for calls in FEW]
    return (f"`{entry['recipe']}`", entry["objective"], entry["data"], *few, ", ".join(more), real, time)


def _shown(entry: Row, value: float) -> str:
    return f"{100 * value:.0f} %" if entry["situation"] == "policy" else f"{value:.3g}"


def write() -> None:
    """The figures into the package's file, an entry a line."""
    lines = ",\n ".join(json.dumps(entry) for entry in entries())
    write_atomically(MEASURED, f"[\n {lines}\n]\n")


STUDY = Study("advice", lambda: {"Measured": table()}, write)

if __name__ == "__main__":
    STUDY.main()
