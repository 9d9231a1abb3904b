"""`fewstep report RUN`: its page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    """Write RUN/report.html: the verdict of its figures, samples beside real images, quality against network calls, how
    to load the model, cost, settings.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run."""
    autoencoder: Path | None = None
    """Where the autoencoder that decodes latents lies now; where it lay when they were encoded when not given."""
    data_root: Annotated[Path | None, tyro.conf.arg(name="data.root")] = None
    """Where the run's data lie now, for real images beside samples; where they lay in training when not given."""
    out: Path | None = None
    """Folder for report.html, where what `fewstep evaluate --out` left is shown too; RUN when not given."""
    cpu: bool = False
    """Stay on the CPU even where a GPU is present."""


def run(options: Options) -> None:
    """Run the command; raises what it calls raises."""
    from fewstep.evaluation.report.run import report
    from fewstep.training import RunFolder

    run = RunFolder(options.run)
    page = report(run, autoencoder=options.autoencoder, out=options.out, data_root=options.data_root)
    print(f"Report: {page}")
