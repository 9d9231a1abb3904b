"""What the commands say of themselves: the overview, the version, recipes, objectives, and help of every option."""

import contextlib
import itertools
import os
import re
import subprocess
import sys

import pytest

import fewstep
from fewstep.cli.kinds import choices
from fewstep.cli.main import COMMANDS, OVERVIEW, main
from fewstep.objectives import TABLE
from fewstep.recipes import RECIPES, recipe
from fewstep.utils.parts import kinds
from tests.support.commands import ENVIRONMENT, Command


def test_no_command_prints_the_overview(command: Command) -> None:
    for words in ([], ["--help"], ["-h"]):
        shown = command(*words)
        assert (shown.code, shown.out, shown.err) == (0, OVERVIEW, "")
    assert all(f"fewstep {name}" in OVERVIEW for name in COMMANDS)


def test_the_version(command: Command) -> None:
    assert command("--version").out.strip() == fewstep.__version__


def test_recipes_are_listed_with_what_they_say(command: Command) -> None:
    shown = command("recipes").out
    for name, build in RECIPES.items():
        assert f"\n{name}\n" in f"\n{shown}"
        first = (build.__doc__ or "").splitlines()[0]
        assert first in shown


def test_a_reader_that_goes_away_gets_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does what is buffered fail where the stream is closed, as it is at a process's end."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone, contextlib.redirect_stdout(gone):
        assert main(["recipes"]) == 1
        print("more", flush=True)
    assert capsys.readouterr().err == ""


def test_objectives_are_listed(command: Command) -> None:
    shown = command("objectives").out
    assert all(entry.name in shown and entry.paper in shown for entry in TABLE)
    assert command("objectives", "--all").code == 2


def test_train_without_a_recipe_explains(command: Command) -> None:
    shown = command("train", "--help")
    assert shown.code == 0
    assert "usage: fewstep train RECIPE" in shown.out


def test_what_commands_there_are_is_shown_without_pytorch() -> None:
    """So that it is shown at once."""
    shown = "import sys; from fewstep.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", shown], env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("objectives", "train")])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str], command: Command) -> None:
    with pytest.raises(SystemExit) as stop:
        command(name, "--help")
    assert not stop.value.code
    assert f"usage: fewstep {name}" in capsys.readouterr().out


def own_kinds(setting: str) -> list[str]:
    """The commands that choose each of fewstep's own kinds of a setting of the recipe digits."""
    own = kinds(dict(choices(recipe("digits")))[setting])
    return [f"train digits --{setting} {name}" for name, cls in own.items() if cls.__module__.startswith("fewstep.")]


def options_shown(printed: str) -> dict[str, str]:
    """The options of a --help with the words before their default."""
    shown: dict[str, str] = {}
    name = ""
    for line in printed.partition(" options ")[2].splitlines():  # from the heading of the first box on
        text = line.strip("│ ")
        if re.match(r"[│ ] --?\w", line):  # boxes are drawn where the stream can show them
            name, *words = re.split(r"\s{2,}", text, maxsplit=1)
            shown[name] = "".join(words)
        elif re.match(r"[│ ]  ", line) and name:
            shown[name] += f" {text}"
        else:
            name = ""
    return {name: re.split(r"\((?:default: |required\))", words)[0].strip() for name, words in shown.items()}


SETTINGS = ("objective", "network", "objective.pairs.times", "objective.guidance")
OTHERS = [name for name in COMMANDS if name not in ("recipes", "train")]


@pytest.mark.parametrize("words", [*OTHERS, "train digits", *itertools.chain(*map(own_kinds, SETTINGS))])
def test_every_option_has_words_beside_its_default(
    words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # a narrow one breaks the names, a wide one has boxes beside one another
    with pytest.raises(SystemExit):
        command(*words.split(), "--help-all" if words.startswith("train") else "--help")
    shown = options_shown(capsys.readouterr().out)
    assert len(shown) > 1
    assert [name for name, text in shown.items() if not text] == []
