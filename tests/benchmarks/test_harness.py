"""The grid of all studies: cells are known by their labels, settings are checked by digest, pages hold the tables."""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import ROOT, Grid, Row, Study, interval, markdown, rounded, take_turns


@dataclass(frozen=True)
class Cell:
    method: str
    seed: int


PLAN = [Cell("a", 0), Cell("a", 1), Cell("b", 0)]
STUDIES = sorted(file.parent.name for file in (ROOT / "benchmarks").glob("*/__main__.py"))


def grid(folder: Path, settings: str = "s") -> Grid[Cell]:
    return Grid(folder / "cells.jsonl", ("method", "seed"), lambda: PLAN, lambda cell: settings, {"seed": 0})


def measure(cell: Cell) -> list[Row]:
    return [{"calls": 1, "value": 0.5}, {"calls": 2, "value": cell.seed}]


def test_a_cell_is_measured_once_whatever_its_settings_are_called(tmp_path: Path) -> None:
    grid(tmp_path).run(PLAN[:2], measure)
    seen: list[Cell] = []
    renamed = grid(tmp_path, "another")
    renamed.run(PLAN, lambda cell: seen.append(cell) or measure(cell))  # type: ignore[func-returns-value]
    assert seen == [Cell("b", 0)]
    assert renamed.missing() == 0
    assert len(renamed.rows()) == 6
    assert renamed.changed() == {("a", 0): "another", ("a", 1): "another"}
    assert renamed.rekey() == 2
    assert renamed.changed() == {}
    assert renamed.rekey() == 0
    assert [row["value"] for row in renamed.rows()] == [0.5, 0, 0.5, 1, 0.5, 0]


def test_workers_share_a_plan(tmp_path: Path) -> None:
    for worker in ("0/2", "1/2"):
        grid(tmp_path).run(PLAN, measure, worker)
    assert [row["method"] for row in grid(tmp_path).rows()[::2]] == ["a", "b", "a"]


def test_a_line_that_was_cut_off_and_a_cell_of_no_plan_are_left_out(tmp_path: Path) -> None:
    found = grid(tmp_path)
    rows = [{"method": "b", "value": 1}, {"method": "gone", "seed": 0}, {"seed": 0}]
    found.file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"method": "a", "se')
    assert found.rows() == rows[:1]
    assert found.missing() == 2


def test_tables_are_written_between_their_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("none\n")
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table: some -->\nold\n<!-- end of table -->\n"
        "<!-- table: some: Second -->\n<!-- end of table -->\n<!-- table: other -->\nkept\n<!-- end of table -->\n"
    )
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "DOCS", tmp_path)
    study = Study("some", lambda: {"First": "1", "Second": "2", "None": ""})
    ((file, text),) = study.pages()
    assert file == page
    assert text == (
        "before\n<!-- table: some -->\n\n### First\n\n1\n\n### Second\n\n2\n\n<!-- end of table -->\n"
        "<!-- table: some: Second -->\n\n2\n\n<!-- end of table -->\n"
        "<!-- table: other -->\nkept\n<!-- end of table -->\n"
    )


@pytest.mark.parametrize("name", STUDIES)
def test_every_marked_table_is_what_its_command_prints(name: str) -> None:
    study = import_module(f"benchmarks.{name}.__main__").STUDY
    assert study.name == name
    assert study.text()
    if study.grid is not None:
        assert study.grid.changed().keys() <= study.grid.stored().keys()
    for file, text in study.pages():
        assert file.read_text() == text, f"python -m benchmarks.{name} page"


def test_tables_and_numbers() -> None:
    assert markdown(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert markdown(("a",), []) == ""
    assert interval([1.0, 2.0], 1) == "1.5 (1.0-2.0)"
    assert interval([1.0]) == "1.00"
    assert rounded({"a": [1 / 3, float("nan")], "b": 1}) == {"a": [0.33333, None], "b": 1}


def test_jobs_take_turns() -> None:
    order: list[str] = []
    spent = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 5
    assert [len(times) for times in spent.values()] == [3, 3]


def test_a_page_may_have_some_columns_and_rows_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "LOG.md").write_text(
        "<!-- table: some: First, of two; columns: name | last; rows: b | c -->\n<!-- end of table -->\n"
    )
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "DOCS", tmp_path)
    table = markdown(("name", "first", "last"), [("a", 1, 2), ("b", "", "–"), ("c", 5, "")]) + "\n\nA note."
    study = Study("some", lambda: {"First, of two": table})
    ((_, text),) = study.pages()
    assert text.splitlines()[2:6] == ["| name | last |", "| --- | --- |", "| b | – |", "| c |  |"]
    assert "A note" not in text
