"""Averages of weights: EDM2's power function has the width it is named by, the constant decay its formula."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fewstep.data.base import Dataset
from fewstep.training import RunFolder, train_run
from fewstep.training.ema import EMA, HostEMA, make_emas, power_exponent
from fewstep.utils.errors import ConfigError
from tests.support.tiny import RUNTIME, TINY, assert_same_run


class Scalar(nn.Module):
    """One parameter and one integer buffer."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))

    def set(self, value: float, count: int = 0) -> "Scalar":
        with torch.no_grad():
            self.weight.fill_(value)
        self.count.fill_(count)
        return self


@given(width=st.floats(0.005, 0.28))
def test_the_exponent_solves_its_equation(width: float) -> None:
    gamma = power_exponent(width)
    assert gamma > 0
    assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(width, rel=1e-9)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.29, float("nan")])
def test_widths_out_of_range_are_refused(width: float) -> None:
    with pytest.raises(ConfigError, match="relative width"):
        power_exponent(width)


@pytest.mark.parametrize("width", [0.02, 0.1, 0.25])
def test_the_profile_has_its_relative_width(width: float) -> None:
    """The weight that step k keeps in the average after n steps has standard deviation width n."""
    n, ema = 4000, EMA("", Scalar(), None, power_exponent(width))
    betas = torch.tensor([ema.beta(k) for k in range(1, n + 1)], dtype=torch.float64)
    later = torch.cat([betas.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
    profile, steps = (1 - betas) * later, torch.arange(1, n + 1, dtype=torch.float64)
    assert float(profile.sum()) == pytest.approx(1, abs=1e-12)
    mean = (profile * steps).sum()
    deviation = (profile * (steps - mean) ** 2).sum().sqrt()
    assert float(deviation) / n == pytest.approx(width, rel=0.01)


def test_updates_follow_the_profile() -> None:
    module = Scalar(5.0)
    ema, average = EMA("", module, None, power_exponent(0.1)), 5.0
    for step in range(1, 30):
        ema.update(module.set(step**0.5, step), step)
        average += (1 - ema.beta(step)) * (step**0.5 - average)
        assert float(ema.weights["weight"]) == pytest.approx(average, rel=1e-12)
        assert int(ema.weights["count"]) == step
    assert ema.beta(1) == 0


@given(decay=st.floats(0, 0.999), values=st.lists(st.floats(-10, 10), min_size=1, max_size=20))
def test_a_constant_average_forgets_at_its_decay(decay: float, values: list[float]) -> None:
    module = Scalar(2.0)
    ema, average = EMA("", module, decay, None), 2.0
    for step, value in enumerate(values, start=1):
        beta = min(decay, (1 + step) / (10 + step))
        average = beta * average + (1 - beta) * value
        ema.update(module.set(value), step)
    assert float(ema.weights["weight"]) == pytest.approx(average, rel=1e-9, abs=1e-9)
    assert float(module.weight.detach()) == values[-1]


def test_a_buffer_that_is_put_in_anew_is_averaged() -> None:
    module = Scalar()
    module.register_buffer("mean", torch.zeros(1))
    ema = EMA("half", module, 0.5, None, ramp=False)
    for step in (1, 2):
        module.mean = module.mean + 1.0
        ema.update(module, step)
    assert ema.weights["mean"].item() == 0.5 * 0.5 + 0.5 * 2


def test_the_average_is_a_copy_and_loads_back() -> None:
    module = Scalar(1.0)
    ema = EMA("", module, 0.9, None)
    module.set(3.0)
    assert float(ema.weights["weight"]) == 1
    ema.update(module, 1)
    stored = {key: value.clone() for key, value in ema.weights.items()}
    other = EMA("", Scalar(-7.0), 0.9, None)
    other.load(stored, "here")
    ema.update(module.set(4.0, 2), 2)
    other.update(module, 2)
    assert float(other.weights["weight"]) == float(ema.weights["weight"]) != float(stored["weight"])


def test_a_recipe_names_its_averages_and_needs_one() -> None:
    emas = make_emas(Scalar(), (0.05, 0.1), (0.99,))
    assert [ema.name for ema in emas] == ["power-0.05", "power-0.1", "constant-0.99"]
    assert [ema.beta(10**6) < 0.999 for ema in emas] == [False, False, True]
    with pytest.raises(ConfigError, match="at least one"):
        make_emas(Scalar(), (), ())
    for decay in (1.0, -0.1):
        with pytest.raises(ConfigError, match="decay"):
            make_emas(Scalar(), (), (decay,))


def test_averages_on_the_host_are_the_same_to_the_bit_and_updated_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update returns while its thread still waits; whoever reads waits for it. Frozen weights are not copied."""
    free, lerp, threads = threading.Event(), torch._foreach_lerp_, set[str]()

    def slow(*args: Any) -> None:
        threads.add(threading.current_thread().name)
        assert free.wait(10)
        lerp(*args)

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    module[2].weight.requires_grad_(False)
    own, other = EMA("", module, 0.9, None), HostEMA("", module, 0.9, None)
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        module[1].num_batches_tracked.add_(1)
        own.update(module, step)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "_foreach_lerp_", slow)
            free.clear()
            other.before_step()
            other.update(module, step)
            assert other._folding is not None
            assert not other._folding.done()
            free.set()
            found = other.weights
        assert other._folding is None
        assert all(torch.equal(found[key], value) for key, value in own.weights.items())
    assert {name.rpartition("_")[0] for name in threads} == {"fewstep-average"}
    assert other.weights["2.weight"].data_ptr() == module[2].weight.data_ptr()


def test_a_run_with_averages_on_the_cpu_is_the_same_run(digits: Dataset, tmp_path: Path) -> None:
    for on_cpu in (False, True):
        train_run(TINY, digits, RunFolder(tmp_path / str(on_cpu)), replace(RUNTIME, averages_on_cpu=on_cpu))
    assert_same_run(tmp_path / "False", tmp_path / "True")
    train_run(TINY, digits, RunFolder(tmp_path / "True"), replace(RUNTIME, averages_on_cpu=True, from_step=9))
    assert_same_run(tmp_path / "False", tmp_path / "True")


def test_averages_are_shared_out_or_on_the_cpu() -> None:
    with pytest.raises(ConfigError, match=r"leave out --runtime\.averages-on-cpu"):
        replace(RUNTIME, shard=True, averages_on_cpu=True)
