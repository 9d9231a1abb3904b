"""Distances between features against their closed forms; extractors that depend on data and seed alone."""

import json
import math
import sys
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.data.base import Dataset, Samples
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.evaluation.figures import caveats
from fewstep.evaluation.metrics.features import (
    ClassifierExtractor,
    IdentityExtractor,
    InceptionExtractor,
    RandomConvExtractor,
    default_extractor,
    train_extractor,
)
from fewstep.evaluation.metrics.fidelity import class_accuracy, frechet_distance, kernel_distance, precision_recall
from fewstep.evaluation.metrics.measure import Evaluator
from fewstep.utils.errors import DataError, FewstepWarning, MissingExtraError, ShapeError, UnsupportedError

seeds = st.integers(0, 2**31 - 1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(seed: int, count: int, mean: Tensor, root: Tensor) -> Tensor:
    """A sample whose own mean is `mean` and whose own unbiased covariance is root root^T, both exactly."""
    x = normal(seed, count, len(mean))
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (count - 1)), x.T, upper=False)
    placed: Tensor = (root @ white).T + mean
    return placed


def square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def rotation(seed: int, dimension: int) -> Tensor:
    orthogonal: Tensor = torch.linalg.qr(normal(seed, dimension, dimension)).Q
    return orthogonal


def stripes(count: int, seed: int, height: int = 6) -> Samples:
    """Noisy images with a bright row (class 0), column (1) or neither (2)."""
    labels = torch.arange(count) % 3
    images = 0.3 * normal(seed, count, 1, height, 6).float() - 0.5
    images[labels == 0, :, 3, :] += 1.0
    images[labels == 1, :, :, 3] += 1.0
    return Samples(images, labels)


@pytest.fixture(scope="module")
def tiny() -> Dataset:
    return Dataset("tiny stripes", stripes(180, 0), stripes(60, 1), 3, ("row", "column", "none"))


@pytest.fixture(scope="module")
def tiny_extractor(tiny: Dataset) -> ClassifierExtractor:
    return train_extractor(tiny)


# Frechet distance


@settings(max_examples=20, deadline=None)
@given(seed=seeds, dimension=st.integers(1, 6))
def test_frechet_distance_is_the_closed_form_for_exact_moments(seed: int, dimension: int) -> None:
    mean_a, mean_b = normal(seed, dimension), normal(seed + 1, dimension)
    root_a, root_b = normal(seed + 2, dimension, dimension), normal(seed + 3, dimension, dimension)
    a = with_moments(seed + 4, 40, mean_a, root_a)
    b = with_moments(seed + 5, 31, mean_b, root_b)
    cov_a, cov_b = root_a @ root_a.T, root_b @ root_b.T
    cross = square_root(square_root(cov_a) @ cov_b @ square_root(cov_a)).trace()
    expected = float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_frechet_distance_of_commuting_covariances() -> None:
    """Diagonal covariances: |mu|^2 + sum (s_a - s_b)^2."""
    scales_a, scales_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.25, 0.5]).double()
    mean = torch.tensor([1.0, -2.0, 0.0]).double()
    a = with_moments(0, 50, mean, scales_a.diag())
    b = with_moments(1, 20, torch.zeros(3).double(), scales_b.diag())
    assert frechet_distance(a, b) == pytest.approx(5.0 + 4.0 + 1.75**2, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, dimension=st.integers(1, 8), count=st.integers(2, 30))
def test_frechet_distance_is_symmetric_and_ignores_a_common_rotation(seed: int, dimension: int, count: int) -> None:
    a, b = normal(seed, count, dimension), 2.0 * normal(seed + 1, 25, dimension) + 1.0
    turn = rotation(seed + 2, dimension)
    distance = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(distance, abs=1e-10)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(distance, abs=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-10)


def test_frechet_distance_stays_exact_for_singular_covariances() -> None:
    """Two line segments in 10 dimensions at right angles: the traces alone; fewer samples than dimensions."""
    a, b = torch.zeros(4, 10).double(), torch.zeros(4, 10).double()
    a[:, 0] = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    b[:, 1] = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    turn = rotation(0, 10)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(8.0 / 3.0, abs=1e-12)
    assert frechet_distance(a @ turn, a @ turn) == pytest.approx(0.0, abs=1e-12)
    assert frechet_distance(torch.ones(3, 2), torch.zeros(3, 2)) == pytest.approx(2.0, abs=1e-12)


# Kernel distance


def test_kernel_distance_is_the_sum_over_pairs() -> None:
    a, b = normal(0, 5, 3), normal(1, 7, 3) + 0.5

    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    within_a = sum(kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j) / (5 * 4)
    within_b = sum(kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j) / (7 * 6)
    across = sum(kernel(x, y) for x in a for y in b) / 35
    assert kernel_distance(a, b).value == pytest.approx(within_a + within_b - 2 * across, rel=1e-12)


def test_kernel_distance_is_unbiased() -> None:
    values = torch.tensor([kernel_distance(normal(2 * i, 20, 4), normal(2 * i + 1, 30, 4)).value for i in range(400)])
    assert abs(float(values.mean())) < 3.0 * float(values.std()) / math.sqrt(len(values))
    assert 0.4 < float((values < 0).double().mean()) < 0.8


def test_kernel_distance_states_its_error() -> None:
    """At a true difference, the stated standard error is the spread over repeated draws."""
    draws = [kernel_distance(normal(2 * i, 60, 4), normal(2 * i + 1, 80, 4) + 0.5) for i in range(200)]
    values = torch.tensor([draw.value for draw in draws])
    stated = torch.tensor([draw.standard_error for draw in draws]).square().mean().sqrt()
    assert float(values.min()) > 0.0
    assert float(stated) == pytest.approx(float(values.std()), rel=0.25)


def test_kernel_distance_over_disjoint_subsets() -> None:
    a, b = normal(0, 1000, 4), normal(1, 1100, 4) + 0.5
    whole, subsets = kernel_distance(a, b), kernel_distance(a, b, subset_size=100, seed=3)
    assert (subsets.subsets, subsets.subset_size, whole.subset_size) == (10, 100, None)
    assert abs(subsets.value - whole.value) < 4 * subsets.standard_error
    assert subsets == kernel_distance(a, b, subset_size=100, seed=3)
    for size in (1, 501):
        with pytest.raises(ShapeError, match="subset_size"):
            kernel_distance(a, b, subset_size=size)


# Precision and recall


def test_precision_recall_of_identical_and_of_disjoint_sets() -> None:
    real = normal(0, 50, 4)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100.0) == (0.0, 0.0)
    repeated = real[:10].repeat(5, 1)
    assert precision_recall(repeated, repeated) == (1.0, 1.0)


def test_mode_collapse_keeps_precision_and_loses_recall() -> None:
    real = torch.cat([normal(0, 100, 3), normal(1, 100, 3) + 50.0])
    fake = 0.3 * normal(2, 200, 3)
    precision, recall = precision_recall(real, fake)
    assert precision > 0.9
    assert recall < 0.5
    assert precision_recall(fake, real) == (recall, precision)


# Bad inputs


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6])
def test_distances_hold_where_the_spread_is_small_beside_the_mean(spread: float) -> None:
    """Each as on the same features, computed exactly, without rounding."""
    a, b = normal(0, 60, 3), 1.5 * normal(1, 60, 3) + 0.5
    near_a, near_b = 1.0 + spread * a, 1.0 + spread * b
    assert precision_recall(near_a, near_b) == precision_recall(a, b)
    assert frechet_distance(near_a, near_b) == pytest.approx(spread**2 * frechet_distance(a, b), rel=1e-6)
    assert kernel_distance(near_a, near_b).value == pytest.approx(exact_kernel_distance(near_a, near_b), rel=1e-2)


def exact_kernel_distance(a: Tensor, b: Tensor) -> float:
    """In rational numbers."""
    rows_a, rows_b = ([[Fraction(value) for value in row] for row in x.tolist()] for x in (a, b))

    def mean(first: list[list[Fraction]], second: list[list[Fraction]]) -> Fraction:
        kernels = [
            (sum(u * v for u, v in zip(x, y, strict=True)) / len(x) + 1) ** 3
            for x, y in product(first, second)
            if x is not y
        ]
        return sum(kernels, Fraction(0)) / len(kernels)

    return float(mean(rows_a, rows_a) + mean(rows_b, rows_b) - 2 * mean(rows_a, rows_b))


def test_features_that_cannot_be_compared_are_refused() -> None:
    good = normal(0, 10, 3)
    broken = good.clone()
    broken[2, 1] = torch.nan
    for distance in (frechet_distance, kernel_distance, precision_recall):
        for bad in (normal(1, 10, 4), good[:1], good[:, 0], good[:, :0], broken):
            with pytest.raises(ShapeError):
                distance(good, bad)
            with pytest.raises(ShapeError):
                distance(bad, good)
    with pytest.raises(ShapeError, match="at least 1"):
        precision_recall(good, good, k=0)
    with pytest.raises(ShapeError, match="n >= 11"):
        precision_recall(good, good, k=10)


def test_class_accuracy() -> None:
    assert class_accuracy(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 1])) == 0.75
    for predicted, intended in (([], []), ([0], [0, 1]), ([0, 1], [0, -1])):
        with pytest.raises(ShapeError):
            class_accuracy(torch.tensor(predicted).long(), torch.tensor(intended).long())


# Extractors


def test_classifier_learns_and_describes_itself(tiny: Dataset, tiny_extractor: ClassifierExtractor) -> None:
    images, labels = tiny.heldout.fetch(torch.arange(60))
    assert labels is not None
    assert tiny_extractor.heldout_accuracy > 0.9
    assert class_accuracy(tiny_extractor.classify(images), labels) == tiny_extractor.heldout_accuracy
    assert tiny_extractor.name == f"tiny-stripes-classifier-{tiny.fingerprint}-v1-seed0"
    features = tiny_extractor.features(images)
    assert (features.shape, features.dtype) == ((60, 64), torch.float64)


def test_classifier_is_a_function_of_data_and_seed(tiny: Dataset, tiny_extractor: ClassifierExtractor) -> None:
    images, _ = tiny.heldout.fetch(torch.arange(60))
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    with torch.no_grad():
        again = train_extractor(tiny)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.features(images), tiny_extractor.features(images))
    other = train_extractor(tiny, seed=1)
    assert other.name != again.name
    assert not torch.equal(other.features(images), again.features(images))


@pytest.fixture
def trainings(tiny_extractor: ClassifierExtractor, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Trainings asked for, each of which gives the tiny classifier at once."""
    made: list[object] = []

    def train(network: torch.nn.Module, samples: Samples, seed: int) -> None:
        made.append(samples)
        network.eval().load_state_dict(tiny_extractor._network.state_dict())

    monkeypatch.setattr("fewstep.evaluation.metrics.features._train", train)
    return made


def test_classifier_is_saved_loaded_and_replaced_when_corrupt(
    tiny: Dataset,
    tiny_extractor: ClassifierExtractor,
    trainings: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, _ = tiny.heldout.fetch(torch.arange(60))
    cache = tmp_path / "extractors"
    train_extractor(tiny, cache=cache)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    assert file.name == f"{tiny_extractor.name}.safetensors"
    for content in (whole[: len(whole) // 2], b"", b"{}" * 50, whole.replace(b"stripes", b"strokes")):
        file.write_bytes(content)
        with pytest.warns(FewstepWarning, match="training it again"):
            train_extractor(tiny, cache=cache)
        assert file.read_bytes() == whole
    assert len(trainings) == 5
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.evaluation.metrics.features._train", pytest.fail)
        loaded = train_extractor(tiny, cache=cache)
    assert torch.equal(loaded.features(images), tiny_extractor.features(images))
    assert (loaded.name, loaded.heldout_accuracy) == (tiny_extractor.name, tiny_extractor.heldout_accuracy)


@pytest.mark.usefixtures("trainings")
def test_a_cache_that_cannot_be_written_does_not_lose_the_classifier(tiny: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(FewstepWarning, match="could not be saved"):
        assert train_extractor(tiny, cache=tmp_path / "file").heldout_accuracy > 0.9


def test_larger_images_take_strided_convolutions() -> None:
    data = Dataset("tall", stripes(96, 0, height=50), stripes(30, 1, height=50), 3, ("row", "column", "none"))
    extractor = train_extractor(data)
    images, _ = data.heldout.fetch(torch.arange(30))
    assert extractor.features(images).shape == (30, 64)
    assert extractor.heldout_accuracy > 0.6


def test_few_values_without_labels_are_their_own_features(tiny: Dataset) -> None:
    data = Dataset("plain", Samples(tiny.train.values), Samples(tiny.heldout.values))
    extractor = default_extractor(data)
    assert isinstance(extractor, IdentityExtractor)
    assert extractor.name == "values-1x6x6"
    features = extractor.features(data.heldout.values)
    assert (features.dtype, features.shape) == (torch.float64, (60, 36))
    assert torch.equal(features.float().reshape(60, 1, 6, 6), data.heldout.values)
    with pytest.raises(UnsupportedError):
        extractor.classify(data.heldout.values)
    with pytest.raises(ShapeError):
        extractor.features(data.heldout.values[:, :, :5])


def test_data_without_labels_falls_back_on_random_convolutions() -> None:
    train, heldout = stripes(180, 0, height=12), stripes(60, 1, height=12)
    data = Dataset("plain", Samples(train.values), Samples(heldout.values))
    with pytest.raises(DataError, match="InceptionExtractor"):
        train_extractor(data)
    extractor = default_extractor(data)
    assert isinstance(extractor, RandomConvExtractor)
    assert extractor.name.startswith("random-conv-1x12x6")
    with pytest.raises(UnsupportedError):
        extractor.classify(data.heldout.values)
    features = extractor.features(data.heldout.values)
    assert torch.equal(features, RandomConvExtractor((1, 12, 6)).features(data.heldout.values))
    assert not torch.equal(features, RandomConvExtractor((1, 12, 6), seed=1).features(data.heldout.values))
    row, column = data.heldout.values[0::3], data.heldout.values[1::3]
    near = frechet_distance(extractor.features(row[:10]), extractor.features(row[10:]))
    assert near < frechet_distance(extractor.features(row[:10]), extractor.features(column[10:]))


def test_images_that_do_not_fit_are_refused(tiny_extractor: ClassifierExtractor) -> None:
    for bad in (torch.zeros(2, 1, 6, 7), torch.zeros(0, 1, 6, 6), torch.zeros(1, 6, 6), torch.zeros(2, 1, 6, 6).long()):
        with pytest.raises(ShapeError):
            tiny_extractor.features(bad)
        with pytest.raises(ShapeError):
            tiny_extractor.classify(bad)


def test_inception_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no Inception weights"):
        InceptionExtractor(tmp_path / "absent.pth")
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"not a checkpoint")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MissingExtraError, match=r"extra \[eval\]"):
        InceptionExtractor(weights)


# Measurements


def test_measurement_names_all_it_rests_on(tiny: Dataset, tiny_extractor: ClassifierExtractor) -> None:
    evaluator = Evaluator.of(tiny.heldout, "tiny held out", tiny_extractor)
    images, labels = tiny.train.fetch(torch.arange(90))
    row = evaluator.measure(images, labels)
    assert row == json.loads(json.dumps(row, allow_nan=False))
    assert (row["samples"], row["reference"]) == (90, "tiny held out (60)")
    assert row["extractor"] == tiny_extractor.name
    assert row["accuracy"] > 0.9
    noise = evaluator.measure(images * 0, None)
    assert noise["accuracy"] is None
    assert noise["frechet"] > row["frechet"]
    assert noise["kernel"] > row["kernel"]
    assert noise["recall"] < row["recall"]
    random = Evaluator.of(tiny.heldout, "tiny held out", RandomConvExtractor(tiny.image_shape))
    assert random.measure(images, labels)["accuracy"] is None


def test_digits_classifier_is_accurate(classifiers: Path) -> None:
    pytest.importorskip("sklearn")
    digits = load_dataset(DataConfig(source="digits"))
    assert train_extractor(digits, cache=classifiers).heldout_accuracy >= 0.97


def test_classes_that_are_held_out_or_trained_on_alone_are_named() -> None:
    """Two are there of four: the others are not measured, or not trained on."""
    values, names = torch.randn(40, 1, 4, 4), tuple("abcd")
    train, heldout = (Samples(values, torch.tensor(classes * 20)) for classes in ([0, 2], [2, 3]))
    dataset = Dataset("four", train, heldout, 4, names)
    evaluator = Evaluator.of(heldout, "four held out", IdentityExtractor((1, 4, 4)))
    lines = caveats(80, dataset, evaluator)
    assert "Not measured, since no sample is held out: class a, b." in lines
    assert "Measured, but without a sample to train on: class d." in lines
