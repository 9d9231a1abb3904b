"""`fewstep compare RUN RUN ...`: learning curves of a study."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fewstep.utils.cache import cache_folder


@dataclass(frozen=True)
class Options:
    """Compare runs of one study by their learning curves.

    A run trained with --evaluation.curve-images N has a point every N images; of any other the checkpoints that it kept
    (--training.keep) are measured now.

    The first run's method is the baseline; runs that differ in the seed alone are replicates.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of at least two runs on the same data."""
    out: Path = Path("comparison")
    """Folder for comparison.html, comparison.png and comparison.json."""
    cpu: bool = False
    """Stay on the CPU even where a GPU is present."""


def run(options: Options) -> None:
    """Run the command; raises what it calls raises."""
    from fewstep.evaluation.compare import compare
    from fewstep.evaluation.report.run import PAGE_FILE

    print(compare(options.runs, options.out, cache_folder()))
    print(f"Comparison: {options.out / PAGE_FILE}")
