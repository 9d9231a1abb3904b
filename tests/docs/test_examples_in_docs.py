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
    exec(blocks(GUIDE)[1], names)
    assert names["losses"].logs["distill"].max() < 1e-25


@pytest.mark.usefixtures("written")
def test_guides_objective_trains_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    train = "train digits --objective my_objective.py:OwnTangent --objective.weighting.weight-eps 0.01 --out mine"
    short = "--network.width 16 --training.images 512 --training.sample-images 0 --runtime.cpu --runtime.quiet"
    assert main([*train.split(), *short.split()]) == 0, capsys.readouterr().err
    assert main(["sample", "mine", "--import", "my_objective.py", "--count", "4", "--cpu"]) == 0


def test_guides_other_parts_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    guides = ROOT / "docs" / "guides"
    network, data, _ = blocks(guides / "your-own-parts.md")
    for name, text in {"net": network, "data": data, "teacher": blocks(guides / "bring-a-teacher.md")[0]}.items():
        Path(f"my_{name}.py").write_text(text)
    own = "train digits --network my_net.py:AffineConfig --network.width 8 --data.source my_data.py:StripesSource"
    taught = "train ctm-digits --teacher my_teacher.py:NormalTeacher --initial= --model.preconditioning euler"
    for words in (own, f"{taught} --network.width 16 --evaluation.curve-images 0"):
        short = "--training.images 256 --training.sample-images 0 --runtime.cpu --runtime.quiet --out"
        assert main([*words.split(), *short.split(), words.split()[1]]) == 0, capsys.readouterr().err


def test_training_from_python_does_as_the_guide_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both examples, on fewer images and a small network."""
    monkeypatch.chdir(tmp_path)
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
