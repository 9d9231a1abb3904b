"""Batches of an objective: their draws, small data with and without labels, and times that tests choose."""

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from fewstep.flow.paths import Path
from fewstep.flow.times import BetaTimes, TimeDistribution
from fewstep.objectives import Batch
from fewstep.utils.random import Draws
from tests.support.cases import SD, noise

LATE = BetaTimes(4.0, 1.0)
"""Few times near data, where velocities of denoisers weigh 1/sigma^2 and a mean over draws says little."""


@final
@dataclass(frozen=True)
class OneTime(TimeDistribution):
    """The same noise level for all."""

    tau: float

    def quantile(self, path: Path, u: Tensor) -> Tensor:
        return path.time_from_tau(torch.full_like(u, self.tau))


def draws(count: int, seed: int = 0) -> Draws:
    """Those of the third step for samples 0 to count - 1."""
    return Draws(seed, 3, torch.arange(count))


@final
@dataclass(frozen=True)
class ExactDraws(Draws):
    """Noise whose sample mean and variance are those of the distribution: means of quadratics are then exact."""

    def normal(self, stream: int, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        return whitened(super().normal(stream, shape, dtype))


def whitened(z: Tensor, against: Tensor | None = None) -> Tensor:
    """z (B, ...) moved and scaled to mean 0 and mean square 1 over the batch, and uncorrelated with `against`."""
    z = z - z.mean(0)
    if against is not None:
        z = z - against * (z * against).mean(0) / against.square().mean(0)
    return z / z.square().mean(0).sqrt()


def small_batch(count: int = 16) -> Batch:
    """Of the Gaussian N(0.4, SD^2) in three dimensions, without labels."""
    return Batch(0.4 + SD * noise(count, 3), None, draws(count))


def labelled_batch(count: int = 8) -> Batch:
    """Noise (B, 2) of three classes in turn."""
    return Batch(noise(count, 2), torch.arange(count) % 3, draws(count))


def part(batch: Batch, index: Tensor) -> Batch:
    """The samples at `index` with the draws that are theirs."""
    return Batch(batch.x0[index], batch.labels[index], replace(batch.draws, indices=batch.draws.indices[index]))
