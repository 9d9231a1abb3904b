"""What every study stands on: a grid of cells kept as JSON lines, tables and pages, and one command line (README.md).

A cell is one run of a study's plan, known by its label: a class or field of the library may change its name and stored
cells are still found. Every row also holds a digest of all that was trained and measured (`settings`), which only says
whether that is still today's.
"""

import contextlib
import hashlib
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from tqdm import tqdm

import fewstep as fs
from fewstep.evaluation.report.canvas import LIGHT, figure_style, make_panels, to_png
from fewstep.training import Callbacks
from fewstep.training.loop import Trainer
from fewstep.utils.files import write_atomically
from fewstep.utils.serialization import to_json

ROOT = Path(__file__).parents[1]
RESULTS, DOCS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs", ROOT / "docs" / "figures"
NAMED = r"(?:: ([^>;]+?))?(?:;\s+columns: ([^>;]+?))?(?:;\s+rows: ([^>;]+?))?"
MARK = re.compile(rf"(<!-- table: (\w+){NAMED} -->\n).*?(<!-- end of table -->)", re.DOTALL)
QUIET = fs.Runtime(cpu=True, quiet=True)
Row = dict[str, Any]
Label, Words = tuple[Any, ...], tuple[str, ...]
C = TypeVar("C")
Key = TypeVar("Key")
Seeds = Annotated[tuple[int, ...], tyro.conf.arg(help="training seeds")]
Worker = Annotated[str, tyro.conf.arg(help="i/n takes every n-th cell, from the i-th")]
Cache = Annotated[Path | None, tyro.conf.arg(help="folder of trained feature extractors")]


def digest(*parts: Any) -> str:
    """Eight hex digits of dataclasses and plain values, whatever the order of fields. One that came later counts only
    where it is not at what its absence meant, so that digests of older settings stay.
    """
    record = json.dumps([to_json(part, terse=True) for part in parts], sort_keys=True)
    return hashlib.blake2b(record.encode(), digest_size=4).hexdigest()


@dataclass(frozen=True)
class Grid(Generic[C]):
    """The cells of a study, their rows in a file of JSON lines.

    label: the fields of a cell that its rows are known by; plan: all cells, in order; settings: the digest of what a
    cell trains and how it is measured; absent: what a row without a field means.
    """

    file: Path
    label: tuple[str, ...]
    plan: Callable[[], Iterable[C]]
    settings: Callable[[C], str]
    absent: Row = field(default_factory=dict)

    def name(self, row: Row) -> Label:
        """The label of a row."""
        return tuple((self.absent | row)[key] for key in self.label)

    def cells(self) -> dict[Label, C]:
        """Label -> cell of the whole plan."""
        return {self.name(asdict(cell)): cell for cell in self.plan()}  # type: ignore[call-overload]

    def stored(self) -> dict[Label, list[Row]]:
        """Label -> rows, in the order they were stored; a line that was cut off, or has no label, is left out."""
        found: dict[Label, list[Row]] = {}
        for line in self.file.read_text().splitlines() if self.file.is_file() else []:
            with contextlib.suppress(ValueError, KeyError):
                row = json.loads(line)
                found.setdefault(self.name(row), []).append(row)
        return found

    def rows(self) -> list[Row]:
        """Stored rows of the plan's cells."""
        planned = self.cells()
        return [row for name, rows in self.stored().items() if name in planned for row in rows]

    def missing(self) -> int:
        return len(self.cells().keys() - self.stored().keys())

    def run(self, cells: Iterable[C], measure: Callable[[C], list[Row]], worker: str = "0/1") -> None:
        """Measure the cells that have no row yet; worker: "i/n" takes every n-th from the i-th."""
        part, workers = (int(number) for number in worker.split("/"))
        for cell in list(cells)[part::workers]:
            label = asdict(cell)  # type: ignore[call-overload]
            if self.name(label) in self.stored():
                continue
            rows = [label | {"settings": self.settings(cell)} | row for row in measure(cell)]
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:  # all rows of a cell at once: it is stored whole or not at all
                file.write(lines(rows))
            show({key: value for key, value in row.items() if not isinstance(value, list | dict)} for row in rows)

    def changed(self) -> dict[Label, str]:
        """Label -> today's digest of the cells that were stored with another."""
        cells, stored = self.cells(), self.stored()
        today = {name: self.settings(cells[name]) for name in cells.keys() & stored.keys()}
        return {name: own for name, own in today.items() if own != stored[name][-1].get("settings", "")}

    def rekey(self) -> int:
        """Give stored cells the digests of today's settings; how many had others."""
        changed, stored = self.changed(), self.stored()
        for name, digest in changed.items():
            stored[name] = [row | {"settings": digest} for row in stored[name]]
        if changed:
            write_atomically(self.file, lines(row for rows in stored.values() for row in rows))
        return len(changed)


@dataclass(frozen=True)
class Study:
    """A study's name; its tables by title, in markdown, from what is stored; what `page` writes besides; its cells."""

    name: str
    tables: Callable[[], dict[str, str]]
    write: Callable[[], None] = lambda: None
    grid: Grid[Any] | None = None

    def text(self, words: str = "", columns: Sequence[str] = (), rows: Sequence[str] = ()) -> str:
        """The tables that have these words in their titles, under those."""
        shown = {name: table for name, table in self.tables().items() if table and words.lower() in name.lower()}
        return "\n\n".join(f"### {name}\n\n{extract(table, columns, rows)}" for name, table in shown.items())

    def main(self, **commands: Callable[..., None]) -> None:
        """The command line. commands: what measures and stores."""

        def table(title: Annotated[str, tyro.conf.Positional] = "", columns: Words = (), rows: Words = ()) -> None:
            """Print the stored tables, all or those with TITLE in their title; some columns and rows where named."""
            print(self.text(title, columns, rows))

        def page() -> None:
            """Print the stored tables, write them into docs/, and draw the study's figure."""
            self.write()
            table()
            for file, text in self.pages():
                write_atomically(file, text)

        def plan() -> None:
            """Count the cells that are planned, missing, and stored with other settings than today's."""
            print(
                f"{len(grid.cells())} cells: {grid.missing()} missing, {len(grid.changed())} stored with other settings"
            )

        def rekey() -> None:
            """Give stored cells the digests of today's settings: only where nothing but names has changed."""
            print(f"{grid.rekey()} cells have a new digest")

        shared, grid = {"table": table, "page": page}, self.grid
        shared |= {"plan": plan, "rekey": rekey} if grid else {}
        tyro.extras.subcommand_cli_from_dict(commands | shared, prog=f"python -m benchmarks.{self.name}")

    def pages(self) -> Iterator[tuple[Path, str]]:
        """Pages that have a place for these tables, and what they say then."""
        tables = self.tables()

        def filled(found: re.Match[str]) -> str:
            if found[2] != self.name:
                return found[0]
            columns, rows = (re.split(r"\s*\|\s*", names) if names else () for names in found.group(4, 5))
            text = extract(tables[found[3]], columns, rows) if found[3] else self.text()
            return f"{found[1]}\n{text}\n\n{found[6]}"

        for file in sorted({*ROOT.glob("*.md"), *DOCS.rglob("*.md")}):
            if f"<!-- table: {self.name}" in (text := file.read_text()):
                yield file, MARK.sub(filled, text)


def lines(rows: Iterable[Row]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(file: Path) -> list[Row]:
    """The rows of a JSON file, none where it is not there."""
    return json.loads(file.read_text()) if file.is_file() else []  # type: ignore[no-any-return]


def write(file: Path, rows: Any) -> None:
    write_atomically(file, json.dumps(rows, indent=1) + "\n")


def put(file: Path, rows: list[Row], *keys: str) -> None:
    """Rows in place of what is there with the same values of `keys`."""
    fresh = {tuple(row[key] for key in keys) for row in rows}
    write(file, [row for row in read(file) if tuple(row[key] for key in keys) not in fresh] + rows)


def show(rows: Iterable[Row]) -> None:
    """A line a row."""
    for row in rows:
        shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print("  ".join(shown), flush=True)


def rounded(value: Any, digits: int = 5) -> Any:
    """Floats to so many digits, in lists and dicts too; what is not finite is None, as JSON has no word for it."""
    short = {"parse_float": lambda x: float(f"{float(x):.{digits}g}"), "parse_constant": lambda _: None}
    return json.loads(json.dumps(value), **short)


def grouped(rows: Iterable[C], key: Callable[[C], Key]) -> dict[Key, list[C]]:
    """Rows by key, keys in the order of their first row."""
    found: dict[Key, list[C]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def chosen(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """Rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def interval(values: Sequence[float], digits: int = 2, between: str = "-") -> str:
    """Mean (smallest to largest); empty without values."""
    shown = [f"{f(values):.{digits}f}" for f in (statistics.fmean, min, max)] if values else [""]
    return f"{shown[0]} ({shown[1]}{between}{shown[2]})" if len(values) > 1 else shown[0]


def markdown(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; empty without rows."""
    body = [*rows]
    shown = [" | ".join(map(str, line)) for line in (heads, ["---"] * len(heads), *body)]
    return "\n".join(f"| {line} |" for line in shown) if body else ""


def extract(table: str, columns: Sequence[str], rows: Sequence[str]) -> str:
    """Some columns and rows of a table, the latter by their first cells; all where none is named."""
    if not columns and not rows:
        return table
    lines = [line[2:-2].split(" | ") for line in table.splitlines() if line.startswith("|")]
    places = [lines[0].index(name) for name in columns or lines[0]]
    kept = [[line[i] for i in places] for line in lines[2:] if not rows or line[0] in rows]
    return markdown([lines[0][i] for i in places], kept)


@contextlib.contextmanager
def figure(file: Path, panels: int, columns: int, height: float) -> Iterator[list[Axes]]:
    """The axes of a figure, written to `file` at the end."""
    with rc_context(figure_style(LIGHT)):
        drawn, axes = make_panels(panels, columns, height)
        yield axes
        write_atomically(file, to_png(drawn))


def ticks(axis: Axis, values: Sequence[float]) -> None:
    """Plain numbers at these values alone."""
    axis.set_major_locator(FixedLocator(values))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


@contextlib.contextmanager
def trainer_of(
    config: fs.RunConfig, dataset: fs.Dataset | None = None, folder: Path | None = None, runtime: fs.Runtime = QUIET
) -> Iterator[Trainer]:
    """A quiet trainer on the CPU before its first step, in a folder that goes away unless one is given."""
    data = fs.load_dataset(config.data) if dataset is None else dataset
    with tempfile.TemporaryDirectory() as temporary:
        run = fs.RunFolder(folder or Path(temporary) / "run")
        with Trainer(config, data, run, runtime, Callbacks()) as trainer:
            trainer.learner.flow_map.train()
            yield trainer


def train_to(trainer: Trainer, moment: int, after: Callable[[], object] = lambda: None) -> float:
    """Train up to a step, with `after` every step; the seconds that it took."""
    started = time.perf_counter()
    while trainer.clock.step < moment:
        trainer.take_step()
        after()
    return time.perf_counter() - started


def take_turns(
    jobs: Mapping[Key, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Key, list[float]]:
    """Seconds of every job in every round, in turns, so that a noisy machine slows all alike; two rounds warm up."""
    spent: dict[Key, list[float]] = {key: [] for key in jobs}
    for turn in tqdm(range(rounds + 2), desc="turns", leave=False):
        for key, job in jobs.items():
            start = clock()
            job()
            if turn >= 2:
                spent[key].append(clock() - start)
    return spent


def time_ratio(own: Sequence[float], base: Sequence[float]) -> Row:
    """Median and quartiles over turns of one job's time over another's."""
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"ratio": round(ratio, 3), "low": round(low, 3), "high": round(high, 3)}
