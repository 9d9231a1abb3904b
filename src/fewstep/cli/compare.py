"""`fewstep compare RUN RUN ...`: learning curves of a study."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    """Compare runs of one study by their learning curves (train them with --evaluation.curve-images).

    The first run's method is the baseline; runs that differ in the seed alone are replicates.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of at least two runs on the same data."""
    out: Path = Path("comparison")
    """Folder for comparison.html, comparison.png and comparison.json."""


def run(options: Options) -> None:
    """Run the command; raises what it calls raises."""
    from fewstep.evaluation.compare import compare
    from fewstep.evaluation.report.run import PAGE_FILE

    print(compare(options.runs, options.out))
    print(f"Comparison: {options.out / PAGE_FILE}")
