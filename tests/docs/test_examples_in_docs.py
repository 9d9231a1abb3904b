"""Python in the documentation runs as it stands, and says what the page says."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.cli.main import main
from fewstep.networks.mlp import MLPConfig
from fewstep.recipes import RECIPES, recipe

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "add-an-objective.md"


def blocks(page: Path) -> list[str]:
    """The Python code blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The guide's objective, as the file that it tells the reader to save."""
    file = tmp_path / "my_objective.py"
    file.write_text(blocks(GUIDE)[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield file
    sys.modules.pop("my_objective", None)


@pytest.mark.usefixtures("written")
def test_guides_objective_is_zero_at_an_exact_flow_map() -> None:
    names: dict[str, Any] = {}
    exec(blocks(GUIDE)[2], names)
    assert names["losses"].logs["distill"].max() < 1e-25


@pytest.mark.usefixtures("written")
def test_guides_objective_trains_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    train = "train digits --objective my_objective.py:OwnTangent --objective.weighting.weight-eps 0.01 --out mine"
    short = "--network.width 16 --training.images 512 --training.sample-images 0 --runtime.cpu --runtime.quiet"
    assert main([*train.split(), *short.split()]) == 0, capsys.readouterr().err
    assert main(["sample", "mine", "--import", "my_objective.py", "--count", "4", "--cpu"]) == 0


SHORT = ("--training.images", "256", "--training.sample-images", "0", "--runtime.cpu", "--runtime.quiet")
PARTS = {
    "a network and data": "digits --network my_network.py:SmallConfig --network.width 8 "
    "--data.source my_data.py:StripesSource --data.source.width 6",
    "an objective": "digits --objective my_straight.py:Straight --network.width 16",
    "a teacher": "ctm-digits --teacher my_teacher.py:NormalTeacher --initial= --model.preconditioning euler "
    "--network.width 16 --evaluation.curve-images 0",
    "a teacher of classes": "ctm-flow-matching --teacher my_flow.py:FlowTeacher --data.labels --initial= "
    "--network.width 16 --evaluation.curve-images 0",
}


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guides' files, in the folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    guides = ROOT / "docs" / "guides"
    network, data, _ = blocks(guides / "your-own-parts.md")
    teacher, flow, *_ = blocks(guides / "bring-a-teacher.md")
    straight = blocks(GUIDE)[1]
    files = {"network": network, "data": data, "teacher": teacher, "flow": flow, "straight": straight}
    for name, text in files.items():
        Path(f"my_{name}.py").write_text(text)


@pytest.mark.parametrize("what", PARTS)
@pytest.mark.usefixtures("parts")
def test_guides_other_parts_train(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *PARTS[what].split(), *SHORT, "--out", "run"]) == 0, capsys.readouterr().err


@pytest.mark.usefixtures("parts")
def test_training_from_python_does_as_the_guide_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All examples, on fewer images and a small network."""
    small = replace(recipe("digits"), network=MLPConfig(width=16, depth=1, embedding_width=16))
    monkeypatch.setitem(RECIPES, "digits", lambda: small)
    for block in blocks(ROOT / "docs" / "guides" / "from-python.md"):
        exec(block.replace("20_000", "2_560").replace("Patience(100)", "Patience(0)"), {})
    assert Path("three.png").is_file()
    assert "no better than" in capsys.readouterr().out


def test_readmes_pieces_make_a_loss() -> None:
    names: dict[str, Any] = {}
    exec(blocks(ROOT / "README.md")[1], names)
    assert torch.isfinite(names["losses"].loss).all()
