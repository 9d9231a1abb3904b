"""The data's covariance, measured in passes over the training samples, for preconditionings that need it."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fewstep.data.base import Dataset
from fewstep.flow.preconditioning.covariance import (
    ByClass,
    CosineVariances,
    Covariance,
    CovarianceSettings,
    PrincipalComponents,
    class_means,
    to_cosines,
)
from fewstep.utils.errors import ConfigError
from fewstep.utils.tensors import expand

LARGEST = 4096
"""Numbers of a sample up to which principal components are computed."""
_CHUNK = 1024
Centred = Callable[[], Iterator[Tensor]]
"""Gives samples about their mean, (n, *shape) float64, from the first on each time it is called."""


def measure(dataset: Dataset, settings: CovarianceSettings) -> Covariance:
    """Mean and covariance of the training samples in the basis of the settings, in float64.

    A class with fewer samples than its covariance needs (one more than numbers of a sample; two in a basis that is
    given) has the covariance within all classes.

    Raises ConfigError for principal components of more than 4,096 numbers, cosines of what is no image, and classes of
    data without them.
    """
    size = math.prod(dataset.shape)
    if settings.basis == "components" and size > LARGEST:
        raise ConfigError(
            f"principal components of {size} numbers a sample, more than {LARGEST}: set "
            "--model.preconditioning.basis cosine"
        )
    if settings.basis == "cosine" and len(dataset.shape) != 3:
        raise ConfigError(f"cosines are of images, not of samples of shape {dataset.shape}: take the basis components")
    mean = _mean(dataset)
    pooled = _covariance(lambda: (x - mean for x, _ in _samples(dataset)), mean, settings)
    if settings.classes == "pooled":
        return pooled
    means, counts = _by_class(dataset)

    def within(label: int | None = None) -> Iterator[Tensor]:
        for x, labels in _samples(dataset):
            rows = labels == label if label is not None else slice(None)
            yield (x - class_means(mean, means, labels))[rows]

    shared = _covariance(within, mean, settings)
    if settings.classes == "origin":
        return ByClass(mean, means, pooled, (shared,))
    least = size + 1 if settings.basis == "components" else 2
    own = [
        _covariance(lambda c=c: within(c), means[c], settings) if count >= least else shared  # type: ignore[misc]
        for c, count in enumerate(counts.tolist())
    ]
    return ByClass(mean, means, pooled, tuple(own))


def means_by_class(dataset: Dataset) -> Tensor:
    """The mean of each class, (classes, *shape) float64; that of all data for a class without samples.

    Raises ConfigError for data without classes.
    """
    return _by_class(dataset)[0]


def _by_class(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """`means_by_class`, and the samples of each class (classes,)."""
    if not dataset.num_classes:
        raise ConfigError(f"{dataset.name} has no classes to have means of their own: leave --classes out")
    mean = _mean(dataset)
    total = mean.new_zeros(dataset.num_classes, *dataset.shape)
    count = mean.new_zeros(dataset.num_classes)
    for x, labels in _samples(dataset):
        total.index_add_(0, labels, x)
        count += torch.bincount(labels, minlength=len(count))
    return torch.where(expand(count, total) > 0, total / expand(count.clamp(min=1), total), mean), count


def _covariance(centred: Centred, mean: Tensor, settings: CovarianceSettings) -> Covariance:
    if settings.basis == "isotropic":
        return _isotropic(centred, mean)
    if settings.basis == "components":
        return _components(centred, mean, min(settings.components or mean.numel(), mean.numel()))
    return _cosines(centred, mean)


def _isotropic(centred: Centred, mean: Tensor) -> PrincipalComponents:
    total, count = 0.0, 0
    for x in centred():
        total, count = total + float(x.square().sum()), count + x.numel()
    vectors, none = mean.new_zeros(mean.numel(), 0), mean.new_zeros(0)
    return PrincipalComponents(mean, vectors, none, total / max(count, 1))


def _components(centred: Centred, mean: Tensor, kept: int) -> PrincipalComponents:
    size, count = mean.numel(), 0
    total = torch.zeros(size, size, dtype=torch.float64)
    for x in centred():
        flat = x.flatten(1)
        total, count = total + flat.T @ flat, count + len(x)
    found, vectors = torch.linalg.eigh(total / max(count, 1))
    found = found.clamp(min=0).flip(0)
    rest = float(found[kept:].mean()) if kept < size else 0.0
    return PrincipalComponents(mean, vectors.flip(1)[:, :kept], found[:kept], rest)


def _cosines(centred: Centred, mean: Tensor) -> CosineVariances:
    between, count = torch.zeros(len(mean), len(mean), dtype=torch.float64), 0
    for x in centred():
        between += torch.einsum("bchw,bkhw->ck", x, x)
        count += len(x)
    channels = torch.linalg.eigh(between)[1].flip(1)
    variances = torch.zeros(mean.shape, dtype=torch.float64)
    for x in centred():
        variances += to_cosines(x, channels).square().sum(0)
    return CosineVariances(mean, channels, variances / max(count, 1))


def _mean(dataset: Dataset) -> Tensor:
    return torch.stack([x.sum(0) for x, _ in _samples(dataset)]).sum(0) / len(dataset.train)


def _samples(dataset: Dataset) -> Iterator[tuple[Tensor, Tensor]]:
    """The training samples in order, (n, ...) float64, and their labels; zeros where there are none."""
    for rows in torch.arange(len(dataset.train)).split(_CHUNK):
        x, labels = dataset.train.fetch(rows)
        yield x.double(), torch.zeros(len(x), dtype=torch.int64) if labels is None else labels
