"""Parts from a user's own file, tests/support/outside.py: trained, killed, resumed, measured, compared like fewstep's.

Nothing but the user's own words imports code.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

import fewstep
from fewstep.data.sources import load_dataset
from fewstep.recipes import recipe
from fewstep.training import RunFolder, train_run
from fewstep.training.loop import Trainer
from fewstep.utils.errors import ConfigError, FewstepError
from fewstep.utils.parts import import_file
from fewstep.utils.serialization import from_json, to_json
from tests.support.commands import SMALL, STEPS, Command, Finished
from tests.support.processes import Forking
from tests.support.tiny import RUNTIME, Killed, assert_same_run, interrupt_after

OUTSIDE = Path(__file__).parents[1] / "support" / "outside.py"
OUTSIDE_TEACHERS = OUTSIDE.with_name("outside_teachers.py")
QUIET = ("--runtime.cpu", "--runtime.quiet", "--runtime.threads", "1")
PARTS = (
    "--import", OUTSIDE, "--data.source", "bands", "--data.source.width", 6, "--model.path", "bent",
    "--model.preconditioning", f"{OUTSIDE}:SteepPreconditioningConfig", "--model.preconditioning.rate", 3,
    "--model.scaling", "half", "--network", "layer", "--objective", "scaled-matching", "--objective.scale", "2.0",
)  # fmt: skip


@pytest.fixture(scope="module")
def outside_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of tests/support/outside.py, trained in Python without a stop."""
    config = recipe(str(OUTSIDE))
    run = RunFolder(tmp_path_factory.mktemp("outside") / "run")
    train_run(config, load_dataset(config.data), run, RUNTIME)
    return run.root


def refused(finished: Finished, message: str) -> None:
    lines = finished.err.strip().splitlines()
    assert (finished.code, len(lines)) == (2, 1), finished.err
    assert re.search(message, lines[0]), lines[0]


def test_a_run_of_outside_parts_is_stopped_resumed_measured_and_compared(
    outside_run: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, Trainer, "take_step", 5)
        with pytest.raises(Killed):
            command("train", OUTSIDE, *QUIET)
    trained = command("train", OUTSIDE, *QUIET)
    assert trained.code == 0
    assert trained.out.splitlines()[-1].count(f" --import {OUTSIDE}") == 3
    assert_same_run(tmp_path / "runs" / "outside", outside_run)
    shown = command("evaluate", "runs/outside")
    assert (shown.code, shown.err) == (0, "")
    assert "ScaledMatching" in shown.out
    config = "runs/outside/config.json"
    assert command("train", config, "--training.seed", 1, "--out", "other", *QUIET).code == 0
    assert command("train", config, "--objective", "mean-flow", "--out", "own", *QUIET).code == 0
    shown = command("compare", "runs/outside", "other", "own", "--import", OUTSIDE)
    assert (shown.code, shown.err) == (0, "")
    assert "objective outside.py:ScaledMatching" in shown.out
    assert command("report", "runs/outside").code == 0
    assert "bent path, steep preconditioning" in (tmp_path / "runs/outside/report.html").read_text()
    assert command("sample", "runs/outside", "--count", 4).code == 0


def test_the_command_line_names_outside_parts(outside_run: Path, command: Command, tmp_path: Path) -> None:
    """By the file and class, or by their kind's name once the file is imported."""
    assert command("train", "digits", *PARTS, *STEPS, *QUIET, "--out", "run").code == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["run"]
    there = json.loads((outside_run / "config.json").read_text())["run"]
    assert [stored[key] for key in ("data", "model", "network", "objective")] == [
        there[key] for key in ("data", "model", "network", "objective")
    ]
    assert stored["objective"] == {"type": "outside.py:ScaledMatching", "scale": 2.0, "label_dropout": 0.0}
    assert_same_run(tmp_path / "run", outside_run)


def test_what_goes_on_with_a_run_names_the_files_it_needs(outside_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(OUTSIDE.parent)
    assert RunFolder(outside_run).going_on == f"fewstep train --resume {outside_run} --import outside.py"


@pytest.mark.parametrize(
    ("kind", "file", "name"),
    [
        ("ctm-digits", OUTSIDE, "MeanTeacher"),
        ("cd-digits", OUTSIDE_TEACHERS, "mean_teacher"),
        ("digits-scd", OUTSIDE, "MeanTeacher"),
    ],
)
def test_a_teacher_from_a_file_is_distilled(kind: str, file: Path, name: str, command: Command, tmp_path: Path) -> None:
    """CTM with statistics of it, CD and sCD; a copy resumed after six steps, and aligned with it."""
    teacher = ("--teacher", f"{file}:{name}", "--initial=")
    data = ("--data.source", f"{OUTSIDE}:BandsSource", "--data.source.width", 6, "--data.labels")
    words = ("train", kind, *data, *SMALL, *STEPS, "--statistics.samples", 64, "--statistics.points", 8, *teacher)
    trained = command(*words, "--out", "whole")
    assert trained.code == 0
    assert f"fewstep evaluate whole --import {OUTSIDE}" in trained.out.splitlines()[-1]
    assert f" --import {file}   fewstep report" in trained.out.splitlines()[-1]
    shutil.copytree("whole", "run")
    for step in (9, 10):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    assert command(*words, "--out", "run").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert json.loads((tmp_path / "run/config.json").read_text())["run"]["teacher"] == f"{file.name}:{name}"
    shown = command("evaluate", "run")
    assert (shown.code, shown.err) == (0, "")
    assert f"Alignment with {file.name}:{name}" in shown.out
    assert not (tmp_path / f"{file.name}:{name}").exists()


def test_a_teacher_must_be_one(command: Command) -> None:
    refused(
        command("train", "cd-digits", "--teacher", f"{OUTSIDE}:LayerConfig"),
        r"LayerConfig is no TeacherModel",
    )
    for name, line in {
        "no_teacher": "returns no TeacherModel",
        "broken_teacher": r"gives no teacher: .*weights\.pt \(outside_teachers\.py, line \d+\)",
        "Shrinking": r"gives no teacher: TypeError: .*'variance'",
    }.items():
        refused(command("train", "cd-digits", "--teacher", f"{OUTSIDE_TEACHERS}:{name}"), f"{name} {line}")
    absent = command("train", "cd-digits", "--teacher", f"{OUTSIDE_TEACHERS}:absent")
    refused(absent, "has no 'absent': it has Shrinking, Flat, mean_teacher, no_teacher, broken_teacher$")
    refused(command("train", "cd-digits", "--teacher=gone.py:Mine"), r"gone\.py: no such file")


def test_what_a_teacher_of_a_file_cannot_give_is_said_with_the_way_out(command: Command) -> None:
    """Labels that the recipe leaves out, weights to start from, a denoised sample of the right shape."""
    data = ("--data.source", f"{OUTSIDE}:BandsSource", "--data.source.width", 6)
    words = ("train", "cd-digits", "--teacher", f"{OUTSIDE_TEACHERS}:Flat", *data, *SMALL, *STEPS)
    refused(command(*words), r"in 6 classes, but .* 0 classes: --data\.labels takes those that the data have$")
    refused(command(*words, "--data.labels"), r"--initial= lets the student start from its own$")
    wrong = r"Flat\.denoise gives \(\d+, 36\) for samples of shape \(\d+, 1, 6, 6\): give one tensor of their shape$"
    refused(command(*words, "--data.labels", "--initial="), wrong)
    shown = command(*words, "--data.labels", "--training.seed", 1, "--initial=")
    refused(shown, r"\(run\.training\.seed: 0 -> 1\) and no checkpoint yet: delete it, or give another folder")


def test_another_process_loads_the_run_where_its_file_is_named(
    outside_run: Path, tmp_path: Path, forked: Forking
) -> None:
    sample = ("-m", "fewstep", "sample", outside_run, "--out", tmp_path / "a.png")
    shutil.copy(OUTSIDE, outside_run)  # beside its config.json, where nothing looks for it
    refused(forked.start(*sample).wait(), r"outside\.py:\w+ .*--import outside\.py")
    named = forked.start(*sample, "--import", OUTSIDE).wait()
    assert (named.code, named.err) == (0, "")


def hostile(folder: Path, name: object) -> Path:
    """A folder whose file would leave a mark when imported, and whose configuration names it so."""
    run = folder / "hostile"
    run.mkdir()
    (folder / "evil.py").write_text("open('mark', 'w')\n")
    (run / "my_file.py").write_text("open('mark', 'w')\n")
    for key in ("objective", "network"):
        stored = to_json(recipe("digits"))
        assert isinstance(stored, dict)
        stored[key] = {"type": name}  # type: ignore[dict-item]
        (run / "config.json").write_text(json.dumps({"format": 2, "run": stored, "data": {}}))
    return run


@pytest.mark.parametrize(
    "name", ["my_file.py:MyObjective", "my_file:MyObjective", "os.system", "../evil.py:X", "evil.py:X", "os:system", 3]
)
def test_a_folder_never_causes_an_import(name: object, tmp_path: Path, command: Command) -> None:
    run = hostile(tmp_path, name)
    before = set(sys.modules)
    for words in (("sample", run), ("evaluate", run), ("report", run), ("train", run / "config.json", "--out", "x")):
        finished = command(*words)
        assert finished.code == 2
        assert len(finished.err.splitlines()) == 1
    with pytest.raises(FewstepError):
        fewstep.load(run)
    assert not (tmp_path / "mark").exists()
    assert not (run / "mark").exists()
    assert not {module for module in set(sys.modules) - before if "my_file" in module or "evil" in module}


FILES = {
    "raises.py": "x = 1\nraise ValueError('not\\ntoday')\n",
    "wrong.py": "def broken(:\n",
    "leaves.py": "import sys\nsys.exit(3)\n",
    "shadow.py": (
        "from dataclasses import dataclass\nfrom fewstep.objectives import MeanFlow as Base\n"
        "@dataclass(frozen=True)\nclass MeanFlow(Base):\n    pass\n"
    ),
    "parts.py": (
        "from dataclasses import dataclass\nfrom fewstep.networks.base import NetworkConfig\n"
        "from fewstep.objectives import Objective\n"
        "class Bare(Objective):\n    label_dropout = 0.0\n    def __call__(self, *args):\n        pass\n"
        "@dataclass(frozen=True)\nclass Needy(Bare):\n    value: int\n"
        "@dataclass(frozen=True)\nclass Empty(NetworkConfig):\n    pass\n"
        "def one():\n    return 1\ndef two(x):\n    return x\n_THREE = 3\n"
    ),
    "single.py": "from fewstep.recipes import recipe as _own\ndef mine():\n    return _own('digits')\n",
    "text.txt": "",
}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train digits --import gone.py", r"gone\.py: no such file"),
        ("train digits --import", r"--import needs a file"),
        ("sample run --import text.txt", r"text\.txt is no Python file"),
        ("train digits --import raises.py", r"raises\.py cannot be imported, line 2: ValueError: not today"),
        ("train digits --objective raises.py:X", r"--objective raises\.py cannot be imported, line 2"),
        ("report run --import wrong.py", r"wrong\.py cannot be imported: SyntaxError"),
        ("train leaves.py", r"leaves\.py cannot be imported, line 2: SystemExit: 3"),
        ("train digits --import shadow.py", r"shadow\.py: MeanFlow has the name of a part of fewstep, mean-flow"),
        ("train digits --objective gone.py:X", r"--objective gone\.py: no such file"),
        ("train digits --objective parts.py:Gone", r"parts\.py has no 'Gone': it has Bare, Needy, Empty, one, two"),
        ("train digits --objective parts.py:Empty", r"parts\.py:Empty is no Objective"),
        ("train digits --objective parts.py:one", r"parts\.py:one is no Objective"),
        ("train digits --objective parts.py:Bare", r"parts\.py:Bare .*@dataclass\(frozen=True\)"),
        ("train digits --objective parts.py:Needy", r"parts\.py:Needy has fields without a default, value"),
        ("train digits --network parts.py:Empty", r"parts\.py:Empty lacks build"),
        ("train parts.py", r"parts\.py has one, two: a recipe is its only public function"),
        ("train parts.py:one", r"parts\.py:one is no recipe: one returns a int"),
        ("train parts.py:two", r"parts\.py:two is no recipe: .*without arguments"),
        ("train parts.py:_THREE", r"parts\.py:_THREE is no recipe"),
        ("train single.py", r"single\.py .*digits.* --out"),
        ("train gone.py", r"gone\.py: no such file"),
        ("train gone/config.json", r"gone/config\.json: no such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_said_in_one_line(
    words: str, message: str, command: Command, tmp_path: Path
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    refused(command(*words.split()), message)
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == set(FILES)


def test_two_files_of_one_name_are_told_apart(tmp_path: Path, command: Command) -> None:
    """A kind's short name, and a stored name, stand for one class or for none."""
    text = FILES["single.py"] + (
        "from dataclasses import dataclass\nfrom fewstep.networks.base import NetworkConfig\n"
        "from fewstep.networks.mlp import MLPConfig\n"
        "@dataclass(frozen=True)\nclass TwinConfig(MLPConfig):\n    pass\n"
    )
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "twin.py").write_text(text)
    words = ("train", "digits", "--import", "a/twin.py", "--import=b/twin.py")
    refused(command(*words, "--network", "twin"), r"--network twin may be twin\.py:TwinConfig or twin\.py:TwinConfig")
    stored = to_json(import_file(tmp_path / "a" / "twin.py").TwinConfig())
    with pytest.raises(ConfigError, match=r"may be of .*a/twin\.py or .*b/twin\.py: rename one"):
        from_json(fewstep.NetworkConfig, stored)


def test_a_configuration_is_a_recipe_with_a_folder_of_its_own(small_run: Path, command: Command) -> None:
    config = small_run / "config.json"
    refused(command("train", config, "--training.seed", 2), r"give a folder with --out")
    assert command("train", config, "--training.seed", 2, "--out", "again", *SMALL[6:]).code == 0
    assert RunFolder(Path("again")).config().training.seed == 2
