"""Policies at work: demonstrations recorded or imported, policies let loose in their task, figures kept."""

import ctypes.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

from fewstep.data.demonstrations.episodes import Demonstrations, save_demonstrations
from fewstep.data.demonstrations.importers import ROBOMIMIC_KEYS, import_minari, import_robomimic
from fewstep.data.demonstrations.normaliser import PolicySpec
from fewstep.evaluation.evaluate import method_of
from fewstep.policies.figures import Row, rollout_row, save_film
from fewstep.policies.policy import Policy, load_policy
from fewstep.policies.rollout import Rollout, expert_rollout, film, record, roll_out
from fewstep.policies.simulation import Task
from fewstep.policies.tasks.registry import find_task
from fewstep.training.run_folder import RunFolder
from fewstep.utils.errors import CheckpointError, ConfigError, UnsupportedError
from fewstep.utils.parts import file_of_value
from fewstep.utils.text import from_here, quoted

Progress = Callable[[str], None]


def record_demonstrations(name: str, count: int, out: Path | None, first_seed: int, progress: Progress | None) -> str:
    """Record the expert of a task into a file; what there is to say of it. ConfigError for a file that exists."""
    task = find_task(name)
    file = _new_file(out, task.name)
    found = record(task, count, first_seed, progress)
    save_demonstrations(found.demonstrations, file)
    raised = f", {len(found.errors)} of them by an error ({found.errors[0]})" if found.errors else ""
    return (
        f"The expert reached the goal in {count} of {found.tried} episodes; {found.failed} were dropped{raised}.\n"
        + (f"Routes: {', '.join(f'{name} {n}' for name, n in found.routes.items())}\n" if found.routes else "")
        + describe(file, found.demonstrations, task)
    )


def import_demonstrations(
    name: str, minari: Path | None, robomimic: Path | None, keys: tuple[str, ...], split: str, out: Path | None
) -> str:
    """Turn another format's file into demonstrations; what there is to say of it. Raises ConfigError as above."""
    if minari is not None and robomimic is not None:
        raise ConfigError("--from-minari and --from-robomimic are given: import one at a time")
    if minari is not None and split:
        raise ConfigError("--split names a list of episodes in a robomimic file: a Minari data set has none")
    source = minari or robomimic
    assert source is not None  # the caller has looked
    file = _new_file(out, name or source.stem)
    if minari is not None:
        found = import_minari(minari, keys, name)
    else:
        found = import_robomimic(source, keys or ROBOMIMIC_KEYS, split, name)
    save_demonstrations(found, file)
    return describe(file, found)


def describe(file: Path, found: Demonstrations, task: Task | None = None) -> str:
    """Where demonstrations are, how large, and what to do next; task: that they are of, with its file if it has one."""
    place = None if task is None else file_of_value(task)
    also = f" --import {quoted(from_here(place[0]))}" if place else ""
    following = f"\nNext: fewstep train policy-mlp --data.root {quoted(file)}{also}" if len(found) > 1 else ""
    return (
        f"{file}: {len(found)} episodes, {len(found.actions):,} steps, observations of {found.observations.shape[1]} "
        f"numbers, actions of {found.actions.shape[1]}{following}"
    )


def _new_file(out: Path | None, name: str) -> Path:
    file = out or Path("demos") / f"{name}.safetensors"
    if file.suffix not in (".safetensors", ".npz"):
        raise ConfigError(f"{file}: give FILE.safetensors or FILE.npz")
    if file.exists():
        raise ConfigError(f"{file} exists: give another file with --out, or remove it first")
    return file


def measure_rollouts(
    folder: Path,
    steps: tuple[int, ...],
    name: str,
    episodes: int,
    seed: int,
    first_seed: int,
    at_once: int,
    progress: Progress | None,
) -> tuple[list[Row], Task, Policy]:
    """A row for each number of steps, those of the recipe when none is given; the task, and the policy of the first."""
    method, usual = _of_run(folder)
    counts = steps or usual
    policies = [load_policy(folder, count, seed) for count in counts]
    trained_for = policies[0].spec.task
    if not (name or trained_for):
        raise ConfigError(f"{folder} does not say which task it was trained for: name one with --task")
    task = find_task(name) if name else _own_task(folder, trained_for)
    rows = []
    for policy in policies:
        label = f"{method}, {policy.steps} step{'s' if policy.steps > 1 else ''}: "
        report = None if progress is None else _labelled(progress, label)
        found = roll_out(policy, task, episodes, first_seed, at_once, report)
        _check_ran(found, task)
        rows.append(rollout_row(found, task, method, first_seed, policy))
    return rows, task, policies[0]


def _own_task(folder: Path, name: str) -> Task:
    """The task that a policy was trained for."""
    try:
        return find_task(name)
    except ConfigError as error:
        advice = "add --task FILE.py:NAME, with the file that has it"
        raise ConfigError(f"{folder} acts in the task {name!r}, which is none of fewstep's: {advice}") from error


def _check_ran(found: Rollout, task: Task) -> None:
    """Raise UnsupportedError where every episode ended in an error: nothing was measured."""
    if len(found.errors) == len(found.episodes):
        first = found.errors[0]
        raise UnsupportedError(
            f"{task.name}: every episode ended in an error, so that nothing was measured; of start {first.seed}, after "
            f"{first.steps} steps: {first.error}"
        )


def next_command(spec: PolicySpec) -> str:
    """What to do with a new policy: rollout, with the --task FILE.py:NAME of an imported file; evaluate where its task
    is not known, has other sizes, or cannot be simulated here.
    """
    try:
        task = find_task(spec.task)
        task.make(False).close()
    except Exception:  # of the user's own code, any
        return "evaluate"
    if (task.observation_size, task.action_size) != (len(spec.observations.low), len(spec.actions.low)):
        return "evaluate"
    place = file_of_value(task)
    return "rollout" if place is None else f"rollout --task {quoted(f'{from_here(place[0])}:{place[1]}')}"


def _of_run(folder: Path) -> tuple[str, tuple[int, ...]]:
    """(method, step counts) of a run; of a saved model, which does not say, a name and one step."""
    run = RunFolder(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not (run.config_file.is_file() and run.checkpoints()):
        return "saved policy", (1,)
    config = run.config()
    return method_of(run), config.evaluation.steps


def _labelled(progress: Progress, label: str) -> Progress:
    return lambda text: progress(label + text)


def expert_row(task: Task, episodes: int, first_seed: int) -> Row:
    """The expert's figures at the same starts."""
    return rollout_row(expert_rollout(task, episodes, first_seed), task, "expert", first_seed)


def draw_film(policy: Policy, task: Task, seed: int, folder: Path) -> Path:
    """One episode as pictures in the run's folder; raises UnsupportedError where they cannot be drawn."""
    return save_film(film(policy, task, seed)[1], folder)


def choose_drawing() -> None:
    """Let MuJoCo draw in memory by OSMesa, where that is installed and nothing else was chosen.

    MuJoCo reads its variable when it is first imported: call this before any task is made.
    """
    if "MUJOCO_GL" not in os.environ and ctypes.util.find_library("OSMesa"):
        os.environ["MUJOCO_GL"] = "osmesa"


def show_on_terminal(text: str) -> None:
    """Progress on one line of standard error."""
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
