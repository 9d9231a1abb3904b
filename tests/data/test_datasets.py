"""Data sets: what is measured of them, splits, order, augmentation, bundled and drawn sources."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.data.augment import random_flips
from fewstep.data.base import Dataset, Samples
from fewstep.data.labels import split
from fewstep.data.order import batch_indices
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.utils.errors import ConfigError, DataError, MissingExtraError, ShapeError
from fewstep.utils.random import Draws
from tests.support.sources import bytes_of, load, refused


def test_fetch_brings_bytes_to_minus_one_to_one_and_leaves_floats() -> None:
    values = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(3, 1, 1, 1)
    samples = Samples(values, torch.tensor([2, 0, 1]))
    x, labels = samples.fetch(torch.tensor([1, 0, 2, 1]))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.flatten(), torch.tensor([1.0, -1.0, -0.6, 1.0]))
    assert labels is not None
    assert labels.tolist() == [0, 2, 1, 0]
    floats = torch.randn(3, 1, 2, 2)
    assert torch.equal(Samples(floats).fetch(torch.arange(3))[0], floats)
    assert len(samples) == 3


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (torch.zeros(3, 2, 2), None),
        (torch.zeros(3, 1, 0, 2), None),
        (torch.zeros(3, 1, 2, 2, dtype=torch.float64), None),
        (torch.zeros(3, 1, 2, 2), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(3, 1, 2, 2), torch.zeros(3)),
    ],
)
def test_samples_of_other_shapes_or_types_are_refused(values: torch.Tensor, labels: torch.Tensor | None) -> None:
    with pytest.raises(DataError, match="give"):
        Samples(values, labels)


@pytest.mark.parametrize(
    "images", [bytes_of((50, 3, 9, 7)), np.float32(3e3 + np.random.default_rng(1).random((50, 1, 9, 7)))]
)
def test_moments_equal_those_of_numpy_however_the_values_are_chunked(
    images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.from_numpy(images)
    expected = images.astype(np.float64) / 127.5 - 1 if images.dtype == np.uint8 else images.astype(np.float64)
    prints = set()
    for size in (1, 1000, 1 << 22):
        monkeypatch.setattr("fewstep.data.base._CHUNK_ELEMENTS", size)
        dataset = Dataset("toy", Samples(values), Samples(values[:2]))
        assert dataset.mean == pytest.approx(expected.mean(), rel=1e-12)
        assert dataset.sigma_data == pytest.approx(expected.std(), rel=1e-9)
        prints.add(dataset.fingerprint)
    assert len(prints) == 1


def test_the_fingerprint_follows_contents_and_not_the_name() -> None:
    values, labels = torch.from_numpy(bytes_of((6, 1, 4, 4))), torch.tensor([0, 1, 0, 1, 0, 1])

    def fingerprint(values: torch.Tensor, labels: torch.Tensor, cut: int = 4, name: str = "a", one: str = "1") -> str:
        train, heldout = Samples(values[:cut], labels[:cut]), Samples(values[cut:], labels[cut:])
        return Dataset(name, train, heldout, 2, ("0", one)).fingerprint

    changed = values.clone()
    changed[5, 0, 3, 3] += 1
    base = fingerprint(values, labels)
    assert base == fingerprint(values.clone(), labels.clone(), name="b")
    others = {
        fingerprint(changed, labels),
        fingerprint(values, 1 - labels),
        fingerprint(values, labels, cut=3),
        fingerprint(values, labels, one="one"),
    }
    assert len(others | {base}) == 5


def test_datasets_whose_parts_do_not_fit_are_refused() -> None:
    values, labels = torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    good = Samples(values, labels)
    names = ("a", "b", "c")
    with pytest.raises(DataError, match="at least one of each"):
        Dataset("toy", good, Samples(values[:0], labels[:0]), 3, names)
    with pytest.raises(DataError, match="held-out samples of shape"):
        Dataset("toy", good, Samples(torch.randn(4, 1, 2, 3), labels), 3, names)
    with pytest.raises(DataError, match="class names"):
        Dataset("toy", good, good, 3, ("a",))
    with pytest.raises(DataError, match="labels from 0 to 2: give labels from 0 to 1"):
        Dataset("toy", good, good, 2, ("a", "b"))
    with pytest.raises(DataError, match="no labels for its held-out"):
        Dataset("toy", good, Samples(values), 3, names)
    for bad in (torch.full_like(values, 0.5), torch.full_like(values, float("nan"))):
        with pytest.raises(DataError, match="standard deviation"):
            Dataset("toy", Samples(bad), Samples(values))


@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=80),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_splits_are_disjoint_complete_stratified_and_repeatable(labels: list[int], fraction: float, seed: int) -> None:
    count = len(labels)
    samples = Samples(torch.arange(count, dtype=torch.float32).reshape(-1, 1, 1, 1), torch.tensor(labels))
    train, heldout = split(samples, fraction, seed)
    assert sorted(torch.cat([train.values, heldout.values]).flatten().tolist()) == list(range(count))
    assert len(heldout) == min(max(round(fraction * count), 1), count - 1)
    assert heldout.labels is not None
    for label in set(labels):
        share = labels.count(label) * len(heldout) / count
        assert abs(heldout.labels.tolist().count(label) - share) <= 1
    assert torch.equal(split(samples, fraction, seed)[1].values, heldout.values)


def test_digits_are_in_range_split_evenly_and_repeatably() -> None:
    digits = load("digits")
    assert (digits.name, digits.shape, digits.num_classes) == ("digits", (1, 8, 8), 10)
    assert (len(digits.train), len(digits.heldout)) == (1204, 593)
    assert float(digits.train.values.min()) == -1.0
    assert float(digits.train.values.max()) == 1.0
    assert digits.train.labels is not None
    assert digits.heldout.labels is not None
    shares = torch.bincount(digits.train.labels) / torch.bincount(digits.heldout.labels)
    assert torch.allclose(shares, torch.full((10,), 1204 / 593), rtol=0.05)
    rows = {tuple(row) for row in digits.train.values.flatten(1).tolist()}
    assert not rows & {tuple(row) for row in digits.heldout.values.flatten(1).tolist()}
    assert digits.fingerprint == load("digits").fingerprint
    assert digits.fingerprint != load("digits", seed=1).fingerprint


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install scikit-learn \(the extra \[digits\]\)"):
        load("digits")


def test_digits_in_colour_are_the_grey_thrice() -> None:
    colour, grey = load("digits", channels=3), load("digits")
    assert colour.shape == (3, 8, 8)
    assert torch.equal(colour.train.values, grey.train.values.expand(-1, 3, -1, -1))


def test_random_latents_are_standard_normal_and_repeatable() -> None:
    settings: dict[str, object] = {"random_shape": (2, 8, 8), "random_classes": 5, "random_count": 600}
    dataset = load("random", **settings)
    assert (dataset.shape, dataset.num_classes, len(dataset.train) + len(dataset.heldout)) == ((2, 8, 8), 5, 600)
    assert abs(dataset.mean) < 0.02
    assert abs(dataset.sigma_data - 1) < 0.02
    assert dataset.train.labels is not None
    assert set(dataset.train.labels.tolist()) == set(range(5))
    assert dataset.fingerprint == load("random", **settings).fingerprint
    assert dataset.fingerprint != load("random", **settings, seed=1).fingerprint
    assert load("random", **settings | {"random_classes": 0}).num_classes == 0
    with pytest.raises(DataError, match="'random' has 2 channels"):
        load("random", **settings, channels=3)


def test_sizes_are_asked_for_only_where_images_are_resized() -> None:
    assert load("digits", image_size=8).shape == (1, 8, 8)
    refused("digits", "", "'digits'", "8x8", "image_size", image_size=16)


@pytest.mark.parametrize(
    "settings",
    [
        {"heldout": 0.0},
        {"heldout": 1.0},
        {"heldout": float("nan")},
        {"image_size": -1},
        {"channels": 2},
        {"random_shape": (0, 8, 8)},
        {"random_classes": -1},
        {"random_count": 1},
    ],
)
def test_configurations_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="give"):
        load_dataset(DataConfig(**settings))


def test_an_unknown_source_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"must be one of digits, .*got mnist"):
        load_dataset(DataConfig(source="mnist"))


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(1, 30),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 100),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=6),
)
def test_any_split_into_batches_reads_one_sequence_of_permutations(
    count: int, seed: int, start: int, sizes: list[int]
) -> None:
    first_epoch = start // count
    end = start + sum(sizes)
    epochs = [
        batch_indices(count, seed, epoch * count, count).tolist() for epoch in range(first_epoch, end // count + 1)
    ]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    sequence = [index for epoch in epochs for index in epoch][start - first_epoch * count :]
    position, read = start, []
    for size in sizes:
        batch = batch_indices(count, seed, position, size)
        assert batch.shape == (size,)
        read += batch.tolist()
        position += size
    assert read == sequence[: sum(sizes)]


def test_orders_differ_by_epoch_and_seed_and_cannot_be_spoilt() -> None:
    first = batch_indices(100, 0, 0, 100)
    assert not torch.equal(first, batch_indices(100, 0, 100, 100))
    assert not torch.equal(first, batch_indices(100, 1, 0, 100))
    kept = first.clone()
    first.zero_()
    assert torch.equal(batch_indices(100, 0, 0, 100), kept)


@pytest.mark.parametrize(("count", "start", "size"), [(0, 0, 1), (5, -1, 1), (5, 0, 0)])
def test_batches_that_do_not_exist_are_refused(count: int, start: int, size: int) -> None:
    with pytest.raises(ShapeError, match="give at least one sample"):
        batch_indices(count, 0, start, size)


def test_flips_mirror_about_half_of_the_samples_whatever_the_batch() -> None:
    flips = random_flips(Draws(0, 7, torch.arange(400)), 3)
    assert 160 < int(flips.sum()) < 240
    parts = [random_flips(Draws(0, 7, part), 3) for part in torch.arange(400).split(150)]
    assert torch.equal(torch.cat(parts), flips)


def test_samples_are_fetched_as_mirror_images_where_asked() -> None:
    samples = Samples(torch.randint(0, 256, (40, 2, 3, 4), dtype=torch.uint8), torch.arange(40))
    rows, mirror = torch.tensor([7, 0, 7, 31]), torch.tensor([True, False, False, True])
    plain, labels = samples.fetch(rows)
    mirrored, same_labels = samples.fetch(rows, mirror)
    assert torch.equal(mirrored[mirror], plain[mirror].flip(-1))
    assert torch.equal(mirrored[~mirror], plain[~mirror])
    assert torch.equal(labels, same_labels)
