"""Who may train in a folder: nobody beside another process, and no run but the one that is there."""

import json
import shutil
from typing import Any

from fewstep.data.generated import FOLDER
from fewstep.recipes.config import RunConfig
from fewstep.training.identity import identity, placed, run_record
from fewstep.training.run_folder import RunFolder
from fewstep.utils.errors import CheckpointError
from fewstep.utils.files import LOCK_FILE, Lock, guarded, write_atomically
from fewstep.utils.serialization import JSON, differences
from fewstep.utils.text import quoted

_FIRST = (LOCK_FILE, ".config.json.", "statistics", FOLDER)
"""What a run has written that was killed before it had its configuration."""


def hold(run: RunFolder, config: RunConfig, data: dict[str, JSON], teacher: str | None = None) -> Lock:
    """Keep other processes from training here until the lock is released; of the run nothing is written yet.

    teacher: the fingerprint of its weights; where they lie may change between starts. Raises CheckpointError as
    `check` does, when another process trains here, or when the folder cannot be written.
    """
    run.refuse_links()
    check(run, config, data, teacher)  # before anything is written
    lock = Lock(
        run.root,
        f"{run.root} is being trained in by another process, or by a run of this one that was not released: wait "
        "for it, or give another folder with --out",
    )
    try:
        check(run, config, data, teacher)  # once more: another process may have begun meanwhile
    except BaseException:
        lock.release()
        raise
    return lock


def begin(run: RunFolder, config: RunConfig, data: dict[str, JSON], teacher: str | None = None) -> None:
    """Remove what a killed process left half written, and write config.json unless it says just this.

    What is only logged, kept or measured may differ from what it said: the last command counts.
    """
    remove_leftovers(run)
    if not run.config_file.exists() or run.config() != placed(config):
        write_atomically(run.config_file, json.dumps(run_record(config, data, teacher), indent=2) + "\n")


def check(run: RunFolder, config: RunConfig, data: dict[str, Any], teacher: str | None = None) -> None:
    """Raise CheckpointError, showing every difference, when the folder holds anything else; nothing is written."""
    if run.root.exists() and not run.root.is_dir():
        raise CheckpointError(f"{run.root} is a file, not a folder: give another folder with --out")
    if not run.config_file.exists():
        if run.root.exists() and any(not path.name.startswith(_FIRST) for path in run.root.iterdir()):
            raise CheckpointError(f"{run.root} is not empty and holds no run: give another folder with --out")
        return
    there, here = run.config(), run_record(config, data, teacher)
    lines = differences(identity(run.record(), there), identity(here, config))
    if lines:
        shown = "; ".join(lines[:8]) + (f" and {len(lines) - 8} more" if len(lines) > 8 else "")
        shown += run.renumbered(data)
        other = f"{run.root} holds a run with other settings ({shown})"
        if not run.checkpoints():
            raise CheckpointError(f"{other} and no checkpoint yet: delete it, or give another folder with --out")
        raise CheckpointError(
            f"{other}: go on with those it has ({run.going_on}), or give another folder with --out, where --initial "
            f"{quoted(run.root)} starts from its weights"
        )


def remove_leftovers(run: RunFolder) -> None:
    """Delete what a killed process was still writing."""
    files = (".config.json.*", ".log.jsonl.*", ".curve.jsonl.*", "samples/.step-*", "checkpoints/.step-*")
    for pattern in (*files, "checkpoints/step-*/.state.json.*"):
        for path in run.root.glob(pattern):
            with guarded(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
