"""The data's mean and covariance, measured in one pass over the training samples, for preconditionings that need it.

Kept in the user's cache by what the data and the settings are, so that no second run passes over the same data.
"""

import hashlib
import json
import math
import time
import warnings
from abc import ABC, abstractmethod
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
from fewstep.utils.files import parse_json, reading, write_atomically
from fewstep.utils.serialization import JSON, from_json, to_json
from fewstep.utils.tensors import expand

LARGEST = 4096
"""Numbers of a sample up to which principal components are computed."""
MOST = 2**28
"""Numbers of all classes' covariances, 2 GiB."""
_FEWEST = 32
"""Samples from which a class has a covariance of its own, whatever the basis."""
_CHUNK = 1024
_WORTH_KEEPING = 2.0
"""Seconds of a measure from which it is kept."""
_VERSION = 1  # raise with any change to the measure


def kept_measure(dataset: Dataset, settings: CovarianceSettings, flip: bool = False, quiet: bool = True) -> Covariance:
    """`measure`, or what the user's cache keeps of it; kept there where it took two seconds or more.

    A file in the cache that cannot be used is replaced, with a FewstepWarning. Raises what `measure` raises.
    """
    check(dataset, settings)
    key: dict[str, JSON] = {"version": _VERSION, "data": dataset.fingerprint, "settings": to_json(settings)}
    key |= {"flip": True} if flip else {}
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
    file = cache_folder() / f"covariance-{digest}.json"
    if file.is_file():
        try:
            return _read(file, dataset.shape, settings)
        except FewstepError as error:
            warnings.warn(f"{error}; it is measured anew", FewstepWarning, stacklevel=2)
    begin = time.perf_counter()
    found = measure(dataset, settings, flip, quiet)
    if time.perf_counter() - begin >= _WORTH_KEEPING:
        _keep(file, found)
    return found


def _read(file: FilePath, shape: tuple[int, ...], settings: CovarianceSettings) -> Covariance:
    """Raises FewstepError for a file that is damaged, or has the covariance of something else."""
    with reading(file, "it is of no use"):
        found = from_json(Covariance, parse_json(file.read_bytes()), str(file))  # type: ignore[type-abstract]
        basis = CosineVariances if settings.basis == "cosine" else PrincipalComponents
        pooled = found.pooled if isinstance(found, ByClass) else found
        fits = isinstance(found, ByClass) == (settings.classes != "pooled") and isinstance(pooled, basis)
        if not fits or tuple(found.mean.shape) != shape:
            raise ValueError("it is of other data or settings")
        return found


def _keep(file: FilePath, found: Covariance) -> None:
    """In the cache, unless it cannot be written: what is found is worth a run without it."""
    try:
        write_atomically(file, json.dumps(to_json(found)) + "\n")
    except FewstepError as error:
        warnings.warn(f"{error}: the covariance is not kept", FewstepWarning, stacklevel=3)


def measure(dataset: Dataset, settings: CovarianceSettings, flip: bool = False, quiet: bool = True) -> Covariance:
    """Mean and covariance of the training samples in the basis of the settings, in one pass, in float64.

    flip: of images and their mirror images. Portions are added by their own means (Chan, Golub and LeVeque 1983), so
    that nothing cancels however far from zero, or from each other, classes lie.

    A class with fewer samples than its covariance needs (one more than components, at least 32) has the covariance
    within all classes, with a FewstepWarning.

    Raises ConfigError for principal components of more than 4,096 numbers, cosines of what is no image, classes of data
    without them, and a covariance for each of so many classes that they take more than 2 GiB.
    """
    check(dataset, settings)
    moments, each = _moments(dataset.shape, settings), settings.classes == "covariance"
    sums = _Sums.of(dataset, moments, settings.classes != "pooled", each, flip, quiet)
    pooled = moments.covariance(sums.about_mean(), sums.count, sums.mean)
    if settings.classes == "pooled":
        return pooled
    means, shared = sums.known_means, moments.covariance(sums.second.sum(0), sums.count, sums.mean)
    if not each:
        return ByClass(sums.mean, means, pooled, (shared,))
    least, counts = max(_FEWEST, moments.kept + 1) * (1 + flip), sums.counts.tolist()
    own = [moments.covariance(sums.second[c], int(n), means[c]) for c, n in enumerate(counts) if n >= least]
    if few := sum(0 < n < least for n in counts):
        warnings.warn(
            f"{dataset.name}: {few} of {len(counts)} classes have fewer samples than a covariance of their own needs, "
            "and take that within all classes",
            FewstepWarning,
            stacklevel=3,
        )
    numbers = iter(range(1, len(own) + 1))
    index = tuple(next(numbers) if n >= least else 0 for n in counts)
    return ByClass(sums.mean, means, pooled, (shared, *own), index)


def means_by_class(dataset: Dataset) -> Tensor:
    """The mean of each class, (classes, *shape) float64; that of all data for a class without samples.

    Raises ConfigError for data without classes.
    """
    _check_classes(dataset)
    return _Sums.of(dataset, None, by_class=True).known_means


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
    if (
        settings.classes == "covariance"
        and dataset.num_classes * math.prod(_moments(dataset.shape, settings).size) > MOST
    ):
        raise ConfigError(
            f"a covariance for each of {dataset.num_classes} classes of {size} numbers a sample takes more than 2 GiB: "
            "set --model.preconditioning.classes origin"
        )


def _check_classes(dataset: Dataset) -> None:
    if not dataset.num_classes:
        raise ConfigError(f"{dataset.name} has no classes to have means of their own: leave --classes out")


class _Moments(ABC):
    """What is summed of samples of a shape, and the covariance that follows. kept: its components, 0 in a basis that is
    given.
    """

    def __init__(self, shape: tuple[int, ...], kept: int = 0) -> None:
        self.shape, self.kept = shape, kept

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
    """The whole matrix."""

    @property
    def size(self) -> tuple[int, ...]:
        return (math.prod(self.shape),) * 2

    def summed(self, x: Tensor) -> Tensor:
        return x.flatten(1).T @ x.flatten(1)

    def covariance(self, second: Tensor, count: int, mean: Tensor) -> PrincipalComponents:
        found, vectors = torch.linalg.eigh(second / max(count, 1))
        found = found.clamp(min=0).flip(0)
        rest = float(found[self.kept :].mean()) if self.kept < len(found) else 0.0
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
        return _Components(shape, min(settings.components or math.prod(shape), math.prod(shape)))
    return _Cosines(shape) if settings.basis == "cosine" else _Isotropic(shape)


@final
class _Sums:
    """Of samples, class by class: their numbers (k,), means (k, *shape), and second moments about them (k or 1, ...).

    moments: of which kind; None where none are taken. by_class: classes apart, else all data as one. each: second
    moments of each class, else of all.
    """

    def __init__(self, shape: tuple[int, ...], moments: _Moments | None, classes: int, each: bool) -> None:
        self.moments, self.each = moments, each
        self.counts = torch.zeros(classes, dtype=torch.float64)
        self.means = torch.zeros(classes, *shape, dtype=torch.float64)
        size = () if moments is None else moments.size
        self.second = torch.zeros(classes if each else 1, *size, dtype=torch.float64)

    @classmethod
    def of(
        cls, dataset: Dataset, moments: _Moments | None, by_class: bool, each: bool = False, flip: bool = False,
        quiet: bool = True,
    ) -> "_Sums":  # fmt: skip
        """One pass over the training samples."""
        sums = cls(dataset.shape, moments, dataset.num_classes if by_class else 1, each)
        rows = torch.arange(len(dataset.train)).split(_CHUNK)
        for portion in tqdm(rows, "covariance of the data", unit_scale=_CHUNK, disable=quiet, leave=False):
            for mirror in (None, torch.ones(len(portion), dtype=torch.bool))[: 1 + flip]:
                x, labels = dataset.train.fetch(portion, mirror)
                known = by_class and labels is not None
                sums.add(x.double(), labels if known else torch.zeros(len(x), dtype=torch.int64))  # type: ignore[arg-type]
        return sums

    def add(self, x: Tensor, labels: Tensor) -> None:
        """A portion: samples and the classes that they count to."""
        counts = torch.bincount(labels, minlength=len(self.counts)).double()
        means = torch.zeros_like(self.means).index_add_(0, labels, x) / expand(counts.clamp(min=1), self.means)
        both = self.counts + counts
        apart, share = means - self.means, counts / both.clamp(min=1)
        if self.moments is not None:
            present = torch.nonzero(self.counts * share)[:, 0]
            between = expand((self.counts * share).sqrt(), apart)[present] * apart[present]
            self._add_second(torch.cat([x - means[labels], between]), torch.cat([labels, present]))
        self.means += expand(share, apart) * apart
        self.counts = both

    def _add_second(self, x: Tensor, labels: Tensor) -> None:
        assert self.moments is not None
        if not self.each:
            self.second[0] += self.moments.summed(x)
            return
        for c in labels.unique().tolist():
            self.second[c] += self.moments.summed(x[labels == c])

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> Tensor:
        return (expand(self.counts, self.means) * self.means).sum(0) / max(self.count, 1)

    @property
    def known_means(self) -> Tensor:
        """Of each class; that of all data for one without samples."""
        return torch.where(expand(self.counts, self.means) > 0, self.means, self.mean)

    def about_mean(self) -> Tensor:
        """Second moments of all samples about their mean, summed."""
        assert self.moments is not None
        apart = expand(self.counts.sqrt(), self.means) * (self.means - self.mean)
        return self.second.sum(0) + self.moments.summed(apart)
