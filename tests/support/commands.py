"""What the tests of the commands share: options for small runs, and what a command leaves."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fewstep

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fewstep.__file__).resolve().parents[1])}
"""For processes that import the same fewstep as the tests, from any folder."""

SMALL = (
    "--network.width", "16", "--network.depth", "1", "--network.embedding-width", "16",
    "--runtime.cpu", "--runtime.quiet", "--runtime.threads", "1",
)  # fmt: skip
"""A network and machine that train hundreds of steps in seconds."""

STEPS = (
    "--training.batch-size", "32", "--training.images", "320", "--training.log-images", "64",
    "--training.checkpoint-images", "96", "--training.sample-images", "160",
    "--evaluation.steps", "1", "2", "--evaluation.samples", "64", "--evaluation.reference-steps", "4",
)  # fmt: skip
"""Ten steps, checkpoints after 3, 6, 9 and 10."""

DISTILLED = (
    "--training.batch-size", "16", "--training.images", "64", "--training.checkpoint-images", "32",
    "--training.sample-images", "0", "--evaluation.samples", "32", "--evaluation.steps", "1", "2",
    "--evaluation.curve-images", "0", "--evaluation.reference-steps", "2",
    "--runtime.cpu", "--runtime.quiet", "--runtime.threads", "1",
)  # fmt: skip
"""Four steps of a student, two checkpoints."""

FEW = ("--objective.steps.points", "5")
"""The noise levels of a teacher's walks, where an objective takes them."""


@dataclass(frozen=True)
class Finished:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Finished]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
