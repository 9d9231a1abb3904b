"""Mean and covariance of data, N(m, C), with C diagonal in an orthonormal basis; its denoiser and flow map are linear.

On any path, along a direction of variance lam (math.md §3.8):
  flow map   sqrt((alpha_s^2 lam + sigma_s^2)/(alpha_t^2 lam + sigma_t^2))
  denoiser   alpha lam/(alpha^2 lam + sigma^2)
  velocity   (alpha alpha' lam + sigma sigma')/(alpha^2 lam + sigma^2)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Literal, final

import torch
from torch import Tensor

from fewstep.flow.paths import Path, PathValues
from fewstep.utils.errors import ConfigError
from fewstep.utils.tensors import nonzero

Basis = Literal["components", "cosine"]
Gain = Callable[[Tensor], Tensor]
"""Variances (1, k) to factors (B, k), float64."""


@final
@dataclass(frozen=True)
class CovarianceSettings:
    """In which basis the data's covariance is measured; components: how many principal ones, 0 for all."""

    basis: Basis = "components"
    components: int = 0


@dataclass(frozen=True, eq=False)
class Covariance(ABC):
    """Subclasses are final and hold a basis. mean: of a sample's shape, float64."""

    mean: Tensor

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        mine, theirs = ([getattr(each, field.name) for field in fields(self)] for each in (self, other))
        return all(torch.equal(*map(torch.as_tensor, pair)) for pair in zip(mine, theirs, strict=True))

    def __hash__(self) -> int:
        return hash((type(self), self.mean.shape, float(self.mean.sum())))

    @cached_property
    def deviation(self) -> float:
        """The root of the mean variance of a number."""
        return math.sqrt(self.total / self.mean.numel())

    @property
    @abstractmethod
    def total(self) -> float:
        """The sum of all variances."""

    @abstractmethod
    def scaled(self, x: Tensor, gain: Gain) -> Tensor:
        """V diag(gain(lam)) V' x, each direction of x (B, ...) times the gain of its variance."""


@final
@dataclass(frozen=True, eq=False)
class PrincipalComponents(Covariance):
    """The largest variances (k,) along orthonormal vectors (dim, k); every other direction has the variance `rest`."""

    vectors: Tensor
    variances: Tensor
    rest: float

    def __post_init__(self) -> None:
        size = self.mean.numel()
        if self.vectors.shape != (size, len(self.variances)) or not bool((self.variances >= 0).all()):
            raise ConfigError(
                f"principal components of {size} numbers: vectors of shape {tuple(self.vectors.shape)} and "
                f"{len(self.variances)} variances, which must be at least 0, do not fit"
            )
        # As it is read back from a file: products of another layout round otherwise.
        object.__setattr__(self, "vectors", self.vectors.contiguous())

    @property
    def total(self) -> float:
        return float(self.variances.sum()) + (self.mean.numel() - len(self.variances)) * self.rest

    def scaled(self, x: Tensor, gain: Gain) -> Tensor:
        vectors, flat = self.vectors.to(x), x.flatten(1)
        lam = torch.cat([self.variances, self.variances.new_tensor([self.rest])]).to(x.device)
        gains = gain(lam[None]).to(x.dtype)
        along, rest = gains[:, :-1], gains[:, -1:]
        found = rest * flat + ((along - rest) * (flat @ vectors)) @ vectors.T
        return found.reshape(x.shape)


@final
@dataclass(frozen=True, eq=False)
class CosineVariances(Covariance):
    """Variances (C, H, W) of images' cosine coefficients, channels mixed by an orthonormal (C, C): two small products.

    Natural images are nearly uncorrelated there (their statistics do not change under shifts).
    """

    channels: Tensor
    variances: Tensor

    def __post_init__(self) -> None:
        if self.variances.shape != self.mean.shape or self.mean.ndim != 3 or not bool((self.variances >= 0).all()):
            raise ConfigError(
                f"variances of cosine coefficients of shape {tuple(self.variances.shape)} do not fit images of shape "
                f"{tuple(self.mean.shape)}"
            )

    @property
    def total(self) -> float:
        return float(self.variances.sum())

    def scaled(self, x: Tensor, gain: Gain) -> Tensor:
        gains = gain(self.variances.flatten()[None].to(x.device)).to(x.dtype)
        return from_cosines(to_cosines(x, self.channels) * gains.reshape(-1, *x.shape[1:]), self.channels)


@lru_cache(maxsize=16)
def cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (size, size), float64: rows are frequencies."""
    place = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    rows = torch.cos(math.pi * torch.arange(size, dtype=torch.float64)[:, None] * place) * math.sqrt(2 / size)
    return torch.cat([rows[:1] / math.sqrt(2), rows[1:]])


def to_cosines(x: Tensor, channels: Tensor) -> Tensor:
    """Cosine coefficients (B, C, H, W) of images, their channels turned by the transpose of `channels`."""
    turned = torch.einsum("ck,bchw->bkhw", channels.to(x), x)
    return cosines(x.shape[-2]).to(x) @ turned @ cosines(x.shape[-1]).to(x).T


def from_cosines(y: Tensor, channels: Tensor) -> Tensor:
    """The inverse of to_cosines."""
    images = cosines(y.shape[-2]).to(y).T @ y @ cosines(y.shape[-1]).to(y)
    return torch.einsum("ck,bkhw->bchw", channels.to(y), images)


def flow_gain(at_t: PathValues, at_s: PathValues, lam: Tensor) -> Tensor:
    """The flow map's factor along directions of variance lam, from t to s; 1 where there is neither data nor noise."""
    before, after = _spread(at_t, lam), _spread(at_s, lam)
    none = before == 0
    return torch.where(none, 1.0, torch.sqrt(after / torch.where(none, 1.0, before)))


def denoiser_gain(at_t: PathValues, lam: Tensor) -> Tensor:
    """The denoiser's factor along directions of variance lam; 0 where lam is 0."""
    return at_t.alpha * lam / nonzero(_spread(at_t, lam))


def velocity_gain(at_t: PathValues, lam: Tensor) -> Tensor:
    """The velocity's factor along directions of variance lam."""
    return (at_t.alpha * at_t.d_alpha * lam + at_t.sigma * at_t.d_sigma) / nonzero(_spread(at_t, lam))


def _spread(at: PathValues, lam: Tensor) -> Tensor:
    return at.alpha**2 * lam + at.sigma**2


def columns(path: Path, t: Tensor) -> PathValues:
    """alpha, sigma and their derivatives at times t (B,), (B, 1) each, to broadcast over variances."""
    return PathValues(*(value[:, None] for value in path.values(t)))
