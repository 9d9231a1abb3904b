"""Every command in the documentation is one that the parsers take, and every file that it names is there."""

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tyro

from fewstep.cli.main import COMMANDS, run_command
from fewstep.recipes import RECIPES

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
STANDS_FOR = {"RECIPE": "digits", "SEED": "5", "SHARE": "0.5", "LR": "1e-3", "F": "16", "OPTIONS": ""}
"""Words in capitals that are numbers or names; others are paths, and need not stand for any."""


class _ReadError(Exception):
    """The parser has taken all the words."""


def commands(page: Path) -> Iterator[str]:
    """Lines of a page's code blocks, with what a backslash joins joined, comments left out."""
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield re.split(r"\s+#\s", line.strip())[0]


def words(line: str) -> list[str]:
    """The words of `fewstep COMMAND ...` in a line, however it is launched; none for other lines."""
    match = re.match(r"(?:.*-m )?fewstep (.*)$", line)
    if not match or line.startswith(("pip ", "from ", "import ")):
        return []
    given = [STANDS_FOR.get(word, word) for word in shlex.split(match[1])]
    return [word for word, said in zip(given, shlex.split(match[1]), strict=True) if word or not said]


CASES = {line: str(page.relative_to(ROOT)) for page in PAGES for line in commands(page) if words(line)}


def needs_a_file(given: Sequence[str]) -> bool:
    """Whether a command names code, a configuration or a run of the reader's own, whose options it has."""
    return any(".py" in word or word.endswith("config.json") or word == "--resume" for word in given)


@pytest.fixture
def parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end where their words have been read."""
    real = tyro.cli

    def read(cls: Any, **settings: Any) -> Any:
        parsed = real(cls, **settings)
        if settings.get("return_unknown_args") and parsed[1]:
            return parsed  # the command says what it does not know
        raise _ReadError

    monkeypatch.setattr(tyro, "cli", read)


@pytest.mark.parametrize("line", CASES)
@pytest.mark.usefixtures("parsing")
def test_command_in_docs_is_taken(line: str) -> None:
    command, *given = words(line)
    assert command in COMMANDS or command == "COMMAND", f"{CASES[line]}: {line}"
    if needs_a_file(given) or {"--help", "--help-all"} & set(given) or command in ("COMMAND", "recipes", "objectives"):
        return
    with pytest.raises(_ReadError):
        run_command(command, given)


def test_recipes_in_docs_are_there() -> None:
    for line, page in CASES.items():
        command, *given = words(line)
        if command == "train" and given:
            assert given[0] in RECIPES or needs_a_file(given[:1]), f"{page}: {line}"


def test_benchmarks_in_docs_are_there() -> None:
    for page in PAGES:
        for study in re.findall(r"python -m benchmarks\.(\w+)", page.read_text()):
            assert (ROOT / "benchmarks" / study / "__main__.py").is_file() or study == "STUDY", f"{page}: {study}"
        for file in re.findall(r"python (benchmarks/[\w/]+\.py)", page.read_text()):
            assert (ROOT / file).is_file(), f"{page}: {file}"


def test_links_of_the_root_pages_are_there() -> None:
    for page in ROOT.glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (ROOT / link).exists(), f"{page}: {link}"


def test_prose_stays_narrow() -> None:
    """No line of prose over 200 characters; tables and code may be wider."""
    for page in PAGES:
        outside = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        long = [line for line in outside.splitlines() if len(line) > 200 and not line.startswith("|")]
        assert not long, f"{page}: {long[0]}"
