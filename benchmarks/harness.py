"""What every study stands on: a grid of cells kept as JSON lines, tables and pages, and one command line.

A cell is one run of a study's plan. It is known by its label, the values of a few fields that the study names (method,
data set, seed, ...), so that a class or field of the library may change its name and stored cells are still found.
Every row also holds a digest of all settings that were trained and measured (`settings`), which only says whether they
are still today's: `plan` counts the cells where they are not, `run` does not measure them again, and `rekey` writes
today's digests where nothing but names has changed.

`python -m benchmarks.STUDY COMMAND`: the study's own commands measure and store; `table` prints what is stored; `page`
also writes it between the marks `<!-- table: STUDY -->` (all its tables), or `<!-- table: STUDY: TITLE -->`, and
`<!-- end of table -->` of every page in docs/, and draws the study's figure.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from fewstep.utils.files import write_atomically
from fewstep.utils.serialization import to_json

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
FIGURES = DOCS / "figures"
MARK = re.compile(r"(<!-- table: (\w+)(?:: ([^>]+?))? -->\n).*?(<!-- end of table -->)", re.DOTALL)
Row = dict[str, Any]
C = TypeVar("C")
Key = TypeVar("Key")


def digest(*parts: Any) -> str:
    """Eight hex digits of dataclasses and plain values. A field that came later counts only where it is not at what its
    absence meant, so that digests of older settings stay.
    """
    record = json.dumps([to_json(part, terse=True) for part in parts])
    return hashlib.blake2b(record.encode(), digest_size=4).hexdigest()


@dataclass(frozen=True)
class Store:
    """Rows in a file of JSON lines. label: the fields that name a cell; absent: what a row without one means."""

    file: Path
    label: tuple[str, ...]
    absent: Mapping[str, Any] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """In the order they were stored; a line that was cut off, or that has no label, is left out."""
        found: list[Row] = []
        for line in self.file.read_text().splitlines() if self.file.is_file() else []:
            with contextlib.suppress(ValueError, KeyError):
                row = json.loads(line)
                self.name(row)
                found.append(row)
        return found

    def name(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """The label of a row."""
        return tuple((self.absent | row)[name] for name in self.label)  # type: ignore[operator]

    def names(self) -> set[tuple[Any, ...]]:
        return {self.name(row) for row in self.rows()}

    def add(self, rows: Iterable[Row]) -> None:
        """All rows of a cell at once, so that it is stored whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(lines(rows))

    def rewrite(self, rows: Iterable[Row]) -> None:
        write_atomically(self.file, lines(rows))


@dataclass(frozen=True)
class Grid(Generic[C]):
    """The cells of a study. plan: all of them, in order; label: the fields of a cell that its rows are known by;
    settings: the digest of what it trains and how it is measured.
    """

    store: Store
    plan: Callable[[], Iterable[C]]
    label: Callable[[C], Row]
    settings: Callable[[C], str]

    def cells(self) -> dict[tuple[Any, ...], C]:
        """Label -> cell of the whole plan."""
        return {self.store.name(self.label(cell)): cell for cell in self.plan()}

    def rows(self) -> list[Row]:
        """Stored rows of the plan's cells."""
        planned = self.cells()
        return [row for row in self.store.rows() if self.store.name(row) in planned]

    def missing(self) -> int:
        return len(self.cells().keys() - self.store.names())

    def run(self, cells: Iterable[C], measure: Callable[[C], list[Row]], worker: str = "0/1") -> None:
        """Measure the cells that have no row yet; worker: "i/n" takes every n-th from the i-th."""
        part, workers = (int(number) for number in worker.split("/"))
        for cell in list(cells)[part::workers]:
            if self.store.name(self.label(cell)) in self.store.names():
                continue
            rows = measure(cell)
            self.store.add(self.label(cell) | {"settings": self.settings(cell)} | row for row in rows)
            for row in rows:
                shown = {key: value for key, value in row.items() if isinstance(value, int | float)}
                print(f"{', '.join(map(str, self.label(cell).values()))}: {shown}", flush=True)

    def changed(self) -> dict[tuple[Any, ...], str]:
        """Label -> today's digest of the cells that were stored with another."""
        cells = self.cells()
        stored = {self.store.name(row): row.get("settings", "") for row in self.rows()}
        today = {name: self.settings(cells[name]) for name in stored}
        return {name: own for name, own in today.items() if own != stored[name]}

    def rekey(self) -> int:
        """Give stored cells the digests of today's settings; how many had others."""
        changed = self.changed()
        rows = [
            row | ({"settings": changed[self.store.name(row)]} if self.store.name(row) in changed else {})
            for row in self.store.rows()
        ]
        if changed:
            self.store.rewrite(rows)
        return len(changed)


@dataclass(frozen=True)
class Study:
    """A study's name; its tables by title, in markdown, from what is stored; what `page` writes besides; its cells."""

    name: str
    tables: Callable[[], dict[str, str]]
    write: Callable[[], None] = lambda: None
    grid: Grid[Any] | None = None

    def text(self, title: str | None = None) -> str:
        """The table of that title, or all under their titles."""
        tables = self.tables()
        if title is not None:
            return tables[title]
        return "\n\n".join(f"### {name}\n\n{table}" for name, table in tables.items() if table)

    def main(self, **commands: Callable[..., None]) -> None:
        """The command line. commands: what measures and stores."""

        def table(title: Annotated[str, tyro.conf.Positional] = "") -> None:
            """Print the stored tables, all or those with TITLE in their title."""
            print("\n\n".join(f"### {k}\n\n{v}" for k, v in self.tables().items() if v and title.lower() in k.lower()))

        def page() -> None:
            """Print the stored tables, write them into docs/, and draw the study's figure."""
            self.write()
            table()
            for file, text in self.pages():
                write_atomically(file, text)

        def plan() -> None:
            """Count the cells that are stored, missing, and stored with other settings than today's."""
            assert self.grid is not None
            print(f"{len(self.grid.cells())} cells: {self.grid.missing()} missing, ", end="", flush=True)
            print(f"{len(self.grid.changed())} stored with other settings")

        def rekey() -> None:
            """Give stored cells the digests of today's settings: only where nothing but names has changed."""
            assert self.grid is not None
            print(f"{self.grid.rekey()} cells have a new digest")

        shared = {"table": table, "page": page} | ({"plan": plan, "rekey": rekey} if self.grid else {})
        named = {name.replace("_", "-"): command for name, command in (commands | shared).items()}
        tyro.extras.subcommand_cli_from_dict(named, prog=f"python -m benchmarks.{self.name}")

    def pages(self) -> Iterator[tuple[Path, str]]:
        """Pages that have a place for these tables, and what they say then."""
        for file in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]:
            before = file.read_text()
            after = MARK.sub(self._filled, before)
            if f"<!-- table: {self.name}" in before:
                yield file, after

    def _filled(self, found: re.Match[str]) -> str:
        if found[2] != self.name:
            return found[0]
        return f"{found[1]}\n{self.text(found[3])}\n\n{found[4]}"


def lines(rows: Iterable[Row]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(file: Path) -> list[Row]:
    """The rows of a JSON file, none where it is not there."""
    found: list[Row] = json.loads(file.read_text()) if file.is_file() else []
    return found


def write(file: Path, rows: Any) -> None:
    write_atomically(file, json.dumps(rows, indent=1) + "\n")


def show(rows: Iterable[Row]) -> None:
    """A line a row."""
    for row in rows:
        shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print("  ".join(shown), flush=True)


def rounded(value: Any, digits: int = 5) -> Any:
    """Floats to so many digits, in lists and dicts too; JSON knows no NaN: None."""
    if isinstance(value, dict):
        return {key: rounded(each, digits) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each, digits) for each in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def grouped(rows: Iterable[C], key: Callable[[C], Key]) -> dict[Key, list[C]]:
    """Rows by key, keys in the order of their first row."""
    found: dict[Key, list[C]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def interval(values: Sequence[float], digits: int = 2, between: str = "-") -> str:
    """Mean (smallest to largest); empty without values."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}{between}{max(values):.{digits}f})"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; empty without rows."""
    if not rows:
        return ""
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *rows))


def take_turns(
    jobs: Mapping[Key, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Key, list[float]]:
    """Seconds of every job in every round, in turns, so that a noisy machine slows all alike; two rounds warm up."""
    spent: dict[Key, list[float]] = {key: [] for key in jobs}
    for turn in range(rounds + 2):
        for key, job in jobs.items():
            start = clock()
            job()
            if turn >= 2:
                spent[key].append(clock() - start)
    return spent
