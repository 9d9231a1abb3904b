"""The data's covariance against a whole matrix, also of classes with few samples; and what has none."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.data.base import Dataset, Samples
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.flow.preconditioning.covariance import (
    Basis,
    ByClass,
    Classes,
    CosineVariances,
    CovarianceSettings,
    PrincipalComponents,
)
from fewstep.training import covariance
from fewstep.training.covariance import kept_measure, measure
from fewstep.utils.errors import ConfigError, FewstepWarning
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
    close(found.lam, found.coordinates(centred.reshape(-1, 1, 8, 8)).square().mean(0), atol=1e-8)
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
    assert found.within[1] == found.within[2]
    unit = torch.eye(4, dtype=torch.float64).reshape(4, 1, 2, 2)
    own, few_samples, all_of_them = (
        part.scaled(unit, lambda lam: lam) for part in (*found.within[:2], shared.within[0])
    )
    close(few_samples, all_of_them)
    assert not torch.allclose(own, few_samples, rtol=0.01)
    close(found.means[2], found.mean)


class Counted(Samples):
    """Counts how often each sample is fetched."""

    def fetch(self, indices: Tensor, mirror: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        fetched.update(indices.tolist())
        return super().fetch(indices, mirror)


fetched: Counter[int] = Counter()


@pytest.mark.parametrize("basis", ["components", "cosine", "isotropic"])
@pytest.mark.parametrize("classes", ["pooled", "origin", "covariance"])
def test_one_pass_far_from_zero(basis: Basis, classes: Classes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first samples are looked at twice. As exact as about the mean, for data whose mean is 10^4 deviations."""
    monkeypatch.setattr(covariance, "_CHUNK", 16)
    data, far = few({0: 40, 1: 30, 2: 30}), 1e4
    assert data.train.labels is not None
    part = Counted(data.train.values.double().float() + far, data.train.labels)
    fetched.clear()
    found = measure(replace(data, train=part), CovarianceSettings(basis, classes=classes))
    assert set(fetched.values()) == {1, 2}
    assert sum(fetched.values()) == 100 + 16
    near = measure(
        replace(data, train=Samples(part.values - far, part.labels)), CovarianceSettings(basis, classes=classes)
    )
    unit = torch.eye(4, dtype=torch.float64).reshape(4, 1, 2, 2)
    parts = [(near, found)]
    if isinstance(near, ByClass) and isinstance(found, ByClass):
        parts += list(zip(near.within, found.within, strict=True))
    for one, other in parts:
        close(other.scaled(unit, lambda lam: lam), one.scaled(unit, lambda lam: lam), rtol=1e-9, atol=1e-9)


def test_many_classes_take_further_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure(few({0: 40, 1: 30, 2: 1}), CovarianceSettings(classes="covariance"))
    monkeypatch.setattr(covariance, "AT_ONCE", 2 * 16)
    assert measure(few({0: 40, 1: 30, 2: 1}), CovarianceSettings(classes="covariance")) == whole


def test_it_is_kept_in_the_cache(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it took long: by data and settings; a damaged file is measured anew, and so is what cannot be kept."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    first = kept_measure(digits, CovarianceSettings())
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(covariance, "_WORTH_KEEPING", 0.0)
    assert kept_measure(digits, CovarianceSettings()) == first
    (file,) = (tmp_path / "cache").glob("covariance-*.json")
    with monkeypatch.context() as patch:
        patch.setattr(covariance, "measure", lambda *given: pytest.fail("measured again"))
        assert kept_measure(digits, CovarianceSettings()) == first
    kept_measure(digits, CovarianceSettings(components=3))
    assert len(list((tmp_path / "cache").glob("covariance-*.json"))) == 2
    file.write_text(file.read_text()[:-100])
    with pytest.warns(FewstepWarning, match="measured anew"):
        assert kept_measure(digits, CovarianceSettings()) == first
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "file"))
    with pytest.warns(FewstepWarning, match="not kept"):
        assert kept_measure(digits, CovarianceSettings()) == first


def test_what_has_no_such_basis_is_refused(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance, "LARGEST", 63)
    with pytest.raises(ConfigError, match="basis cosine"):
        measure(digits, CovarianceSettings())
