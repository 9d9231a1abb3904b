"""The data's covariance, measured in one pass, against a whole matrix; and what has none."""

import pytest
import torch
from torch import Tensor

from fewstep.data.base import Dataset
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.flow.preconditioning.covariance import (
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


def test_what_has_no_such_basis_is_refused(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance, "LARGEST", 63)
    with pytest.raises(ConfigError, match="basis cosine"):
        measure(digits, CovarianceSettings())
