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

ANYWHERE = {
    "errors",
    "shapes",
    "conditions",
    "randomness",
    "serialization",
    "files",
    "forward_mode",
    "integration",
    "_version",
}
LAYERS = [
    {"autoencoders"},
    {"control"},
    {"data"},
    {"encoding"},
    {"paths"},
    {"preconditioning"},
    {"networks"},
    {"schedules"},
    {"flowmap"},
    {"derivatives", "times", "guidance", "weights"},
    {"solvers"},
    {"objectives"},
    {"oracles"},
    {"config"},
    {"cost"},
    {"training"},
    {"sampling"},
    {"evaluation"},
    {"reporting"},
    {"viewing"},
    {"policies"},
    {"recipes"},
    {"students"},
    {"measuring"},
    {"robots"},
    {"tuning"},
    {"runs"},
    {"studies"},
    {"comparison"},
    {"quickstart"},
    {"options"},
    {"kinds"},
    {"parsing"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
NEVER = {
    "networks": {"paths", "preconditioning", "data"},
    "objectives": {"data"},
    "evaluation": {"training"},
    "paths": {"data"},
    "preconditioning": {"data"},
    "flowmap": {"data"},
}


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
    if own == "__init__":
        return []
    found = []
    for other in imports(source):
        if other in ANYWHERE or other == own:
            continue
        if own in ANYWHERE or other not in RANK or RANK[other] > RANK[own] or other in NEVER.get(own, set()):
            found.append(f"{own} imports {other or 'the whole package'}")
        elif RANK[other] == RANK[own]:
            found += [] if own == "guidance" else [f"{own} imports its neighbour {other}"]
    return found


def test_every_module_has_its_place() -> None:
    assert {part(file) for file in FILES} - {"__init__"} <= ANYWHERE | set(RANK)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file: Path) -> None:
    assert violations(part(file), file.read_text()) == []


@pytest.mark.parametrize(
    ("own", "source"),
    [
        ("networks", "from fewstep.paths import EDM"),
        ("objectives", "def f():\n    import fewstep.training.loop"),
        ("objectives", "from fewstep.data import Dataset"),
        ("evaluation", "from fewstep.training import train"),
        ("paths", "from fewstep import flowmap"),
        ("times", "from fewstep.guidance import guide"),
        ("shapes", "from fewstep.paths import EDM"),
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
