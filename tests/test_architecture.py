"""The source's own rules: imports go one way, and nothing loads code or reaches for the network on its own."""

from __future__ import annotations

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
