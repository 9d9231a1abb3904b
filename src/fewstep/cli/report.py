"""`fewstep report RUN`: its page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    """Write RUN/report.html: samples from the same noise, curves, quality against network calls, cost, settings."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run."""
    autoencoder: Path | None = None
    """Where the autoencoder that decodes latents lies now; where it lay when they were encoded when not given."""
    out: Path | None = None
    """Folder for report.html, where what `fewstep evaluate --out` left is shown too; RUN when not given."""


def run(options: Options) -> None:
    """Run the command; raises what it calls raises."""
    from fewstep.evaluation.report.run import report
    from fewstep.training import RunFolder

    print(f"Report: {report(RunFolder(options.run), autoencoder=options.autoencoder, out=options.out)}")
