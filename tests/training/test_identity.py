"""What decides a run's weights, and what may differ between two starts: places, watching, a length nobody knows."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.data.base import Dataset
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.recipes.config import RunConfig, StatisticsConfig
from fewstep.training import RunFolder, train_run
from fewstep.training.identity import identity, knows_its_end, run_record
from fewstep.utils.errors import CheckpointError
from tests.support.tiny import KINDS, RUNTIME, TEACHERLESS, TINY, assert_same_run, stored_tensors


def changed(config: RunConfig, name: str, value: Any) -> RunConfig:
    """With one setting, or one setting of a part, at another value."""
    part, _, inner = name.partition(".")
    return replace(config, **{part: changed_part(getattr(config, part), inner, value) if inner else value})


def changed_part(settings: Any, name: str, value: Any) -> Any:
    return replace(settings, **{name: value})


def same(one: RunConfig, two: RunConfig) -> bool:
    first, second = (run_record(config, {"name": "n", "fingerprint": "f"}, "teacher") for config in (one, two))
    return identity(first, one) == identity(second, two)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("recipe", "another"), ("teacher", "elsewhere"), ("data.root", "elsewhere"), ("evaluation.samples", 99),
        ("training.log_images", 1), ("training.sample_images", 1), ("training.checkpoint_images", 1),
        ("training.keep", 9), ("training.images", 10**6), ("training.seconds", 9.0),
    ],
)  # fmt: skip
def test_what_may_differ(name: str, value: Any) -> None:
    assert same(TINY, changed(TINY, name, value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("initial", "elsewhere"), ("data.heldout", 0.5), ("data.seed", 1), ("optimizer.lr", 0.5),
        ("training.batch_size", 64), ("training.seed", 1), ("training.ema_decay", (0.5,)), ("statistics.points", 5),
        ("gan.lr", 0.5), ("network.width", 32), ("objective.label_dropout", 0.3), ("model.sigma_data", 2.0),
    ],
)  # fmt: skip
def test_what_decides_the_weights(name: str, value: Any) -> None:
    assert not same(TINY, changed(TINY, name, value))


@pytest.mark.parametrize("name", ["training.images", "training.seconds"])
@pytest.mark.parametrize("config", [KINDS["muon"], TEACHERLESS["isd-edm"]], ids=["cosine", "refreshed statistics"])
def test_a_length_that_a_step_depends_on_counts(config: RunConfig, name: str) -> None:
    assert knows_its_end(config)
    assert not same(config, changed(config, name, 10**6))
    assert not knows_its_end(replace(TINY, statistics=StatisticsConfig(refresh_images=9)))  # it has none


def test_a_longer_run_is_the_one_that_was_longer_from_the_start(
    digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    longer = changed(TINY, "training.images", 480)
    shutil.copytree(unbroken("adamw"), tmp_path / "run")
    for name in ("run", "whole"):
        train_run(longer, digits, RunFolder(tmp_path / name), RUNTIME)
    first, second = (stored_tensors(tmp_path / name) for name in ("run", "whole"))
    assert RunFolder(tmp_path / "run").last_checkpoint().name == "step-00000015"
    assert all(bool((first[key] == second[key]).all()) for key in second)
    cosine = changed(KINDS["muon"], "training.images", 480)
    with pytest.raises(CheckpointError, match=r"training\.images: 320 -> 480.*--initial .* starts from its weights"):
        train_run(cosine, digits, RunFolder(unbroken("muon")), RUNTIME)


def test_the_same_data_by_any_path_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `./data` in place of `data`, from another folder, moved under another name; other data are refused."""
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez("data.npz", images=pixels, labels=np.arange(60) % 2)

    def start(root: str) -> RunFolder:
        config = replace(TINY, data=DataConfig("npz", root))  # type: ignore[arg-type]
        train_run(config, load_dataset(config.data), RunFolder(tmp_path / "run"), RUNTIME)
        return RunFolder(tmp_path / "run")

    assert start("data.npz").config().data.root == str(tmp_path / "data.npz")
    start("./data.npz")
    monkeypatch.chdir("below")
    start("../data.npz")
    start(RunFolder("../run").config().data.root)
    (tmp_path / "data.npz").rename(tmp_path / "renamed.npz")
    assert start("../renamed.npz").config().data.root == str(tmp_path / "renamed.npz")
    np.savez("other.npz", images=255 - pixels, labels=np.arange(60) % 2)
    with pytest.raises(CheckpointError, match=r"data\.fingerprint"):
        start("other.npz")


def test_a_model_to_start_from_is_read_for_the_first_step_alone(
    digits: Dataset, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(unbroken("adamw"), source)
    config = replace(TINY, initial=str(source))
    train_run(config, digits, RunFolder(tmp_path / "run"), RUNTIME)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(RunFolder(tmp_path / "copy").last_checkpoint())
    shutil.rmtree(source)
    train_run(config, digits, RunFolder(tmp_path / "copy"), RUNTIME)
    assert_same_run(tmp_path / "copy", tmp_path / "run")
