"""`fewstep objectives`: the table of objectives, as plain text and as that of docs/reference/objectives.md."""

from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.objectives import TABLE
from fewstep.objectives.table import Entry

_HEADS = ("objective", "loss", "velocity", "gradient through", "evaluations of a sample", "teacher", "arXiv")


@dataclass(frozen=True)
class Options:
    """What every training objective compares, trusts and costs."""

    markdown: bool = False
    """Print the table of docs/reference/objectives.md."""


def run(options: Options) -> None:
    """Print the table."""
    print(table_markdown(TABLE) if options.markdown else table_text(TABLE))


def table_text(entries: Sequence[Entry]) -> str:
    """Four lines for each objective."""
    return "\n\n".join(
        f"{entry.name} ({entry.objective.__name__}; {entry.paper})\n    {entry.formula}\n"
        f"    velocity: {entry.velocity}\n    gradient through: {entry.gradient}\n"
        f"    evaluations of a sample: {_counts(entry)}"
        for entry in entries
    )


def table_markdown(entries: Sequence[Entry]) -> str:
    """A row for each objective, in Markdown."""
    lines = ["| " + " | ".join(_HEADS) + " |", "|" + " --- |" * len(_HEADS)]
    for entry in entries:
        cells = (
            f"**{entry.name}** `{entry.objective.__name__}`",
            f"`{entry.formula}`",
            entry.velocity,
            entry.gradient,
            _counts(entry),
            "needed" if entry.needs_teacher else "none",
            entry.paper,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _counts(entry: Entry) -> str:
    forward, frozen, tangents, backward, teacher = entry.passes
    own = f"{forward} forward, {frozen} frozen, {tangents} with tangents, {backward} backward"
    return own + (f", {teacher} of the teacher" if entry.needs_teacher else "")
