"""The data's mean and covariance, measured in one pass over the training samples, for preconditionings that need it.

Kept in the user's cache by what the data and the settings are, so that no second run passes over the same data.
"""

import hashlib
import json
import math
import time
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import final

import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.data.base import Dataset
from fewstep.flow.preconditioning.covariance import (
    ByClass,
    CosineVariances,
    Covariance,
    CovarianceSettings,
    PrincipalComponents,
    cosines,
)
from fewstep.utils.cache import cache_folder
from fewstep.utils.errors import ConfigError, FewstepError, FewstepWarning
from fewstep.utils.files import read_record, write_atomically
from fewstep.utils.serialization import from_json, to_json
from fewstep.utils.tensors import expand

LARGEST = 4096
"""Numbers of a sample up to which principal components are computed."""
AT_ONCE = 2**28
"""Numbers of all classes' second moments that one pass holds, 2 GiB; classes beyond them take another pass."""
_CHUNK = 1024
_WORTH_KEEPING = 2.0
"""Seconds of a measure from which it is kept."""
_VERSION = 1  # raise with any change to the measure


def kept_measure(dataset: Dataset, settings: CovarianceSettings, quiet: bool = True) -> Covariance:
    """`measure`, or what the user's cache keeps of it; kept there where it took two seconds or more.

    A file in the cache that cannot be used is replaced, with a FewstepWarning. Raises what `measure` raises.
    """
    check(dataset, settings)
    key = {"version": _VERSION, "data": dataset.fingerprint, "settings": to_json(settings)}
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
    file = cache_folder() / f"covariance-{digest}.json"
    if file.is_file():
        try:
            return from_json(Covariance, read_record(file, ""), str(file))  # type: ignore[type-abstract]
        except FewstepError as error:
            warnings.warn(f"{error}; it is measured anew", FewstepWarning, stacklevel=2)
    begin = time.perf_counter()
    found = measure(dataset, settings, quiet)
    if time.perf_counter() - begin >= _WORTH_KEEPING:
        _keep(file, found)
    return found


def _keep(file: FilePath, found: Covariance) -> None:
    """In the cache, unless it cannot be written: what is found is worth a run without it."""
    try:
        write_atomically(file, json.dumps(to_json(found)) + "\n")
    except FewstepError as error:
        warnings.warn(f"{error}: the covariance is not kept", FewstepWarning, stacklevel=3)


def measure(dataset: Dataset, settings: CovarianceSettings, quiet: bool = True) -> Covariance:
    """Mean and covariance of the training samples in the basis of the settings, in one pass, in float64.

    With S = sum (x - a)(x - a)' over n samples about any a, the covariance is S/n - d d', d = mean - a; a is the mean
    of the first samples, so that nothing cancels.

    A class with fewer samples than its covariance needs (one more than numbers of a sample; two in a basis that is
    given) has the covariance within all classes. A covariance for each of so many classes that their second moments
    take more than 2 GiB takes a pass for every 2 GiB.

    Raises ConfigError for principal components of more than 4,096 numbers, cosines of what is no image, and classes of
    data without them.
    """
    check(dataset, settings)
    moments, each = _moments(dataset.shape, settings), settings.classes == "covariance"
    if settings.classes == "pooled":
        sums = _Sums.of(dataset, moments, quiet=quiet)
        return moments.covariance(sums.about_mean(), sums.count, sums.mean)
    portion = max(1, AT_ONCE // math.prod(moments.size)) if each else dataset.num_classes
    portions = [
        range(first, min(first + portion, dataset.num_classes)) for first in range(0, dataset.num_classes, portion)
    ]
    first, *others = (_Sums.of(dataset, moments, classes, each, quiet) for classes in portions)
    sums = first.joined(others)
    pooled, within = moments.covariance(sums.about_mean(), sums.count, sums.mean), sums.within()
    shared = moments.covariance(within.sum(0), sums.count, sums.mean)
    if not each:
        return ByClass(sums.mean, sums.means, pooled, (shared,))
    least = sums.mean.numel() + 1 if settings.basis == "components" else 2
    own = [
        moments.covariance(within[c], int(count), sums.means[c]) if count >= least else shared
        for c, count in enumerate(sums.counts.tolist())
    ]
    return ByClass(sums.mean, sums.means, pooled, tuple(own))


def means_by_class(dataset: Dataset) -> Tensor:
    """The mean of each class, (classes, *shape) float64; that of all data for a class without samples.

    Raises ConfigError for data without classes.
    """
    _check_classes(dataset)
    return _Sums.of(dataset, None, range(dataset.num_classes)).means


def check(dataset: Dataset, settings: CovarianceSettings) -> None:
    """Raise what `measure` would of the settings, before it passes over the data."""
    size = math.prod(dataset.shape)
    if settings.basis == "components" and size > LARGEST:
        raise ConfigError(
            f"principal components of {size} numbers a sample, more than {LARGEST}: set "
            "--model.preconditioning.basis cosine"
        )
    if settings.basis == "cosine" and len(dataset.shape) != 3:
        raise ConfigError(f"cosines are of images, not of samples of shape {dataset.shape}: take the basis components")
    if settings.classes != "pooled":
        _check_classes(dataset)


def _check_classes(dataset: Dataset) -> None:
    if not dataset.num_classes:
        raise ConfigError(f"{dataset.name} has no classes to have means of their own: leave --classes out")


class _Moments(ABC):
    """What is summed of samples of a shape, and the covariance that follows."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    @property
    @abstractmethod
    def size(self) -> tuple[int, ...]:
        """The shape of the second moments."""

    @abstractmethod
    def summed(self, x: Tensor) -> Tensor:
        """The second moments of samples (n, *shape) about zero, summed."""

    @abstractmethod
    def covariance(self, second: Tensor, count: int, mean: Tensor) -> Covariance:
        """second: the moments of `count` samples about their mean, summed."""


@final
class _Isotropic(_Moments):
    """The sum of all squares."""

    size = ()

    def summed(self, x: Tensor) -> Tensor:
        return x.square().sum()

    def covariance(self, second: Tensor, count: int, mean: Tensor) -> PrincipalComponents:
        vectors, none = mean.new_zeros(mean.numel(), 0), mean.new_zeros(0)
        return PrincipalComponents(mean, vectors, none, max(0.0, float(second)) / max(count * mean.numel(), 1))


@final
class _Components(_Moments):
    """The whole matrix. kept: how many components."""

    def __init__(self, shape: tuple[int, ...], kept: int) -> None:
        super().__init__(shape)
        self.numbers = math.prod(shape)
        self.kept = min(kept or self.numbers, self.numbers)

    @property
    def size(self) -> tuple[int, ...]:
        return self.numbers, self.numbers

    def summed(self, x: Tensor) -> Tensor:
        return x.flatten(1).T @ x.flatten(1)

    def covariance(self, second: Tensor, count: int, mean: Tensor) -> PrincipalComponents:
        found, vectors = torch.linalg.eigh(second / max(count, 1))
        found = found.clamp(min=0).flip(0)
        rest = float(found[self.kept :].mean()) if self.kept < self.numbers else 0.0
        return PrincipalComponents(mean, vectors.flip(1)[:, : self.kept], found[: self.kept], rest)


@final
class _Cosines(_Moments):
    """Products of the channels' coefficients at each pair of frequencies; the channels' basis is found last."""

    @property
    def size(self) -> tuple[int, ...]:
        channels, height, width = self.shape
        return height, width, channels, channels

    def summed(self, x: Tensor) -> Tensor:
        found = cosines(self.shape[1]) @ x @ cosines(self.shape[2]).T
        return torch.einsum("bchw,bkhw->hwck", found, found)

    def covariance(self, second: Tensor, count: int, mean: Tensor) -> CosineVariances:
        channels = torch.linalg.eigh(second.sum((0, 1)))[1].flip(1)
        variances = torch.einsum("ck,hwcd,dk->khw", channels, second, channels).clamp(min=0)
        return CosineVariances(mean, channels, variances / max(count, 1))


def _moments(shape: tuple[int, ...], settings: CovarianceSettings) -> _Moments:
    if settings.basis == "components":
        return _Components(shape, settings.components)
    return _Cosines(shape) if settings.basis == "cosine" else _Isotropic(shape)


@final
@dataclass(frozen=True)
class _Sums:
    """Of samples about `start`, class by class: their numbers (k,), sums (k, *shape), and second moments (k or 1, ...).

    moments: of which kind; None where none are taken.
    """

    start: Tensor
    counts: Tensor
    totals: Tensor
    second: Tensor
    moments: _Moments | None

    @classmethod
    def of(
        cls, dataset: Dataset, moments: _Moments | None, classes: range | None = None, each: bool = False,
        quiet: bool = True,
    ) -> "_Sums":  # fmt: skip
        """One pass. classes: those whose samples count, None for all data as one; each: second moments for each."""
        start = dataset.train.fetch(torch.arange(min(_CHUNK, len(dataset.train))))[0].double().mean(0)
        known = range(1) if classes is None else classes
        counts, totals = start.new_zeros(len(known)), start.new_zeros(len(known), *start.shape)
        second = start.new_zeros(len(known) if each else 1, *(() if moments is None else moments.size))
        portions = torch.arange(len(dataset.train)).split(_CHUNK)
        for rows in tqdm(portions, "covariance of the data", unit_scale=_CHUNK, disable=quiet, leave=False):
            x, labels = dataset.train.fetch(rows)
            x, own = x.double() - start, torch.zeros(len(x), dtype=torch.int64)
            if classes is not None and labels is not None:
                within = (labels >= known.start) & (labels < known.stop)
                x, own = x[within], labels[within] - known.start
            totals.index_add_(0, own, x)
            counts += torch.bincount(own, minlength=len(known))
            if moments is not None and not each:
                second[0] += moments.summed(x)
            elif moments is not None:
                for c in own.unique().tolist():
                    second[c] += moments.summed(x[own == c])
        return cls(start, counts, totals, second, moments)

    def joined(self, others: list["_Sums"]) -> "_Sums":
        """With those of further classes."""
        counts, totals, second = (
            torch.cat([getattr(sums, name) for sums in (self, *others)]) for name in ("counts", "totals", "second")
        )
        return replace(self, counts=counts, totals=totals, second=second)

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> Tensor:
        return self.start + self.totals.sum(0) / max(self.count, 1)

    @property
    def means(self) -> Tensor:
        """Of each class; that of all data for one without samples."""
        counts = expand(self.counts, self.totals)
        return torch.where(counts > 0, self.start + self.totals / counts.clamp(min=1), self.mean)

    def about_mean(self) -> Tensor:
        """Second moments of all samples about their mean, summed."""
        assert self.moments is not None
        total = self.totals.sum(0, keepdim=True)
        return self.second.sum(0) - self.moments.summed(total / math.sqrt(max(self.count, 1)))

    def within(self) -> Tensor:
        """Of samples about the means of their classes, summed: a row for each class, or one for all."""
        assert self.moments is not None
        shares = self.totals / expand(self.counts.clamp(min=1), self.totals).sqrt()
        if len(self.second) < len(shares):
            return self.second - self.moments.summed(shares)
        return self.second - torch.stack([self.moments.summed(share[None]) for share in shares])
