"""Settings that are one of several dataclasses, such as a run's network or an objective's times: chosen by name.

The command line gives the name in place of a value, `--network dit --objective.pairs.times beta`; what was set in
the setting before is then that kind's own defaults, and its fields follow as usual, `--network.depth 6`. A kind of the
user's own is FILE.py:CLASS, or goes by its name where the command has imported its file, `--import FILE.py`.
"""

import copy
import dataclasses
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fewstep.teachers import TeacherModel
from fewstep.utils.errors import ConfigError
from fewstep.utils.parts import concrete_classes, from_file, import_file, kind_class, stored_name, with_defaults

T = TypeVar("T")


def choices(settings: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with a choice of kinds and its annotation, as ('objective.pairs.times', TimeDistribution)."""
    for item in dataclasses.fields(settings):  # type: ignore[arg-type]  # callers pass dataclasses
        value = getattr(settings, item.name)
        if dataclasses.is_dataclass(value):
            annotation = typing.get_type_hints(type(settings))[item.name]
            if len(concrete_classes(annotation)) > 1:
                yield prefix + item.name, annotation
            yield from choices(value, f"{prefix}{item.name}.")


def choose_kinds(settings: T, args: Sequence[str], prefix: str = "") -> tuple[T, list[str]]:
    """Settings with the kinds that the words `--OPTION KIND` or `--OPTION=KIND` name, and the other words.

    prefix: of the settings' own names, which the options leave out. Raises ConfigError for a kind that is not there.
    """
    rest = list(args)
    done: set[str] = set()
    while True:
        known = {name.removeprefix(prefix): (name, annotation) for name, annotation in choices(settings)}
        option = next((name for name in known if name not in done and _position(rest, name) is not None), None)
        if option is None:
            return settings, rest
        done.add(option)
        position = _position(rest, option)
        while position is not None:  # the last one counts, as of any option
            word, rest = _taken(rest, position)
            if word or not {"-h", "--help", "--help-all"} & set(rest):
                name, annotation = known[option]
                settings = _with_kind(settings, name.split("."), _kind(annotation, word, option))
            position = _position(rest, option)


def _kind(annotation: Any, word: str, option: str) -> type:
    try:
        return kind_class(annotation, word)
    except ConfigError as error:
        raise ConfigError(f"--{option} {error}") from error


def import_named(args: Sequence[str]) -> list[str]:
    """The words without every `--import FILE.py`, whose file is imported; raises ConfigError where it cannot be.

    A teacher's FILE.py:NAME is imported too, and becomes the name that a run stores of it.
    """
    rest = list(args)
    if (place := _position(rest, "teacher")) is not None:
        word, others = _taken(rest, place)
        if ".py:" in word:
            rest = [*others, "--teacher", _teacher_name(word)]
    while (position := _position(rest, "import")) is not None:
        word, rest = _taken(rest, position)
        if not word:
            raise ConfigError("--import needs a file of yours: --import FILE.py")
        import_file(word)
    return rest


def _teacher_name(word: str) -> str:
    found = from_file(word)
    if isinstance(found, type) and issubclass(found, TeacherModel):
        return stored_name(found)
    if isinstance(found, type) or not callable(found):
        raise ConfigError(f"--teacher {word} is no TeacherModel, nor a function that returns one or a flow map")
    file, _, inner = word.rpartition(":")
    return f"{Path(file).name}:{inner}"


def _position(args: list[str], option: str) -> int | None:
    spelled = f"--{option.replace('_', '-')}"
    named = (word.split("=")[0] for word in args)
    found = (i for i, name in enumerate(named) if name[:2] == "--" and name.replace("_", "-") == spelled)
    return next(found, None)


def _taken(args: list[str], position: int) -> tuple[str, list[str]]:
    """The value of the option at that position, and the other words."""
    _, equals, value = args[position].partition("=")
    end = position + 1
    if not equals and end < len(args) and not args[end].startswith("--"):
        value, end = args[end], end + 1
    return value, args[:position] + args[end:]


def _with_kind(settings: Any, names: list[str], kind: type) -> Any:
    """Not checked: kinds may fit one another only when all of them, and all other options, are there."""
    head, *rest = names
    value = getattr(settings, head)
    if not rest and type(value) is kind:
        return settings
    changed = copy.copy(settings)
    object.__setattr__(changed, head, _with_kind(value, rest, kind) if rest else with_defaults(kind))
    return changed
