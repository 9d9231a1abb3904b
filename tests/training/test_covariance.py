"""The data's covariance against a whole matrix, also of classes with few samples; and what has none."""

import pytest
import torch
from torch import Tensor

from fewstep.data.base import Dataset, Samples
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.flow.preconditioning.covariance import (
    Basis,
    ByClass,
    CosineVariances,
    CovarianceSettings,
    PrincipalComponents,
    to_cosines,
)
from fewstep.training import covariance
from fewstep.training.covariance import measure
from fewstep.utils.errors import ConfigError
from tests.support.cases import close


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DataConfig("digits"))


@pytest.fixture(scope="module")
def centred(digits: Dataset) -> Tensor:
    """All training samples about their mean, (N, 64) float64."""
    x = digits.train.fetch(torch.arange(len(digits.train)))[0].double().flatten(1)
    return x - x.mean(0)


def test_components_are_those_of_the_data(digits: Dataset, centred: Tensor) -> None:
    found = measure(digits, CovarianceSettings())
    assert isinstance(found, PrincipalComponents)
    matrix = centred.T @ centred / len(centred)
    close(found.vectors @ found.variances.diag() @ found.vectors.T, matrix, atol=1e-8)
    assert bool((found.variances.diff() <= 0).all())


def test_left_out_components_share_what_variance_they_have(digits: Dataset, centred: Tensor) -> None:
    whole, few = (measure(digits, CovarianceSettings(components=count)) for count in (0, 10))
    assert isinstance(whole, PrincipalComponents)
    assert isinstance(few, PrincipalComponents)
    assert few.vectors.shape == (64, 10)
    assert few.rest == pytest.approx(float(whole.variances[10:].mean()))
    total = float(few.variances.sum()) + 54 * few.rest
    assert total == pytest.approx(float(centred.square().sum(1).mean()))


def test_cosines_have_the_data_s_variance(digits: Dataset, centred: Tensor) -> None:
    found = measure(digits, CovarianceSettings(basis="cosine"))
    assert isinstance(found, CosineVariances)
    coefficients = to_cosines(centred.reshape(-1, 1, 8, 8), found.channels)
    close(found.variances, coefficients.square().mean(0), atol=1e-8)
    assert float(found.variances.sum()) == pytest.approx(float(centred.square().sum(1).mean()))


def few(counts: dict[int, int]) -> Dataset:
    """So many samples, 1 x 2 x 2, of each of three classes."""
    labels = torch.tensor([label for label, count in counts.items() for _ in range(count)])
    x = torch.randn(len(labels), 1, 2, 2, generator=torch.Generator().manual_seed(0)) + labels[:, None, None, None]
    part = Samples(x, labels)
    return Dataset("few", part, part, 3, ("a", "b", "c"))


@pytest.mark.parametrize("basis", ["components", "cosine", "isotropic"])
def test_a_class_with_few_samples_has_the_covariance_within_all(basis: Basis) -> None:
    found = measure(few({0: 40, 1: 1}), CovarianceSettings(basis, classes="covariance"))
    assert isinstance(found, ByClass)
    shared = measure(few({0: 40, 1: 1}), CovarianceSettings(basis, classes="origin"))
    assert isinstance(shared, ByClass)
    assert found.within[1] == found.within[2] == shared.within[0]
    assert found.within[0] != shared.within[0]
    close(found.means[2], found.mean)


def test_what_has_no_such_basis_is_refused(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance, "LARGEST", 63)
    with pytest.raises(ConfigError, match="basis cosine"):
        measure(digits, CovarianceSettings())
