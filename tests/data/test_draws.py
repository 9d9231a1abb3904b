"""What stands for a set: evenly drawn samples, and classes in its shares whatever the number of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.data.base import Samples
from fewstep.data.draws import classes_like, even_draw

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=12)


def labels_of(counts: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


@given(counts=sizes, count=st.integers(1, 200), seed=st.integers(0, 5))
def test_every_prefix_has_the_shares(counts: list[int], count: int, seed: int) -> None:
    drawn = classes_like(labels_of(counts), count, seed)
    shares = torch.tensor(counts).double() / sum(counts)
    so_far = torch.nn.functional.one_hot(drawn, len(counts)).cumsum(0)
    expected = shares * torch.arange(1, count + 1)[:, None]
    assert drawn.dtype == torch.int64
    assert float((so_far - expected).abs().max()) < 2.5


@given(classes=st.integers(1, 12), each=st.integers(1, 30), more=st.integers(0, 11), count=st.integers(1, 300))
def test_equal_classes_come_in_turn(classes: int, each: int, more: int, count: int) -> None:
    """As `generate` gives them: sample k is of class k mod C, where there are no fewer samples than classes."""
    labels = labels_of([each + (c < more) for c in range(classes)])
    if count >= classes:
        assert torch.equal(classes_like(labels, count, 0), torch.arange(count) % classes)


def test_nearly_equal_classes_come_nearly_in_turn() -> None:
    labels = labels_of([58, 60, 59, 60, 60, 60, 60, 59, 57, 60])  # held-out digits
    assert float((classes_like(labels, 2000, 0) == torch.arange(2000) % 10).double().mean()) > 0.98


def test_few_samples_of_many_classes_are_of_any_of_them() -> None:
    labels = labels_of([10] * 1000)
    drawn = classes_like(labels, 20, 0)
    assert len(drawn.unique()) == 20
    assert int(drawn.max()) > 500
    assert torch.equal(drawn, classes_like(labels, 20, 0))
    assert not torch.equal(drawn, classes_like(labels, 20, 1))
    common = classes_like(labels_of([10] * 999 + [9990]), 20, 0)
    assert int((common == 999).sum()) in (9, 10)


def test_a_class_without_samples_is_never_drawn() -> None:
    assert set(classes_like(torch.tensor([0, 0, 3, 3, 7]), 50, 0).tolist()) == {0, 3, 7}


@given(counts=sizes, count=st.integers(1, 400), labelled=st.booleans())
def test_an_even_draw_has_the_shares_of_a_sorted_set(counts: list[int], count: int, labelled: bool) -> None:
    labels = labels_of(counts)
    samples = Samples(labels.float().reshape(-1, 1, 1, 1), labels if labelled else None)
    drawn = even_draw(samples, count, 0)
    assert len(drawn) == min(count, len(samples))
    assert torch.equal(drawn, drawn.unique())
    if labelled:
        found = torch.bincount(labels[drawn], minlength=len(counts))
        expected = torch.tensor(counts).double() * len(drawn) / len(samples)
        assert float((found - expected).abs().max()) < 1.001


@pytest.mark.parametrize("labelled", [True, False])
def test_an_even_draw_depends_on_its_seed_alone(labelled: bool) -> None:
    labels = labels_of([400] * 10)
    samples = Samples(labels.float().reshape(-1, 1, 1, 1), labels if labelled else None)
    first, again, other = (even_draw(samples, 500, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(labels[first].double().mean()) == pytest.approx(4.5, abs=0.4)


@given(counts=sizes, like=sizes, count=st.integers(1, 400))
def test_an_even_draw_can_have_the_shares_of_another_set(counts: list[int], like: list[int], count: int) -> None:
    labels, others = labels_of(counts), labels_of(like)
    samples = Samples(labels.float().reshape(-1, 1, 1, 1), labels)
    drawn = even_draw(samples, count, 0, others)
    common = min(len(counts), len(like))
    found = torch.bincount(labels[drawn], minlength=len(counts))
    assert torch.equal(drawn, drawn.unique())
    assert int(found[common:].sum()) == 0
    expected = torch.tensor(like[:common]).double() * len(drawn) / sum(like[:common])
    assert float((found[:common] - expected).abs().max()) < 2 + common
    assert torch.equal(even_draw(samples, count, 0, labels.repeat(3)), even_draw(samples, count, 0))
