"""Pages of the reference that are made from the package itself: commands, recipes, every public name.

`make docs` calls this through docs/hooks.py. What has no words in the package fails here: an option without help, a
public class, function or method without docstring.
"""

import importlib
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import griffe
import tyro

ROOMS = {
    "flow": "Paths, times, flow maps, preconditioning, derivatives, guidance, ODE solvers, closed forms.",
    "networks": "Networks of two times, their layers and conditions.",
    "teachers": "Models of elsewhere as denoisers.",
    "data": "Where samples come from: images, archives, latents, demonstrations, toys.",
    "objectives": "What is trained: one class a method.",
    "sampling": "Samplers, step times, what is saved and loaded.",
    "recipes": "Configurations of runs, and the functions that return them.",
    "training": "The loop, checkpoints, averages, optimizers, logs.",
    "policies": "Policies, simulations, rollouts, tasks.",
    "evaluation": "Measures, comparisons, tuned step times, reports.",
    "export": "Other formats: diffusers, ONNX, the hub.",
    "utils": "Errors, files, serialization, random numbers.",
}
"""What a room of the package holds; rooms that are not there yet are left out."""

_DEFAULT = re.compile(r"\s*\((?:default: (?P<default>.*)|required|repeatable.*|fixed.*)\)\s*$", re.DOTALL)


class UndocumentedError(Exception):
    """Something public has no words; the message names all of it."""


class _CapturedError(Exception):
    """The command has come to its parser."""


def parser_of(command: str, args: Sequence[str] = ()) -> Any:
    """The argparse parser that a command would read its words with, or None where it takes no options."""
    from fewstep.cli.main import run_command

    seen: dict[str, Any] = {}

    def capture(cls: type, **settings: Any) -> None:
        seen.update(settings, cls=cls)
        raise _CapturedError

    real, tyro.cli = tyro.cli, capture
    try:
        run_command(command, [*args, "--help-all" if args else "--help"])
    except _CapturedError:
        pass
    except Exception:
        if seen:
            raise
        return None
    finally:
        tyro.cli = real
    default = tyro.MISSING_NONPROP if seen.get("default") is None else seen["default"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return tyro.extras.get_parser(
            seen["cls"], default=default, config=seen.get("config"), description=seen.get("description")
        )


def _cell(text: str) -> str:
    """Text that stands in one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    return f"`{_cell(text)}`" if text.strip() else ""


def options(parser: Any, only: str = "") -> list[tuple[str, str, str, str]]:
    """(option, values, default, words) of a parser; only: those that begin with it."""
    rows = []
    for action in parser._actions:
        name = action.option_strings[0] if action.option_strings else str(action.metavar)
        if name in ("-h", "--help") or not name.startswith(only):
            continue
        words = action.help or ""
        match = _DEFAULT.search(words)
        default = (match["default"] or "") if match else ""
        values = ", ".join(action.option_strings[1:]) or str(action.metavar or "")
        rows.append((name, values, default, words[: match.start()] if match else words))
    return rows


def _table(rows: Sequence[tuple[str, str, str, str]]) -> list[str]:
    lines = ["| option | values | default | what it is |", "| --- | --- | --- | --- |"]
    return lines + [f"| {_code(n)} | {_code(v)} | {_code(d)} | {_cell(w)} |" for n, v, d, w in rows]


def _kinds(recipe: str) -> Iterator[tuple[str, str]]:
    """(setting, kind) of everything in a recipe whose kind can be chosen by name."""
    for line in str(parser_of("train", [recipe]).description).splitlines():
        if match := re.match(r"\s+(--[\w.-]+) \{(.*)\}", line):
            yield from ((match[1], kind) for kind in match[2].split(","))


def commands_page() -> str:
    """Every command with its options; raises UndocumentedError for options without words."""
    from fewstep.cli.main import COMMANDS

    lines = ["# Commands", "", "Every command and every option, as `fewstep COMMAND --help` has them.", ""]
    silent = []
    for command in COMMANDS:
        parser = parser_of(command, ["digits"] if command == "train" else [])
        lines += [f"## fewstep {command}", ""]
        if parser is None:
            lines += ["Takes no options.", ""]
            continue
        rows = options(parser)
        silent += [f"fewstep {command} {name}" for name, _, _, words in rows if not words.strip()]
        if command == "train":
            lines += ["Options and values of the recipe `digits`; other recipes have other values.", ""]
            lines += [*_table(rows), ""]
            for setting, kind in _kinds("digits"):
                try:
                    chosen = parser_of("train", ["digits", setting, kind])
                except Exception:  # a kind that does not go with the rest of the recipe
                    continue
                of_kind = options(chosen, only=f"{setting}.") if chosen is not None else []
                silent += [f"{setting} {kind}: {name}" for name, _, _, words in of_kind if not words.strip()]
                lines += [f"### {setting} {kind}", "", *(_table(of_kind) if of_kind else ["No options."]), ""]
        else:
            about = str(parser.description or "").strip()
            lines += [about, "", *(_table(rows) if rows else ["No options."]), ""]
            silent += [] if about else [f"fewstep {command}"]
    if silent:
        raise UndocumentedError("without words: " + ", ".join(silent))
    return "\n".join(lines)


def recipes_page() -> str:
    """Every recipe with what its function says of it; raises UndocumentedError where one says nothing."""
    from fewstep.recipes import RECIPES

    lines = ["# Recipes", "", "`fewstep train RECIPE` trains one; `fewstep recipes` adds what it costs.", ""]
    silent = []
    for name, build in RECIPES.items():
        words = (build.__doc__ or "").strip()
        silent += [] if words else [name]
        lines += [f"## {name}", "", re.sub(r"\n[ ]+", "\n", words), ""]
    if silent:
        raise UndocumentedError("recipes without words: " + ", ".join(silent))
    return "\n".join(lines)


def _public(item: griffe.Object | griffe.Alias) -> bool:
    return not item.name.startswith("_") and not item.is_alias


def _silent(cls: griffe.Class) -> Iterator[str]:
    """Public methods of a class of which neither it nor its bases say anything; protocols say it of themselves."""
    if any(str(base).endswith("Protocol") for base in cls.bases):
        return
    bases = [base for base in cls.mro() if base.canonical_path.startswith("fewstep.")]
    for name, method in cls.members.items():
        if not _public(method) or not method.is_function or method.has_docstring or name == "forward":
            continue
        if not any(name in base.members and base.members[name].has_docstring for base in bases):
            yield method.canonical_path


def _walk(module: griffe.Module) -> Iterator[griffe.Module]:
    """A module and the public ones below it, in order of name."""
    yield module
    for child in sorted(module.modules.values(), key=lambda m: m.name):
        if not child.is_alias and not child.name.startswith("_"):
            yield from _walk(child)


def rooms_there() -> list[str]:
    """Rooms of the package that there are, in the order of the page of rooms."""
    folder = Path(importlib.import_module("fewstep").__path__[0])
    return [room for room in ROOMS if (folder / room / "__init__.py").is_file()]


def api_pages() -> dict[str, str]:
    """Page by room of every public name, for mkdocstrings; raises UndocumentedError for names without docstring."""
    package = griffe.load("fewstep", search_paths=[Path(importlib.import_module("fewstep").__path__[0]).parent])
    silent, pages = [], {}
    for room in rooms_there():
        lines = [f"# fewstep.{room}", "", ROOMS[room], ""]
        for module in _walk(package.modules[room]):
            items = [i for i in module.members.values() if _public(i) and (i.is_class or i.is_function)]
            silent += [i.canonical_path for i in items if not i.has_docstring]
            silent += [path for i in items if i.is_class for path in _silent(i)]
            if items:
                lines += [f"::: {module.canonical_path}", ""]
        pages[f"reference/api/{room}.md"] = "\n".join(lines)
    if silent:
        raise UndocumentedError("without docstring: " + ", ".join(silent))
    return pages


def names_page() -> str:
    """The names that `import fewstep` gives, each with its first line and a link."""
    import fewstep

    lines = ["# Names of the package", "", "What `import fewstep` gives; each links to its entry.", ""]
    lines += ["| name | what it is |", "| --- | --- |"]
    for name in sorted(n for n in fewstep.__all__ if not n.startswith("_")):
        value = getattr(fewstep, name)
        first = (value.__doc__ or "").strip().splitlines() if callable(value) else []
        path = f"{getattr(value, '__module__', 'fewstep')}.{getattr(value, '__qualname__', name)}"
        link = f"[`{name}`][{path}]" if callable(value) else f"`{name}`"
        lines.append(f"| {link} | {_cell(first[0]) if first else ''} |")
    return "\n".join([*lines, ""])


def pages() -> dict[str, str]:
    """All pages made from the package, by path below docs/."""
    made = {"reference/commands.md": commands_page(), "reference/recipes.md": recipes_page()}
    return {**made, "reference/api/index.md": names_page(), **api_pages()}
