"""Every task by name, those of the user's own files among them."""

import difflib

from fewstep.policies.simulation import Simulation, Task
from fewstep.policies.tasks.fetch import FETCH_TASKS
from fewstep.policies.tasks.fetch_retrieve import RETRIEVE
from fewstep.policies.tasks.metaworld import METAWORLD_TASKS
from fewstep.policies.tasks.pusht import PUSHT
from fewstep.policies.tasks.ring import RING
from fewstep.utils.errors import ConfigError
from fewstep.utils.parts import from_file, made, outside_values

TASKS: dict[str, Task] = {task.name: task for task in (PUSHT, RING, *FETCH_TASKS, RETRIEVE, *METAWORLD_TASKS)}


def find_task(name: str) -> Task:
    """The task of that name, or FILE.py:NAME, whose file is imported; raises ConfigError for an unknown one.

    A task of a file that was imported earlier goes by its own name too, unless fewstep has one of that name.
    """
    if ":" in name:
        return task_of_file(name)
    known = {task.name: task for task in outside_values(Task)} | TASKS
    if name.endswith(".py"):
        raise ConfigError(f"{name} is a file: name the task in it, such as {name}:TASK")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"unknown task {name!r}: {hint}tasks: {', '.join(known)}; one of your own is FILE.py:NAME, a fewstep.Task"
        )
    return known[name]


def task_of_file(name: str) -> Task:
    """The task that FILE.py:NAME is, or that it returns where it is a function or a class without arguments.

    Raises ConfigError, in one line, for what is none.
    """
    found = from_file(name)
    if isinstance(found, type) and issubclass(found, Simulation):
        raise ConfigError(
            f"{name} is a Simulation: name the Task that makes it, such as TASK = fewstep.Task(name, description, "
            f"observation_size, action_low, action_high, max_steps, make=lambda pictures: {found.__name__}())"
        )
    if callable(found) and not isinstance(found, Task):
        found = made(name, found, "task")
    if not isinstance(found, Task):
        raise ConfigError(f"{name} is no fewstep.Task, nor a function without arguments that returns one")
    return found
