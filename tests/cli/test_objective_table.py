"""The page of objectives holds the table that the command prints."""

from __future__ import annotations

from pathlib import Path

from fewstep.cli.objective_table import catalogue_table, catalogue_text
from fewstep.objectives import CATALOGUE

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "objectives.md"


def test_the_page_holds_todays_table() -> None:
    assert PAGE.read_text().endswith(catalogue_table(CATALOGUE) + "\n")


def test_every_row_has_as_many_cells_as_heads() -> None:
    rows = catalogue_table(CATALOGUE).replace("\\|", "").splitlines()
    assert len(rows) == 2 + len(CATALOGUE)
    assert len({row.count("|") for row in rows}) == 1


def test_the_text_names_the_teacher_where_one_is_needed() -> None:
    parts = catalogue_text(CATALOGUE).split("\n\n")
    assert ["of the teacher" in part for part in parts] == [entry.needs_teacher for entry in CATALOGUE]
