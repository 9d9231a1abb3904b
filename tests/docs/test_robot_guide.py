"""The guide's own robot: its files are written and its commands run, as a reader would, with shorter trainings."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fewstep import FewstepError
from fewstep.cli.main import main
from fewstep.policies.running import Simulations
from fewstep.policies.tasks.registry import find_task
from tests.docs.test_commands_in_docs import commands, words
from tests.docs.test_examples_in_docs import blocks
from tests.support.commands import SMALL
from tests.support.figures import draw_once

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "your-own-robot.md"
SHORTER = {
    "demos": ("-n", "12", "--quiet"),
    "train": (
        *SMALL, "--training.batch-size", "64", "--training.images", "640", "--training.checkpoint-images", "640",
        "--optimizer.warmup-images", "64",
    ),
    "rollout": ("--episodes", "3", "--quiet"),
    "evaluate": ("--samples", "16", "--steps", "1", "--episodes", "2"),
    "report": (),
}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The guide's files, in the folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    draw_once(monkeypatch)
    for name, text in zip(("my_task", "my_data", "my_gym"), blocks(GUIDE), strict=False):
        Path(f"{name}.py").write_text(text)
    return tmp_path


def test_the_guides_commands_run(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run([sys.executable, "my_data.py"], check=True)
    said = []
    for line in commands(GUIDE):
        if given := words(line):
            assert main([*given, *SHORTER[given[0]]]) == 0, capsys.readouterr().err
            said.append(capsys.readouterr().out)
    assert "Next: fewstep rollout runs/policy-mlp --task my_task.py:TASK" in said[1]
    page = (files / "runs/policy-mlp/report.html").read_text()
    assert "elbow left" in page
    assert "data:image/gif" in page


@pytest.mark.usefixtures("files")
def test_the_guides_wrapper_of_gymnasium_steps() -> None:
    pytest.importorskip("gymnasium")
    with Simulations(find_task("my_gym.py:TASK")) as simulations:
        first, again = simulations.running([3, 3])
        for each in (first, again):
            each.begin()
            each.act(np.array([5.0], dtype=np.float32))
            assert not each.error
        assert all((one == other).all() for one, other in zip(first.seen, again.seen, strict=True))


@pytest.mark.usefixtures("files")
def test_what_is_no_task_gets_one_line() -> None:
    source = Path("my_task.py").read_text()
    Path("odd.py").write_text(source + "\nclass Bare:\n    pass\nWHOLE = 3\ndef fails():\n    raise KeyError('x')\n")
    for name, said in {
        "odd.py:Arm": "is a Simulation: name the Task that makes it",
        "odd.py:WHOLE": "no fewstep.Task",
        "odd.py:Bare": "no fewstep.Task",
        "odd.py:fails": "gives no task: KeyError",
        "odd.py:NONE": "has no 'NONE': it has places, Arm, Bender, TASK, Bare, fails",
        "odd.py": "name the task in it, such as odd.py:TASK",
        "none.py:TASK": "no such file",
        "armm": "one of your own is FILE.py:NAME",
    }.items():
        with pytest.raises(FewstepError, match=re.escape(said)):
            find_task(name)
    assert find_task("odd.py:TASK").name == find_task("arm").name == "arm"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("return Outcome(self.observe(), success=reached", "return dict(seen=self.observe()", "step gave a"),
        ("make=lambda pictures: Arm()", "make=lambda pictures: 3", "make gave a int"),
        ("action_low=(-1.0, -1.0)", "action_low=(-1.0,)", "action bounds"),
        ("observation_size=6", "observation_size=7", "an observation of shape (6,)"),
    ],
)
@pytest.mark.usefixtures("files")
def test_a_simulator_that_does_not_fit_is_said(old: str, new: str, said: str) -> None:
    text = blocks(GUIDE)[0]
    assert old in text
    Path("broken.py").write_text(text.replace(old, new))
    with pytest.raises(FewstepError, match=re.escape(said)):
        _act_once("broken.py:TASK")


def _act_once(name: str) -> None:
    with Simulations(find_task(name)) as simulations:
        (running,) = simulations.running([0])
        running.begin()
        if not running.over:
            running.act(np.zeros(2, dtype=np.float32))
    if running.error:
        raise FewstepError(running.error)
