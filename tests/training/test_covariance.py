"""The data's covariance against a whole matrix, also of classes with few samples; and what has none."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.data.base import Dataset, Samples
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.flow.preconditioning.covariance import (
    Basis,
    ByClass,
    Classes,
    CosineVariances,
    Covariance,
    CovarianceSettings,
    PrincipalComponents,
)
from fewstep.training import covariance
from fewstep.training.covariance import kept_measure, measure
from fewstep.utils.errors import ConfigError, FewstepWarning
from fewstep.utils.serialization import to_json
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
    """It is stored once. A class has its own from 32 samples on."""
    data = few({0: 40, 1: 31, 2: 32})
    with pytest.warns(FewstepWarning, match="1 of 3 classes"):
        found = measure(data, CovarianceSettings(basis, classes="covariance"))
    shared = measure(data, CovarianceSettings(basis, classes="origin"))
    assert isinstance(found, ByClass)
    assert isinstance(shared, ByClass)
    assert found.index == (1, 0, 2)
    unit = torch.eye(4, dtype=torch.float64).reshape(4, 1, 2, 2)
    own, few_samples, all_of_them = (
        part.scaled(unit, lambda lam: lam) for part in (found.part_of(0), found.part_of(1), shared.part_of(2))
    )
    close(few_samples, all_of_them)
    assert not torch.allclose(own, few_samples, rtol=1e-3)
    close(found.of(torch.tensor([1])).scaled(unit[:1], lambda lam: lam), few_samples[:1])
    with pytest.warns(FewstepWarning, match="1 of 3"):
        unknown = measure(few({0: 40, 1: 1}), CovarianceSettings(basis, classes="covariance"))
    assert isinstance(unknown, ByClass)
    close(unknown.means[2], unknown.mean)


class Counted(Samples):
    """Counts how often each sample is fetched."""

    def fetch(self, indices: Tensor, mirror: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        fetched.update(indices.tolist())
        return super().fetch(indices, mirror)


fetched: Counter[int] = Counter()


@pytest.mark.parametrize("basis", ["components", "cosine", "isotropic"])
@pytest.mark.parametrize("classes", ["pooled", "origin", "covariance"])
@given(apart=st.sampled_from([0.0, 1.0, 1e4]), far=st.sampled_from([0.0, 1e4]), portion=st.integers(1, 130))
@settings(max_examples=6)
def test_one_pass_however_far_from_zero(basis: Basis, classes: Classes, apart: float, far: float, portion: int) -> None:
    """Each sample is fetched once. Classes may lie 10^4 deviations from zero, and apart."""
    whole = few({0: 40, 1: 40, 2: 40})
    labels = whole.train.fetch(torch.arange(120))[1]
    assert labels is not None
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    x = whole.train.fetch(order)[0] + far + apart * labels[order, None, None, None]
    part = Counted(x, labels[order])
    fetched.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(covariance, "_CHUNK", portion)
        found = measure(replace(whole, train=part), CovarianceSettings(basis, classes=classes))
    assert fetched == Counter(range(120))
    unit, exact = torch.eye(4, dtype=torch.float64).reshape(4, 1, 2, 2), x.double().flatten(1)

    def check(part: Covariance, rows: Tensor) -> None:
        """Against the whole matrix, within the basis."""
        along = (
            part.coordinates((rows - rows.mean(0)).reshape(-1, 1, 2, 2)) if basis == "cosine" else rows - rows.mean(0)
        )
        wanted = along.T @ along / len(rows)
        if basis == "components":
            close(part.scaled(unit, lambda lam: lam).flatten(1), wanted, rtol=1e-9, atol=1e-9 * float(wanted.trace()))
        else:
            expected = wanted.diagonal() if basis == "cosine" else wanted.trace()[None] / 4
            close(part.lam, expected, rtol=1e-9)

    pooled = found.pooled if isinstance(found, ByClass) else found
    check(pooled, exact)
    if isinstance(found, ByClass) and classes == "covariance":
        for label in range(3):
            check(found.part_of(label), exact[labels[order] == label])
    elif isinstance(found, ByClass):
        centred = exact - torch.stack([exact[labels[order] == c].mean(0) for c in range(3)])[labels[order]]
        check(found.part_of(0), centred)


def test_mirror_images_count_where_they_are_trained_on(digits: Dataset) -> None:
    found = measure(digits, CovarianceSettings(basis="cosine"), flip=True)
    x = digits.train.fetch(torch.arange(len(digits.train)))[0].double()
    both = torch.cat([x, x.flip(-1)])
    close(found.mean, both.mean(0))
    close(found.lam, found.coordinates(both - both.mean(0)).square().mean(0), atol=1e-8)
    assert kept_measure(digits, CovarianceSettings("isotropic"), flip=True) != kept_measure(
        digits, CovarianceSettings("isotropic")
    )


def test_too_many_covariances_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance, "MOST", 47)
    with pytest.raises(ConfigError, match="classes origin"):
        measure(few({0: 40, 1: 40}), CovarianceSettings(classes="covariance"))


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
    (tmp_path / "cache" / file.name).write_text(json.dumps(to_json(measure(few({0: 40}), CovarianceSettings()))))
    with pytest.warns(FewstepWarning, match="other data"):
        assert kept_measure(digits, CovarianceSettings()) == first
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "file"))
    with pytest.warns(FewstepWarning, match="not kept"):
        assert kept_measure(digits, CovarianceSettings()) == first


def test_what_has_no_such_basis_is_refused(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance, "LARGEST", 63)
    with pytest.raises(ConfigError, match="basis cosine"):
        measure(digits, CovarianceSettings())
