"""`fewstep objectives`: the table of objectives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What every training objective compares, trusts and costs."""

    markdown: bool = False
    """Print the table of docs/reference/objectives.md."""


def run(options: Options) -> None:
    """Run the command; raises what it calls raises."""
    from fewstep.cli.objective_table import table_markdown, table_text
    from fewstep.objectives import TABLE

    print(table_markdown(TABLE) if options.markdown else table_text(TABLE))
