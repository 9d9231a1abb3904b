"""Every task by name."""

import difflib

from fewstep.policies.simulation import Task
from fewstep.policies.tasks.fetch import FETCH_TASKS
from fewstep.policies.tasks.fetch_retrieve import RETRIEVE
from fewstep.policies.tasks.metaworld import METAWORLD_TASKS
from fewstep.policies.tasks.pusht import PUSHT
from fewstep.policies.tasks.ring import RING
from fewstep.utils.errors import ConfigError

TASKS: dict[str, Task] = {task.name: task for task in (PUSHT, RING, *FETCH_TASKS, RETRIEVE, *METAWORLD_TASKS)}


def find_task(name: str) -> Task:
    """The task of that name; raises ConfigError for an unknown one."""
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"unknown task {name!r}: {hint}tasks: {', '.join(TASKS)}")
    return TASKS[name]
