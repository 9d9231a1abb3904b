"""What a skip regresses on a teacher's trajectories: made once, kept beside the teacher, found again by its key."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fewstep
from fewstep.data.base import Dataset
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.preconditioning.covariance import CovarianceSettings
from fewstep.flow.preconditioning.jumps import EulerPreconditioningConfig
from fewstep.flow.preconditioning.regression import Measured, Regression
from fewstep.flow.preconditioning.skip import SkipPreconditioningConfig
from fewstep.training import RunFolder, trajectories
from fewstep.training.covariance import measure
from fewstep.training.setup import build
from fewstep.training.trajectories import kept_regression, run_measures
from fewstep.utils.errors import CheckpointError, ConfigError
from tests.support.tiny import STUDENTS

SKIP = SkipPreconditioningConfig(family="regressed-components", components=10, trajectories=20, levels=6)
CONFIG = replace(STUDENTS["ctm-skip"], model=replace(STUDENTS["ctm-skip"].model, preconditioning=SKIP))
assert SKIP.regression is not None
WANTED = SKIP.regression
COVARIANCE = CovarianceSettings(components=10)


@pytest.fixture
def model(teacher: Path) -> FlowMap:
    return fewstep.load(teacher).flow_map.requires_grad_(False)


@pytest.fixture(autouse=True)
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where it is kept, in place of the teacher's, which all tests share."""
    monkeypatch.setattr(trajectories, "folder_beside", lambda teacher, run: tmp_path / "teacher")
    (tmp_path / "teacher").mkdir()
    return tmp_path / "teacher"


def measures(model: FlowMap, digits: Dataset, tmp_path: Path, skip: SkipPreconditioningConfig = SKIP) -> Measured:
    config = replace(CONFIG, model=replace(CONFIG.model, preconditioning=skip))
    found = run_measures(config, digits, RunFolder(tmp_path / "run"), model)
    assert found is not None
    return found


def test_it_is_made_once_and_read_the_next_time(
    model: FlowMap, digits: Dataset, tmp_path: Path, beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measures(model, digits, tmp_path)
    assert first.regression == trajectories.regress(model, digits, measure(digits, COVARIANCE), WANTED)
    assert len(list(beside.rglob("skip-*.json"))) == 1
    monkeypatch.setattr(trajectories, "regress", lambda *given: pytest.fail("made again"))
    assert measures(model, digits, tmp_path) == first


def test_its_key_stands_for_the_teacher_the_data_and_the_settings(
    model: FlowMap, digits: Dataset, tmp_path: Path, beside: Path
) -> None:
    """A family's table is its own too: what is kept of one is not read for another."""
    for skip in (
        SKIP,
        replace(SKIP, levels=7),
        replace(SKIP, components=9),
        replace(SKIP, family="regressed", components=0),
    ):
        measures(model, digits, tmp_path, skip)
    measures(model, load_dataset(DataConfig(seed=1)), tmp_path)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-4
    measures(model, digits, tmp_path)
    assert len(list(beside.rglob("skip-*.json"))) == 6


@pytest.mark.parametrize("content", ["", "{", "[]", '{"lam": 1}'])
def test_a_damaged_file_is_named_and_left_as_it_is(
    content: str, model: FlowMap, digits: Dataset, tmp_path: Path, beside: Path
) -> None:
    measures(model, digits, tmp_path)
    (file,) = beside.rglob("skip-*.json")
    file.write_text(content)
    with pytest.raises(CheckpointError, match=rf"{file.name}.*delete it to make it anew"):
        measures(model, digits, tmp_path)
    assert file.read_text() == content


def test_where_nothing_can_be_kept_it_is_made_each_time(
    model: FlowMap, digits: Dataset, tmp_path: Path, beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *given: False)
    assert isinstance(measures(model, digits, tmp_path).regression, Regression)
    assert list(beside.iterdir()) == []


def test_its_cost_is_printed(model: FlowMap, digits: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    kept_regression(None, model, digits, measure(digits, COVARIANCE), WANTED, quiet=False)
    assert "skip: 20 trajectories of the teacher, 240 calls, " in capsys.readouterr().out


def test_without_a_teacher_it_is_refused(digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"name one with --teacher, or set --model\.preconditioning\.family covari"):
        run_measures(CONFIG, digits, RunFolder(tmp_path / "run"), None)


def test_what_does_not_fit_is_refused_before_trajectories_are_drawn(
    model: FlowMap, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectories, "regress", lambda *given: pytest.fail("drawn"))
    config = replace(CONFIG, network=replace(CONFIG.network, width=24))
    with pytest.raises(CheckpointError, match="of another architecture"):
        run_measures(config, digits, RunFolder(tmp_path / "run"), model)


@pytest.mark.parametrize("name", ["euler", "covariance"])
def test_what_sees_a_skip_is_trained_where_there_is_one(name: str, model: FlowMap, digits: Dataset) -> None:
    """Elsewhere it is not, so that processes that share gradients wait for none of it."""
    skip = EulerPreconditioningConfig() if name == "euler" else SkipPreconditioningConfig(components=10)
    seeing = replace(CONFIG.network, sees_skip=True)  # type: ignore[type-var]
    config = replace(CONFIG, network=seeing, model=replace(CONFIG.model, preconditioning=skip))
    network = build(config, digits, model).flow_map.network
    trained = {key for key, parameter in network.named_parameters() if parameter.requires_grad}
    assert any(key.startswith(("seen.", "gate.")) for key in trained) == (name == "covariance")
