"""Statistics of a teacher: estimated once, found again, resumed exactly, each sample under its own label."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewstep
from fewstep.data.base import Dataset, Samples
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import EDM
from fewstep.flow.preconditioning.estimation import Moments, StatisticsEstimator
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.networks.base import Network
from fewstep.networks.condition import Condition
from fewstep.recipes.config import StatisticsConfig
from fewstep.training import statistics
from fewstep.training.parallel import ProcessGroup
from fewstep.training.statistics import (
    ConditionedDenoiser,
    cache_file,
    estimate_together,
    kept_statistics,
    make_estimator,
    prepared,
)
from fewstep.utils.errors import CheckpointError
from tests.support.tiny import Killed, interrupt_after

SETTINGS = StatisticsConfig(points=4, samples=160)
"""Three portions: 64, 64 and 32 samples."""


@pytest.fixture(scope="session")
def model(teacher: Path) -> FlowMap:
    return fewstep.load(teacher).flow_map.requires_grad_(False)


@pytest.fixture(scope="session")
def expected(model: FlowMap, digits: Dataset) -> TrajectoryStatistics:
    return estimate_together(model, digits, SETTINGS, ProcessGroup())


def no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StatisticsEstimator, "update", lambda *args: pytest.fail("estimated again"))


def test_what_is_kept_is_read_and_not_estimated_again(
    model: FlowMap, digits: Dataset, expected: TrajectoryStatistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kept_statistics(tmp_path, model, digits, SETTINGS)
    assert found == expected
    assert [path.name for path in tmp_path.rglob("*.*")] == [cache_file(tmp_path, model, digits, SETTINGS).name]
    no_estimate(monkeypatch)
    again = kept_statistics(tmp_path, model, digits, SETTINGS)
    assert again == expected
    assert again.seconds == found.seconds > 0


def test_the_key_stands_for_the_model_the_data_and_the_settings(model: FlowMap, digits: Dataset) -> None:
    keys = [cache_file(Path(), model, digits, SETTINGS)]
    changes: list[dict[str, Any]] = [{"points": 5}, {"samples": 161}, {"probes": 0}, {"centred": False}, {"seed": 1}]
    keys += [cache_file(Path(), model, digits, replace(SETTINGS, **change)) for change in changes]
    keys.append(cache_file(Path(), model, load_dataset(DataConfig(seed=1)), SETTINGS))
    for key in ("output.bias", "embedding.labels.weight"):
        weights = model.network.state_dict()[key]
        weights.view(-1)[0] += 1e-6
        keys.append(cache_file(Path(), model, digits, SETTINGS))
        weights.view(-1)[0] -= 1e-6
    elsewhere = FlowMap(EDM(0.01, 50.0), model.preconditioning, model.network, model.scaling, model.config)
    keys.append(cache_file(Path(), elsewhere, digits, SETTINGS))
    assert len(set(keys)) == len(keys)


def test_what_is_made_of_an_estimate_does_not_change_its_key(
    model: FlowMap, digits: Dataset, expected: TrajectoryStatistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One estimate serves every ablation, each as if estimated for it."""
    kept_statistics(tmp_path, model, digits, replace(SETTINGS, use="l", shrink=False))
    no_estimate(monkeypatch)
    assert kept_statistics(tmp_path, model, digits, SETTINGS) == expected
    assert kept_statistics(tmp_path, model, digits, replace(SETTINGS, use="l")) == expected.without("s")
    assert kept_statistics(tmp_path, model, digits, replace(SETTINGS, use="s")) == expected.without("l")
    assert kept_statistics(tmp_path, model, digits, replace(SETTINGS, refresh_images=9)) == expected


def test_data_with_classes_are_never_shrunk(digits: Dataset, expected: TrajectoryStatistics) -> None:
    bare = Dataset("bare", Samples(digits.train.values), Samples(digits.heldout.values))
    assert prepared(expected, SETTINGS, digits) == expected
    assert prepared(expected, SETTINGS, bare) == expected.shrunk() != expected
    assert prepared(expected, replace(SETTINGS, shrink=False), bare) == expected


@pytest.fixture
def interrupted(
    model: FlowMap, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[str]]:
    """A folder whose estimate was stopped after two of three portions, and the log of the portions fed from then on."""
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "_SAVE_SECONDS", -1.0)
        interrupt_after(patch, StatisticsEstimator, "update", 2)
        with pytest.raises(Killed):
            kept_statistics(tmp_path, model, digits, SETTINGS)
    (partial,) = tmp_path.rglob("*.partial.safetensors")
    assert int(load_file(partial)["sums"][0, :, 0].sum()) == 128
    fed: list[str] = []
    update = StatisticsEstimator.update

    def counted(self: StatisticsEstimator, first: int, count: int) -> None:
        fed.append(f"{first}+{count}")
        update(self, first, count)

    monkeypatch.setattr(StatisticsEstimator, "update", counted)
    return partial, fed


def test_an_interrupted_estimate_goes_on_exactly(
    model: FlowMap, digits: Dataset, expected: TrajectoryStatistics, interrupted: tuple[Path, list[str]]
) -> None:
    partial, fed = interrupted
    state = load_file(partial)
    save_file(state | {"seconds": torch.tensor(1000.0, dtype=torch.float64)}, partial)
    found = kept_statistics(partial.parents[1], model, digits, SETTINGS)
    assert fed == ["128+32"]
    assert found == expected
    assert 1000 < found.seconds < 1100
    assert not partial.exists()


@pytest.mark.parametrize("damage", ["truncated", "of other settings", "without its seconds", "text"])
def test_a_damaged_partial_estimate_is_not_used(
    damage: str,
    model: FlowMap,
    digits: Dataset,
    expected: TrajectoryStatistics,
    interrupted: tuple[Path, list[str]],
) -> None:
    partial, fed = interrupted
    state = load_file(partial)
    match damage:
        case "truncated":
            partial.write_bytes(partial.read_bytes()[:-10])
        case "of other settings":
            save_file(state | {"sums": state["sums"][1:].clone()}, partial)
        case "without its seconds":
            save_file({"sums": state["sums"]}, partial)
        case _:
            partial.write_text("sums")
    assert kept_statistics(partial.parents[1], model, digits, SETTINGS) == expected
    assert fed == ["0+64", "64+64", "128+32"]
    assert not partial.exists()


@pytest.mark.parametrize("damage", ["truncated", "a key too many", "of other lengths"])
def test_damaged_statistics_are_refused_in_one_line(
    damage: str, model: FlowMap, digits: Dataset, expected: TrajectoryStatistics, tmp_path: Path
) -> None:
    file = cache_file(tmp_path, model, digits, SETTINGS)
    expected.save(file)
    text = file.read_text()
    stored = json.loads(text)
    if damage == "truncated":
        file.write_text(text[:100])
    elif damage == "a key too many":
        file.write_text(json.dumps(stored | {"colour": 1}))
    else:
        file.write_text(json.dumps(stored | {"l": {"dtype": "float64", "shape": [1], "values": [0.5]}}))
    before = file.read_bytes()
    with pytest.raises(
        CheckpointError, match=r"statistics/\w{16}\.json is damaged .*delete it to estimate anew"
    ) as caught:
        kept_statistics(tmp_path, model, digits, SETTINGS)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == before


@pytest.mark.parametrize("index", [0, 1])
def test_two_shares_are_one_estimate(
    index: int, model: FlowMap, digits: Dataset, expected: TrajectoryStatistics, tmp_path: Path
) -> None:
    """Each process estimates from half of the portions; the sums of the other one are added to its own."""
    shares: list[Tensor] = []

    def share(value: Tensor) -> Tensor:
        shares.append(value.clone())
        return value

    estimate_together(model, digits, SETTINGS, ProcessGroup(1 - index, 2, share))
    assert int(shares[0][0, :, 0].sum()) == (64 if index == 0 else 96)
    group = ProcessGroup(index, 2, lambda value: value + (shares[0] if value.ndim else 0))
    found = kept_statistics(tmp_path, model, digits, SETTINGS, group=group)
    assert found.samples == expected.samples == 160
    for name in ("l", "s", "l_stderr", "s_stderr", "s_bias", "s_without_l", "mean"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
    assert cache_file(tmp_path, model, digits, SETTINGS).exists() == (index == 0)
    if index == 0:  # the other has no such file: both estimate anew; where both have it, neither does
        assert kept_statistics(tmp_path, model, digits, SETTINGS, group=group).seconds != found.seconds
        both = ProcessGroup(0, 2, lambda value: 2 * value)
        assert kept_statistics(tmp_path, model, digits, SETTINGS, group=both).samples == 160


class MeanOfClass(Network):
    """F = the mean of the label's class."""

    def __init__(self, means: Tensor) -> None:
        super().__init__(tuple(means.shape[1:]), len(means), guided=False)
        self.means = torch.nn.Parameter(means)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        assert cond is not None
        assert cond.labels is not None
        return self.means[cond.labels] + 0 * x


def classes() -> tuple[Dataset, FlowMap]:
    """101 samples, each exactly the mean of its class, and their exact denoiser, which needs the label at high noise.

    The means differ by no more than a tenth, so that a neighbour's label is nearly right; five epochs and an uneven
    count shift labels against samples in every way.
    """
    labels = torch.arange(101) % 5
    means = torch.linspace(0.9, 1.0, 5)[:, None, None, None] * torch.ones(5, 1, 2, 2)
    samples = Samples(means[labels], labels)
    path = EDM()
    dataset = Dataset("classes", samples, samples, 5, tuple("abcde"))
    return dataset, FlowMap(path, EulerPreconditioning(path), MeanOfClass(means))


def test_a_labelled_teacher_sees_each_samples_own_label() -> None:
    """D = x0 for every sample, so that <x0 - m, D - m> = |D - m|^2: by Cauchy and Schwarz for no other labels."""
    dataset, model = classes()
    estimator = make_estimator(model, dataset, StatisticsConfig(points=4, samples=500))
    for first in range(0, 500, 64):
        estimator.update(first, min(64, 500 - first))
    moments = Moments(*estimator.sums.sum(1).unbind(-1))
    spread = float(dataset.train.values.double().var(0, correction=0).mean()) * 500
    low = torch.exp(-estimator.lam) < 1e-2
    assert int(low.sum()) >= 1
    assert torch.allclose(moments.dd, torch.full_like(moments.dd, spread), rtol=2e-2)
    assert torch.allclose(moments.kd[low], moments.dd[low], rtol=1e-6)


def test_every_sample_is_fetched_once_an_epoch() -> None:
    dataset, model = classes()
    denoiser = ConditionedDenoiser(model, dataset, seed=3)
    orders = []
    for epoch in range(2):
        x0 = denoiser.fetch(torch.arange(epoch * 101, (epoch + 1) * 101))
        labels = denoiser.cond.labels
        assert labels is not None
        assert torch.equal(x0, denoiser(x0, torch.ones(101, dtype=torch.float64)))
        assert torch.equal(labels.bincount(), torch.tensor([21, 20, 20, 20, 20]))
        orders.append(labels)
    assert not torch.equal(orders[0], orders[1])
    across = denoiser.fetch(torch.arange(60, 140))
    assert torch.equal(denoiser.cond.labels, torch.cat(orders)[60:140])  # type: ignore[arg-type]
    assert len(across) == 80


def test_a_folder_that_cannot_be_written(model: FlowMap, digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "statistics").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write .*statistics"):
        kept_statistics(tmp_path, model, digits, SETTINGS)
