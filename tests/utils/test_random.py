"""Random numbers: distributions, independence, and the same numbers however the samples are split."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep.utils.random import Draws, permutation, seeded

COUNT = 20_000
F64 = torch.float64


def draws(seed: int = 0, step: int = 0, start: int = 0, count: int = COUNT) -> Draws:
    return Draws(seed, step, torch.arange(start, start + count))


def check_uniform(values: Tensor) -> None:
    """Moments within 5 standard errors, and Kolmogorov's distance under its 0.01% point, 2.23/sqrt(n)."""
    flat = values.flatten().sort().values
    n = len(flat)
    assert 0 < float(flat[0]) <= float(flat[-1]) < 1
    assert abs(float(flat.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(float(flat.square().mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / n)
    grid = torch.arange(n, dtype=F64)
    distance = torch.maximum((flat - grid / n).abs(), ((grid + 1) / n - flat).abs()).max()
    assert float(distance) < 2.23 / math.sqrt(n)


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**64 - 1, 10**30])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_uniform_draws_are_uniform(seed: int, shape: tuple[int, ...]) -> None:
    values = draws(seed).uniform(5, shape)
    assert values.shape == (COUNT, *shape)
    assert values.dtype == F64
    check_uniform(values)
    check_uniform(values[:500])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_draws_never_reach_their_ends(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even for the extreme patterns of bits: a quantile function is infinite at 0 and 1."""
    bits = torch.tensor([[0], [-1], [-2], [-(2**11)], [-(2**33)]])
    monkeypatch.setattr(Draws, "_bits", lambda *_: bits)
    values = draws(count=5).uniform(0, dtype=dtype)
    assert values.dtype == dtype
    assert bool(((values > 0) & (values < 1)).all())


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3)])
def test_normal_draws_are_normal(shape: tuple[int, ...]) -> None:
    values = draws(3).normal(2, shape, F64)
    assert values.shape == (COUNT, *shape)
    check_uniform(torch.special.ndtr(values))
    n = values.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((values**power).mean()) - moment) < 5 * math.sqrt(variance / n)


def test_the_two_halves_of_box_muller_are_independent() -> None:
    a, b = draws().normal(0, (2,), F64).unbind(1)
    assert abs(correlation(a, b)) < 5 / math.sqrt(COUNT)
    assert abs(correlation(a.square(), b.square())) < 5 / math.sqrt(COUNT)


NEIGHBOURS = [
    ("seed", draws(8), draws(9), 1, 1),
    ("step", draws(8, 4), draws(8, 5), 1, 1),
    ("stream", draws(8, 4), draws(8, 4), 1, 2),
    ("index", draws(8, 4), draws(8, 4, start=2), 1, 1),
    ("seed and step swapped", draws(4, 8), draws(8, 4), 1, 1),
    ("step and stream swapped", draws(8, 1), draws(8, 2), 2, 1),
    ("far seeds", draws(0), draws(2**32), 1, 1),
]


@pytest.mark.parametrize(("one", "other", "stream", "other_stream"), [row[1:] for row in NEIGHBOURS])
@pytest.mark.parametrize("lag", [0, 1])
def test_neighbours_are_uncorrelated(one: Draws, other: Draws, stream: int, other_stream: int, lag: int) -> None:
    a, b = one.uniform(stream, (3,)), other.uniform(other_stream, (3,)).roll(lag, 0)
    assert not bool((a == b).any())
    assert abs(correlation(a, b)) < 5 / math.sqrt(a.numel())
    assert abs(correlation((a - 0.5).abs(), (b - 0.5).abs())) < 5 / math.sqrt(a.numel())


def test_the_numbers_of_one_sample_are_uncorrelated() -> None:
    values = draws().uniform(0, (4,))
    for i in range(4):
        for j in range(i):
            assert abs(correlation(values[:, i], values[:, j])) < 5 / math.sqrt(COUNT)


@given(
    seed=st.integers(-(2**70), 2**70),
    step=st.integers(0, 2**40),
    stream=st.integers(0, 2000),
    order=st.permutations(range(9)),
    cut=st.integers(0, 9),
)
def test_numbers_belong_to_an_index(seed: int, step: int, stream: int, order: list[int], cut: int) -> None:
    indices = torch.tensor([0, 1, 2, 5, 100, 10**6, 2**40, 2**62, 2**63 - 1])
    whole = Draws(seed, step, indices)
    for part in (torch.tensor(order[:cut], dtype=torch.int64), torch.tensor(order[cut:], dtype=torch.int64)):
        own = Draws(seed, step, indices[part])
        assert torch.equal(own.uniform(stream, (3,)), whole.uniform(stream, (3,))[part])
        assert torch.equal(own.normal(stream, (3,)), whole.normal(stream, (3,))[part])
        assert torch.equal(own.integers(stream, 7), whole.integers(stream, 7)[part])


def finalised(z: int) -> int:
    """SplitMix64's finaliser of a whole number of 64 bits."""
    word = 2**64 - 1
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & word
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
    return z ^ (z >> 31)


@given(
    seed=st.integers(-(2**70), 2**70), step=st.integers(0, 2**40), stream=st.integers(0, 2000),
    index=st.integers(0, 2**63 - 1), element=st.integers(0, 5),
)  # fmt: skip
def test_numbers_are_those_of_split_mix(seed: int, step: int, stream: int, index: int, element: int) -> None:
    key = 0
    for part in (seed, step, stream, index, element):
        key = finalised((key + (part + 1) * 0x9E3779B97F4A7C15) % 2**64)
    found = Draws(seed, step, torch.tensor([index])).uniform(stream, (6,))[0, element]
    assert float(found) == min(((key >> 11) + 0.5) * 2.0**-53, 1 - 2.0**-53)


def test_distinct_indices_give_distinct_numbers() -> None:
    assert len(draws(count=100_000).uniform(0).unique()) == 100_000


@given(high=st.integers(1, 12), seed=st.integers(0, 1000))
def test_integers_are_uniform(high: int, seed: int) -> None:
    counts = torch.bincount(draws(seed, count=6000).integers(1, high), minlength=high)
    assert len(counts) == high
    expected = 6000 / high
    assert bool(((counts - expected).abs() < 5 * math.sqrt(expected) + 1e-9).all())


@given(seed=st.integers(-(2**65), 2**65), epoch=st.integers(0, 1000), count=st.integers(0, 500))
def test_a_permutation_holds_every_item_once(seed: int, epoch: int, count: int) -> None:
    order = permutation(seed, epoch, count)
    assert torch.equal(order.sort().values, torch.arange(count))
    assert torch.equal(order, permutation(seed, epoch, count))
    if count > 20:
        assert not torch.equal(order, permutation(seed, epoch + 1, count))
        assert not torch.equal(order, permutation(seed + 1, epoch, count))


def test_permutations_favour_no_place() -> None:
    first = torch.stack([permutation(0, epoch, 5) for epoch in range(2000)])
    for place in range(5):
        counts = torch.bincount(first[:, place], minlength=5)
        assert bool(((counts - 400).abs() < 5 * math.sqrt(400 * 0.8)).all())


@pytest.mark.filterwarnings("error")
def test_seeded_numbers_are_those_of_the_seed_and_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a warning where there are several GPUs."""
    expected = torch.randn(3, generator=torch.Generator().manual_seed(5))
    before = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with seeded(5):
        assert torch.equal(torch.randn(3), expected)
    assert torch.equal(torch.get_rng_state(), before)
