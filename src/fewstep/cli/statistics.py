"""`fewstep statistics RUN`: of a teacher's trajectories."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fewstep.utils.cache import cache_folder


@dataclass(frozen=True)
class Options:
    """Estimate the statistics of a teacher's trajectories, keep them in its folder and draw them; time a student.

    Points, samples, probes and the seed are the student's recipe's when not given, so that its training finds them.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the teacher's run."""
    points: int | None = None
    """Noise levels, uniform in lambda."""
    samples: int | None = None
    """Samples at each level."""
    probes: int | None = None
    """Rademacher probes of the trace; 0 uses Stein's identity; -1 is exact up to 64 dimensions, else one probe."""
    centred: bool = True
    """About the data's mean; otherwise about zero, as published."""
    shrink: bool = True
    """Draw uncertain estimates at high noise to their limit."""
    classes: Literal["pooled", "origin"] = "pooled"
    """Of data with classes: about the mean of all data, or (origin) each sample about that of its class."""
    seed: int | None = None
    """Decides which samples are drawn, their noise and the probes."""
    student: str = ""
    """Recipe whose training the cost is compared with; the CTM recipe of this teacher's when not given."""
    data_root: Annotated[Path | None, tyro.conf.arg(name="data.root")] = None
    """Where the run's data lie now; where they lay in training when not given."""
    cpu: bool = False
    """Stay on the CPU even where a GPU is present."""


def run(options: Options) -> None:
    """Run the command; raises what it calls raises."""
    from fewstep.evaluation.align import measure_statistics
    from fewstep.training import RunFolder
    from fewstep.utils.errors import ConfigError

    if ".py:" in str(options.run):
        raise ConfigError(
            f"{options.run} is no run with a folder to keep statistics in: fewstep.estimate_statistics takes them in "
            "Python, and a student's training by itself, fewstep train ctm-digits --teacher FILE.py:NAME --initial="
        )
    given: dict[str, int | bool | str] = {"classes": options.classes}
    names = ("points", "samples", "probes", "seed")
    given |= {name: value for name in names if (value := getattr(options, name)) is not None}
    given |= {"centred": options.centred, "shrink": options.shrink}
    run = RunFolder(options.run)
    dataset = run.load_data(options.data_root)[1]
    if message := measure_statistics(run, dataset, given, options.student, cache_folder(), options.cpu):
        print(message)
