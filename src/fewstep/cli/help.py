"""The short help of `fewstep train RECIPE --help`: the options that people change, those that the recipe can use."""

import ast
import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from fewstep.cli.kinds import choices
from fewstep.recipes import RECIPES
from fewstep.recipes.config import RunConfig
from fewstep.utils.parts import kind_name, kinds
from fewstep.utils.text import listed

CHANGED = (
    "out", "data.source", "data.root", "data.image_size", "data.value_range", "data.heldout", "teacher", "initial",
    "objective", "objective.guidance", "objective.guidance.omega", "network", "network.width", "network.depth",
    "network.patch", "network.lora", "model.preconditioning", "training.images", "training.seconds",
    "training.batch_size", "training.flip", "training.seed", "training.precision", "optimizer.lr", "evaluation.steps",
    "evaluation.samples", "evaluation.guidance_scale", "runtime.threads", "runtime.micro_batch", "runtime.cpu",
    "runtime.track",
)  # fmt: skip
"""What people change, in this order, by the names of the fields."""
_NAMES_WIDTH, _WIDEST = 36, 110


def words_of(cls: type) -> dict[str, str]:
    """The words that stand under each field of a dataclass, its bases' among them."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue  # typed in, or without its source
        statements = getattr(body, "body", [])
        for field, below in pairwise(statements):
            words = getattr(getattr(below, "value", None), "value", None)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                found |= {field.target.id: " ".join(words.split())} if isinstance(words, str) else {}
    return found


def short_help(options: Any, command: str, asked: tuple[str, ...] = ()) -> str:
    """What a command of a recipe can be told; options: its values, with the run as `run`.

    asked: settings whose kind was given, which are shown with all that they have.
    """
    run: RunConfig = options.run
    shown = dict(_rows(options, run))
    more = [name for name in shown if name.startswith(tuple(f"{each}." for each in asked)) and name not in CHANGED]
    rows = [row for name in (*CHANGED, *more) if name in shown for row in _lines(name, *shown[name])]
    rest = len(shown) - sum(name in shown for name in (*CHANGED, *more))
    also = f"{command} --help-all lists these and {rest} more. Those of a kind: --network unet --help."
    about = inspect.getdoc(RECIPES[run.recipe]) if run.recipe in RECIPES else None
    if about and asked:  # figures of the recipe as it is say nothing of it with other parts
        parts = (f"{name} {shown[name][0]}" for name in asked if name in shown)
        about = f"{about.splitlines()[0]} Here with {listed(list(parts), 8)}."
    return "\n".join([f"usage: {command} [options]", "", *([about, ""] if about else []), *rows, "", also])


def usable(run: RunConfig, name: str) -> bool:
    """Whether an option can change anything in a run like this."""
    objective = run.objective
    if name == "teacher":
        return bool(objective.needs_teacher or run.teacher or run.model.preconditioning.needs_statistics)
    if name.startswith("objective.guidance"):
        return bool(objective.guidance.turned_off_by) or name == "objective.guidance"
    if name.startswith("statistics."):
        return run.model.preconditioning.needs_statistics
    if name.startswith("data."):
        return name.removeprefix("data.") not in run.data.source.ignores
    return not (name in ("training.flip", "evaluation.guidance_scale") and run.data.source.of_actions)


def _rows(options: Any, run: RunConfig) -> Iterator[tuple[str, tuple[str, str]]]:
    """(name of a field, (its value, its words)) of everything that can be set, kinds among them."""
    chosen = {name.removeprefix("run."): annotation for name, annotation in choices(options)}
    known: dict[type, dict[str, str]] = {}
    for path, owner, value in [*_fields(options, ""), *_fields(run, "")]:
        name = path.removeprefix("run.")
        if type(owner) not in known:
            known[type(owner)] = words_of(type(owner))
        words = known[type(owner)].get(name.rpartition(".")[2], "")
        if name in chosen:
            yield name, (kind_name(type(value)), f"{words} One of {listed(list(kinds(chosen[name])), 16)}.".strip())
        elif not dataclasses.is_dataclass(value) and usable(run, name):
            yield name, (_value(value), words)


def _fields(owner: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        yield prefix + field.name, owner, value
        if dataclasses.is_dataclass(value) and field.name != "run":
            yield from _fields(value, f"{prefix}{field.name}.")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value in (None, "") else str(value)


def _lines(name: str, value: str, words: str) -> list[str]:
    """An option with its value in the recipe, and its words beside it, as wide as the terminal."""
    head = f"  --{name.replace('_', '-')} {value}".rstrip()
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    body = textwrap.wrap(words, max(width - _NAMES_WIDTH, 30)) or [""]
    first = (
        [f"{head:<{_NAMES_WIDTH}}{body[0]}"] if len(head) < _NAMES_WIDTH - 1 else [head, " " * _NAMES_WIDTH + body[0]]
    )
    return [line.rstrip() for line in [*first, *(" " * _NAMES_WIDTH + line for line in body[1:])]]
