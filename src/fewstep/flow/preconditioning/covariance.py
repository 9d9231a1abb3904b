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
from fewstep.utils.precision import without_autocast
from fewstep.utils.serialization import later
from fewstep.utils.tensors import Copies, nonzero, on_host

Basis = Literal["components", "cosine"]
Classes = Literal["pooled", "origin", "covariance"]
Gain = Callable[[Tensor], Tensor]
"""Variances (1, k) to factors (B, k), float64."""


@final
@dataclass(frozen=True)
class CovarianceSettings:
    """In which basis the data's covariance is measured.

    basis: isotropic has one variance for all directions. components: how many principal ones, 0 for all. classes: one
    for all data, with a mean for each class beside (origin), or with a mean and a covariance for each.
    """

    basis: Literal["components", "cosine", "isotropic"] = "components"
    components: int = 0
    classes: Classes = "pooled"


def same_values(one: object, other: object, apart: tuple[str, ...] = ()) -> bool:
    """Whether two dataclasses of tensors and numbers are of one class and equal, fields `apart` apart."""
    if type(other) is not type(one):
        return False
    names = [field.name for field in fields(one) if field.name not in apart]  # type: ignore[arg-type]
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@dataclass(frozen=True, eq=False)
class Covariance(ABC):
    """Subclasses are final and hold a basis. mean: of a sample's shape, float64."""

    mean: Tensor

    def __eq__(self, other: object) -> bool:
        return same_values(self, other)

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

    @property
    @abstractmethod
    def lam(self) -> Tensor:
        """The variances (n,), or (B, n) of a batch, in the order in which gains are given them."""

    @abstractmethod
    def scaled(self, x: Tensor, gain: Gain) -> Tensor:
        """V diag(gain(lam)) V' x, each direction of x (B, ...) times the gain of its variance."""

    @abstractmethod
    def coordinates(self, x: Tensor) -> Tensor:
        """x (B, ...) along the directions, (B, c); products of these add up to those of x."""

    @property
    @abstractmethod
    def directions(self) -> Tensor:
        """Which of the variances each coordinate belongs to, (c,) int64."""

    def of(self, labels: Tensor | None) -> "Covariance":
        """That of a batch of these labels (B,), its mean (B, ...); itself where classes make no difference."""
        return self

    def like(self, name: str, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of this name on x's device, in x's type or another: converted once, not in every jump."""
        return self._copies.of(name, getattr(self, name), x.device, dtype or x.dtype)

    @cached_property
    def _copies(self) -> Copies:
        return Copies()


@final
@dataclass(frozen=True, eq=False)
class PrincipalComponents(Covariance):
    """The largest variances (k,) along orthonormal vectors (dim, k); every other direction has the variance `rest`."""

    vectors: Tensor
    variances: Tensor
    rest: float

    def __post_init__(self) -> None:
        size, kept = self.mean.numel(), self.variances.numel()
        fits = self.vectors.shape == (size, kept) and self.variances.ndim == 1
        if not fits or not bool((self.variances >= 0).all()) or not 0 <= self.rest < math.inf:
            raise ConfigError(
                f"principal components of {size} numbers: vectors of shape {tuple(self.vectors.shape)} and "
                f"variances of shape {tuple(self.variances.shape)}, which must be at least 0, do not fit"
            )
        check_float64(self.mean, self.vectors, self.variances)
        # As it is read back from a file: products of another layout round otherwise.
        object.__setattr__(self, "vectors", self.vectors.contiguous())
        lam = torch.cat([self.variances, self.variances.new_tensor([self.rest])])
        object.__setattr__(self, "_lam", lam)

    @property
    def total(self) -> float:
        return float(self.variances.sum()) + (self.mean.numel() - len(self.variances)) * self.rest

    @property
    def lam(self) -> Tensor:
        lam: Tensor = self._lam  # type: ignore[attr-defined]
        return lam

    @property
    def directions(self) -> Tensor:
        """Every component is a direction of its own; all numbers of what they leave are one."""
        size, kept = self.mean.numel(), len(self.variances)
        return torch.cat([torch.arange(kept), torch.full((size * (kept < size),), kept)])

    @without_autocast
    def coordinates(self, x: Tensor) -> Tensor:
        vectors, flat = self.like("vectors", x), x.flatten(1)
        along = flat @ vectors
        return torch.cat([along, flat - along @ vectors.T], 1) if vectors.shape[1] < flat.shape[1] else along

    @without_autocast
    def scaled(self, x: Tensor, gain: Gain) -> Tensor:
        vectors, flat = self.like("vectors", x), x.flatten(1)
        gains = gain(self.like("lam", x, torch.float64)[None]).to(x.dtype)
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
        shape, square = self.mean.shape, self.channels.shape == (self.mean.shape[0],) * 2 if self.mean.ndim else False
        if self.variances.shape != shape or len(shape) != 3 or not square or not bool((self.variances >= 0).all()):
            raise ConfigError(
                f"variances of cosine coefficients of shape {tuple(self.variances.shape)}, channels "
                f"{tuple(self.channels.shape)}, do not fit images of shape {tuple(shape)}"
            )
        check_float64(self.mean, self.channels, self.variances)

    @property
    def total(self) -> float:
        return float(self.variances.sum())

    @property
    def lam(self) -> Tensor:
        return self.variances.flatten()

    @property
    def rows(self) -> Tensor:
        """The cosine transform of a column of pixels, (H, H)."""
        return cosines(self.mean.shape[-2])

    @property
    def columns(self) -> Tensor:
        """That of a row of pixels, (W, W)."""
        return cosines(self.mean.shape[-1])

    @property
    def directions(self) -> Tensor:
        return torch.arange(self.variances.numel())

    @without_autocast
    def coordinates(self, x: Tensor) -> Tensor:
        return self._cosines(x).flatten(1)

    @without_autocast
    def scaled(self, x: Tensor, gain: Gain) -> Tensor:
        gains = gain(self.like("lam", x, torch.float64)[None]).to(x.dtype)
        y = self._cosines(x) * gains.reshape(-1, *x.shape[1:])
        images = self.like("rows", x).T @ y @ self.like("columns", x)
        return torch.einsum("ck,bkhw->bchw", self.like("channels", x), images)

    def _cosines(self, x: Tensor) -> Tensor:
        """Cosine coefficients (B, C, H, W) of images, their channels turned by the transpose of `channels`."""
        turned = torch.einsum("ck,bchw->bkhw", self.like("channels", x), x)
        return self.like("rows", x) @ turned @ self.like("columns", x).T


@final
@dataclass(frozen=True, eq=False)
class ByClass(Covariance):
    """A mean (classes, *shape) for each class, and one covariance within all of them, or several.

    mean: of all data. pooled: their covariance about it, which samples without a label have. within: in bases of as
    many directions as the pooled one; their own means count for nothing. index: which of them each class has; empty
    where there is one, or as many as classes.
    """

    means: Tensor
    pooled: Covariance
    within: tuple[Covariance, ...]
    index: tuple[int, ...] = later(tuple)

    def __post_init__(self) -> None:
        parts, classes = (self.pooled, *self.within), len(self.means) if self.means.ndim else 0
        alike = all(type(part) is type(parts[0]) and part.lam.shape == parts[0].lam.shape for part in parts)
        counted = len(self.within) in (1, classes) if not self.index else len(self.index) == classes
        inside = all(0 <= number < len(self.within) for number in self.index)
        if self.means.shape[1:] != self.mean.shape or not (classes and counted and inside and alike):
            raise ConfigError(
                f"{classes} classes with means of shape {tuple(self.means.shape[1:])} and {len(self.within)} "
                f"covariances do not fit data of shape {tuple(self.mean.shape)}"
            )
        check_float64(self.mean, self.means)
        numbers = self.index or ((0,) * classes if len(self.within) == 1 else range(classes))
        object.__setattr__(self, "_numbers", torch.tensor(numbers))

    def part_of(self, label: int) -> Covariance:
        """The covariance of a class about its mean."""
        return self.within[int(self._numbers[label])]  # type: ignore[attr-defined]

    @property
    def total(self) -> float:
        return self.pooled.total

    @property
    def lam(self) -> Tensor:
        return self.pooled.lam

    @property
    def directions(self) -> Tensor:
        return self.pooled.directions

    def coordinates(self, x: Tensor) -> Tensor:
        return self.pooled.coordinates(x)

    def scaled(self, x: Tensor, gain: Gain) -> Tensor:
        return self.pooled.scaled(x, gain)

    def of(self, labels: Tensor | None) -> Covariance:
        if labels is None:
            return self.pooled
        place = labels.device
        numbers = self._copies.of("numbers", self._numbers, place, torch.int64)  # type: ignore[attr-defined]
        of_all, of_each = (
            self._copies.of(name, getattr(self, name), place, torch.float64) for name in ("mean", "means")
        )
        mean = class_means(of_all, of_each, labels)
        part = torch.where(labels < 0, 0, 1 + numbers[labels.clamp(min=0)])
        return OfLabels(mean, (self.pooled, *self.within), part)


@final
@dataclass(frozen=True, eq=False)
class OfLabels(Covariance):
    """Of a batch: means (B, ...), and for each sample which of the `parts` it has, part (B,) int64. Never stored."""

    parts: tuple[Covariance, ...]
    part: Tensor

    @property
    def total(self) -> float:
        return self.parts[0].total

    @property
    def deviation(self) -> float:
        return self.parts[0].deviation

    @property
    def lam(self) -> Tensor:
        return torch.stack([part.lam for part in self.parts])[self.part.cpu()]

    @property
    def directions(self) -> Tensor:
        return self.parts[0].directions

    def coordinates(self, x: Tensor) -> Tensor:
        return self._of_each(x, lambda part, rows: part.coordinates(x[rows]))

    def scaled(self, x: Tensor, gain: Gain) -> Tensor:
        parts = torch.stack([part.like("lam", x, torch.float64) for part in self.parts])
        gains = gain(parts[self.part.to(x.device)]).expand(len(x), -1)
        return self._of_each(x, lambda part, rows: part.scaled(x[rows], lambda lam: gains[rows]))

    def _of_each(self, x: Tensor, values: Callable[[Covariance, Tensor | slice], Tensor]) -> Tensor:
        """Values (B, ...) of the rows of x, each by its own part: computed by the parts that occur, for their rows.

        By all parts for all rows where it is not known on the host which occur, and under torch.compile, whose shapes
        must not change with the labels.
        """
        if torch.compiler.is_compiling() or not on_host(self.part) or not len(x):
            found = [values(part, slice(None)) for part in self.parts]
            chosen = found[0]
            for number, one in enumerate(found[1:], 1):
                chosen = torch.where((self.part == number).reshape(-1, *[1] * (one.ndim - 1)), one, chosen)
            return chosen
        order = self.part.argsort(stable=True)
        places = order.split(torch.bincount(self.part, minlength=len(self.parts)).tolist())
        found = [values(own, rows.to(x.device)) for own, rows in zip(self.parts, places, strict=True) if len(rows)]
        return torch.cat(found)[order.argsort().to(x.device)]


def check_float64(*tensors: Tensor) -> None:
    """Raise ConfigError for another type."""
    if other := [str(each.dtype) for each in tensors if each.dtype != torch.float64]:
        raise ConfigError(f"a covariance is of float64, not of {other[0]}")


def class_means(mean: Tensor, means: Tensor, labels: Tensor) -> Tensor:
    """The means (B, ...) of samples with these labels: the class's of means (classes, ...), or `mean` for none."""
    unlabelled = (labels < 0).reshape(-1, *[1] * mean.ndim)
    return torch.where(unlabelled, mean.to(labels.device), means.to(labels.device)[labels.clamp(min=0)])


@lru_cache(maxsize=16)
def cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (size, size), float64: rows are frequencies."""
    place = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    rows = torch.cos(math.pi * torch.arange(size, dtype=torch.float64)[:, None] * place) * math.sqrt(2 / size)
    return torch.cat([rows[:1] / math.sqrt(2), rows[1:]])


def flow_gain(at_t: PathValues, at_s: PathValues, lam: Tensor) -> Tensor:
    """The flow map's factor along directions of variance lam, from t to s; 1 where there is neither data nor noise."""
    before, after = _root(at_t, lam), _root(at_s, lam)
    none = before == 0
    return torch.where(none, 1.0, after / torch.where(none, 1.0, before))


def denoiser_gain(at_t: PathValues, lam: Tensor) -> Tensor:
    """The denoiser's factor along directions of variance lam; 0 where lam is 0."""
    return at_t.alpha * lam / nonzero(_spread(at_t, lam))


def velocity_gain(at_t: PathValues, lam: Tensor) -> Tensor:
    """The velocity's factor along directions of variance lam."""
    return (at_t.alpha * at_t.d_alpha * lam + at_t.sigma * at_t.d_sigma) / nonzero(_spread(at_t, lam))


def _root(at: PathValues, lam: Tensor) -> Tensor:
    """The deviation along the directions; sigma where there is neither data nor noise, whose derivative is finite."""
    spread = _spread(at, lam)
    none = spread == 0
    return torch.where(none, at.sigma, torch.sqrt(torch.where(none, 1.0, spread)))


def _spread(at: PathValues, lam: Tensor) -> Tensor:
    return at.alpha**2 * lam + at.sigma**2


def columns(path: Path, t: Tensor) -> PathValues:
    """alpha, sigma and their derivatives at times t (B,), (B, 1) each, to broadcast over variances."""
    return PathValues(*(value[:, None] for value in path.values(t)))
