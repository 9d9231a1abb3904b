"""The source's own rules: imports go one way, and nothing loads code or reaches for the network on its own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fewstep

ROOT = Path(fewstep.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

ROOMS = (
    "utils",
    "networks",
    "flow",
    "teachers",
    "data",
    "objectives",
    "sampling",
    "recipes",
    "training",
    "policies",
    "evaluation",
    "export",
    "cli",
    "__main__",
)
"""From left to right: a room imports from itself and from those on its left."""
RANK = {name: rank for rank, name in enumerate(ROOMS)}
NEVER = {"objectives": {"data"}, "networks": {"flow"}}
"""What a room may not know although it stands on its left."""


def part(file: Path) -> str:
    """The module or package directly under fewstep that a file belongs to."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(source: str) -> Iterator[str]:
    """Parts of fewstep that a source imports, inside functions too; the package itself is ''."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            module = str(node.module)
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "fewstep" else [module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head == "fewstep":
                yield rest.partition(".")[0]


def violations(own: str, source: str) -> list[str]:
    """What a source in the room `own` imports that it must not."""
    if own == "__init__":
        return []
    wrong = [other for other in imports(source) if other != own and other != "_version"]
    return [
        f"{own} imports {other or 'the whole package'}"
        for other in wrong
        if RANK.get(other, len(RANK)) > RANK[own] or other in NEVER.get(own, set())
    ]


def test_the_hall_holds_rooms_alone() -> None:
    """At the top: rooms, and what Python itself asks for."""
    found = {path.name for path in ROOT.iterdir() if path.name != "__pycache__"}
    assert found <= {"__init__.py", "__main__.py", "_version.py", "py.typed", *ROOMS}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file: Path) -> None:
    assert violations(part(file), file.read_text()) == []


@pytest.mark.parametrize(
    ("own", "source"),
    [
        ("networks", "from fewstep.flow.paths import EDM"),
        ("objectives", "def f():\n    import fewstep.training.loop"),
        ("objectives", "from fewstep.data import Dataset"),
        ("training", "from fewstep.evaluation.evaluate import measure_run"),
        ("flow", "from fewstep import data"),
        ("utils", "from fewstep.flow.paths import EDM"),
        ("sampling", "import fewstep"),
    ],
)
def test_a_wrong_import_is_seen(own: str, source: str) -> None:
    assert len(violations(own, source)) == 1


FORBIDDEN = {
    "weights_only=False": r"weights_only\s*=\s*False",
    "allow_pickle=True": r"allow_pickle\s*=\s*True",
    "pickle.load": r"\bpickle\.loads?\(",
    "eval or exec": r"(?<![.\w])(eval|exec)\(",
    "a download": r"urlretrieve|urlopen|\brequests\.|load_state_dict_from_url|torch\.hub",
    "an address": r"https?://",
    "a rounded half pi": r"\b1\.57\d*\b",
}


@pytest.mark.parametrize("pattern", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_nothing_forbidden_is_in_the_source(pattern: str) -> None:
    found = [f"{part(file)}: {match[0]}" for file in FILES for match in re.finditer(pattern, file.read_text())]
    assert found == []


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a source, methods and nested ones too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def too_long(source: str) -> list[str]:
    """What is longer than a reader can hold: files over 400 lines, functions over 60 or with over 8 arguments."""
    lines = source.count("\n")
    found = [f"{lines} lines"] if lines > 400 else []
    for node in functions(source):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        arguments = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        arguments = [name for name in arguments if name not in ("self", "cls")]
        found += [f"{node.name} has {length} lines"] if length > 60 else []
        found += [f"{node.name} has {len(arguments)} arguments"] if len(arguments) > 8 else []
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_functions_and_signatures_are_short(file: Path) -> None:
    assert too_long(file.read_text()) == []


def test_what_is_too_long_is_seen() -> None:
    many = ", ".join("abcdefghi")
    body = "    pass\n" * 60
    assert too_long(f"def f({many}): pass\ndef g():\n{body}" + "\n" * 400) == [
        "462 lines", "f has 9 arguments", "g has 61 lines",
    ]  # fmt: skip


def repeated_runs(sources: dict[str, str], length: int = 6) -> list[str]:
    """Places where `length` lines of code stand that stood before; blank lines and imports do not count."""
    seen: dict[tuple[str, ...], str] = {}
    found = []
    for name, source in sources.items():
        imported = {
            number
            for node in ast.walk(ast.parse(source))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        lines = enumerate(source.splitlines(), start=1)
        kept = [line.strip() for number, line in lines if line.strip() and number not in imported]
        for start in range(len(kept) - length + 1):
            run = tuple(kept[start : start + length])
            if run in seen:
                found.append(f"{name} repeats {seen[run]}: {run[0]}")
            seen.setdefault(run, name)
    return found


def test_no_objective_repeats_another() -> None:
    assert repeated_runs({file.name: file.read_text() for file in (ROOT / "objectives").glob("*.py")}) == []
    assert repeated_runs({"a": "\n".join("abcdef"), "b": "\n".join("abcdef")}) == ["b repeats a: a"]
