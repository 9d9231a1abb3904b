"""`fewstep demos TASK`: demonstrations, recorded or imported."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fewstep.utils.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """Record demonstrations of a task's expert, or import them: episodes of observations and actions in one file.

    The same command records the same demonstrations. Starts from 100000 on are kept for `fewstep rollout`.
    """

    task: Annotated[str, tyro.conf.Positional] = ""
    """Task to record: a name, or FILE.py:NAME, a fewstep.Task of your own with an expert; a name of your own when
    importing."""
    count: Annotated[int | None, tyro.conf.arg(aliases=["-n"])] = None
    """Demonstrations to keep, 100 when not given; episodes that miss the goal are dropped and counted."""
    out: Path | None = None
    """FILE.safetensors or FILE.npz; demos/TASK.safetensors when not given."""
    first_seed: int | None = None
    """Start of the first episode; 0 when not given."""
    from_minari: Path | None = None
    """Folder or HDF5 file of a Minari data set to import."""
    from_robomimic: Path | None = None
    """HDF5 file of robomimic to import."""
    keys: tuple[str, ...] = ()
    """Which observations to take of an imported file, in this order, where it has several."""
    split: str = ""
    """Which episodes to take of a robomimic file: the name of a list that it holds, such as train. Not given: all."""
    quiet: bool = False
    """No progress line."""


def run(options: Options) -> None:
    """Run the command; raises what it calls raises."""
    from fewstep.evaluation.rollouts import import_demonstrations, record_demonstrations, show_on_terminal
    from fewstep.policies.tasks.registry import TASKS

    minari, robomimic = options.from_minari, options.from_robomimic
    if minari is not None or robomimic is not None:
        if options.count is not None or options.first_seed is not None:
            raise ConfigError("--count and --first-seed are for recording, not for importing: leave them out")
        print(import_demonstrations(options.task, minari, robomimic, options.keys, options.split, options.out))
        return
    if options.keys or options.split:
        raise ConfigError("--keys and --split choose from an imported file: add --from-minari or --from-robomimic")
    if not options.task:
        raise ConfigError(f"demos needs a task: fewstep demos TASK; tasks: {', '.join(TASKS)}")
    progress = None if options.quiet or not sys.stderr.isatty() else show_on_terminal
    count = 100 if options.count is None else options.count
    message = record_demonstrations(options.task, count, options.out, options.first_seed or 0, progress)
    print(f"\n{message}" if progress else message)
