"""The page of objectives holds the table that the command prints."""

from pathlib import Path

from fewstep.cli.objectives import table_markdown, table_text
from fewstep.objectives import TABLE

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "objectives.md"


def test_the_page_holds_todays_table() -> None:
    assert PAGE.read_text().endswith(table_markdown(TABLE) + "\n")


def test_every_row_has_as_many_cells_as_heads() -> None:
    rows = table_markdown(TABLE).replace("\\|", "").splitlines()
    assert len(rows) == 2 + len(TABLE)
    assert len({row.count("|") for row in rows}) == 1


def test_the_text_names_the_teacher_where_one_is_needed() -> None:
    parts = table_text(TABLE).split("\n\n")
    assert ["of the teacher" in part for part in parts] == [entry.needs_teacher for entry in TABLE]
