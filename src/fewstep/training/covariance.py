"""The data's covariance, measured in one pass over the training samples, for preconditionings that need it."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.data.base import Dataset
from fewstep.flow.preconditioning.base import PreconditioningConfig
from fewstep.flow.preconditioning.covariance import (
    CosineVariances,
    Covariance,
    CovarianceSettings,
    PrincipalComponents,
    to_cosines,
)
from fewstep.sampling.pipeline import read_flow_map_config
from fewstep.training.run_folder import RunFolder
from fewstep.utils.errors import ConfigError

LARGEST = 4096
"""Numbers of a sample up to which principal components are computed."""
_CHUNK = 1024


def run_covariance(preconditioning: PreconditioningConfig, dataset: Dataset, run: RunFolder) -> Covariance | None:
    """What a run is given: its last checkpoint's, else measured now; None where its preconditioning needs none.

    Raises ConfigError as `measure` does.
    """
    settings = preconditioning.covariance
    if settings is None:
        return None
    if run.checkpoints():
        return read_flow_map_config(run.last_checkpoint()).preconditioning.known_covariance()
    return measure(dataset, settings)


def measure(dataset: Dataset, settings: CovarianceSettings) -> Covariance:
    """Mean and covariance of the training samples in the basis of the settings, in float64.

    Raises ConfigError for principal components of more than 4,096 numbers, and cosines of what is no image.
    """
    size = math.prod(dataset.shape)
    if settings.basis == "components":
        if size > LARGEST:
            raise ConfigError(
                f"principal components of {size} numbers a sample, more than {LARGEST}: set "
                "--model.preconditioning.basis cosine"
            )
        return _components(dataset, min(settings.components or size, size))
    if len(dataset.shape) != 3:
        raise ConfigError(f"cosines are of images, not of samples of shape {dataset.shape}: take the basis components")
    return _cosines(dataset)


def _components(dataset: Dataset, kept: int) -> PrincipalComponents:
    mean, size = _mean(dataset), math.prod(dataset.shape)
    total = torch.zeros(size, size, dtype=torch.float64)
    for x in _samples(dataset):
        centred = (x - mean).flatten(1)
        total += centred.T @ centred
    found, vectors = torch.linalg.eigh(total / len(dataset.train))
    found = found.clamp(min=0).flip(0)
    rest = float(found[kept:].mean()) if kept < size else 0.0
    return PrincipalComponents(mean, vectors.flip(1)[:, :kept], found[:kept], rest)


def _cosines(dataset: Dataset) -> CosineVariances:
    mean, count = _mean(dataset), len(dataset.train)
    between = torch.zeros(dataset.shape[0], dataset.shape[0], dtype=torch.float64)
    for x in _samples(dataset):
        between += torch.einsum("bchw,bkhw->ck", x - mean, x - mean)
    channels = torch.linalg.eigh(between)[1].flip(1)
    variances = torch.zeros(dataset.shape, dtype=torch.float64)
    for x in _samples(dataset):
        variances += to_cosines(x - mean, channels).square().sum(0)
    return CosineVariances(mean, channels, variances / count)


def _mean(dataset: Dataset) -> Tensor:
    return torch.stack([x.sum(0) for x in _samples(dataset)]).sum(0) / len(dataset.train)


def _samples(dataset: Dataset) -> Iterator[Tensor]:
    """The training samples in order, (n, ...) float64."""
    for rows in torch.arange(len(dataset.train)).split(_CHUNK):
        yield dataset.train.fetch(rows)[0].double()
