"""Typed options from the words of a command line, with one clear line for what does not fit."""

import contextlib
import dataclasses
import difflib
import inspect
import io
from collections.abc import Collection, Sequence
from typing import Any, TypeVar, cast

import tyro

from fewstep.cli.help import short_help
from fewstep.cli.kinds import choices, choose_kinds
from fewstep.utils.errors import ConfigError
from fewstep.utils.parts import kinds

T = TypeVar("T")

_SHORT = {
    "--track": "--runtime.track",
    "--profile": "--runtime.profile",
    "--from": "--runtime.from-step",
    "--lora": "--network.lora",
}


def parse(cls: type[T], args: Sequence[str], command: str, default: T | None = None) -> T:
    """Options of a command; raises ConfigError for an unknown one, naming the closest known, or an unfit value."""
    complaint = io.StringIO()
    description = None
    args = [_SHORT.get(word, word) for word in args]
    if default is not None:
        asked = tuple(name.removeprefix("run.") for name, _ in choices(default))
        asked = tuple(name for name in asked if f"--{name}" in {word.partition("=")[0] for word in args})
        default, args = choose_kinds(default, args, prefix="run.")
        if hasattr(default, "run") and {"-h", "--help"} & set(args):
            print(short_help(default, f"fewstep {command}", asked))
            raise SystemExit(0)
        description = _with_choices(default)
    args = ["--help" if word == "--help-all" else word for word in args]
    args = gathered(args, lists(default if default is not None else cls))
    try:
        with contextlib.redirect_stderr(complaint):
            parsed, unknown = tyro.cli(
                cls,
                args=list(args),
                prog=f"fewstep {command}",
                default=default,
                description=description,
                config=(tyro.conf.AvoidSubcommands,),
                return_unknown_args=True,
            )
    except SystemExit as error:
        if not error.code:
            raise
        raise ConfigError(f"fewstep {command}: {_first_paragraph(complaint.getvalue())}") from error
    if unknown:
        known = _option_names(default if default is not None else cls)
        known += [] if default is None else [f"--{name.removeprefix('run.')}" for name, _ in choices(default)]
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"fewstep {command}: unknown option {unknown[0]}{hint} (--help lists every option)")
    return cast(T, parsed)


def _with_choices(default: object) -> str | None:
    """What a command does, and the settings whose kind can be chosen with what each is; None where there are none."""
    lines = []
    for name, annotation in choices(default):
        known = kinds(annotation)
        lines.append(f"  --{name.removeprefix('run.')} {{{','.join(known)}}}")
        lines += [f"    {kind}: {(inspect.getdoc(cls) or '').split(chr(10))[0]}" for kind, cls in known.items()]
    about = (
        "Of these settings the kind can be chosen, with its own defaults; --help after it lists its options. "
        "FILE.py:CLASS is one of your own:"
    )
    return "\n\n".join([(type(default).__doc__ or "").strip(), about, "\n".join(lines)]) if lines else None


def _first_paragraph(box: str) -> str:
    """What a framed message of tyro says before its first rule."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    rules = [i for i, line in enumerate(lines) if line.startswith(("─", "╰"))]
    return " ".join(lines[: rules[0]] if rules else lines)


def gathered(args: Sequence[str], lists: Collection[str]) -> list[str]:
    """Words with all values of an option that takes several behind its first mention: --label a --label b."""
    found: list[str] = []
    values: dict[str, list[str]] = {}
    into = None
    for word in args:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            into = name if name in lists else None
            if into is None:
                found.append(word)
                continue
            if into not in values:
                values[into] = []
                found.append(into)
            values[into] += [value] if equals else []
        elif into is None:
            found.append(word)
        else:
            values[into].append(word)
    return [word for each in found for word in (each, *values.get(each, ()))]


def lists(options: object) -> set[str]:
    """The options that take several values."""
    return {name for name, value in _options(options) if isinstance(value, tuple)}


def _option_names(options: object) -> list[str]:
    """The option strings of a dataclass, nested fields by dots."""
    return [name for name, _ in _options(options)]


def _options(options: object, prefix: str = "--") -> list[tuple[str, Any]]:
    """The option strings of a dataclass with their values, nested fields by dots."""
    names: list[tuple[str, Any]] = []
    for item in dataclasses.fields(options):  # type: ignore[arg-type]  # callers pass dataclasses
        name = prefix + item.name.replace("_", "-")
        value = item.default if isinstance(options, type) else getattr(options, item.name)
        nested = dataclasses.is_dataclass(value)
        inner = prefix if item.name in ("run", "settings", "work") else f"{name}."
        names += _options(value, inner) if nested else [(name, value)]
    return names
