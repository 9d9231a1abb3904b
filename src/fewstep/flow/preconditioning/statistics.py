"""The statistics l and s of a teacher's trajectories, as a value (math.md §3.2, §3.6)."""

import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path as FilePath
from typing import Literal, final

import torch
from torch import Tensor

from fewstep.utils.errors import CheckpointError, ConfigError
from fewstep.utils.files import read_record, write_atomically
from fewstep.utils.serialization import from_json, later, to_json

# Noise above this many deviations of the data counts as high: the limits of math.md §3.6 are drawn in from here, and
# hold in full at twice this level.
HIGH_NOISE = 5.0


@final
@dataclass(frozen=True, eq=False)
class TrajectoryStatistics:
    """l and s at noise levels exp(-lam), with standard errors, and the mean about which they were taken.

    lam (points,): increasing and evenly spaced, from -log sigma_max to -log sigma_min. l, s and the fields named after
    them: (points,). All tensors but `mean` are float64 on the CPU.

    s_stderr: of the samples, and of the differences over the grid that l' is taken by. s_bias: how far the denoiser's
    own error may have moved s at high noise, a bound (`StatisticsEstimator.statistics` derives it).
    s_without_l, and its errors: s estimated afresh for l = 0. mean: of a sample's shape; zeros for raw data.
    class_means (classes, ...): about which samples with a label were taken, and jump; None for the mean of all.
    sigma_data: the data's standard deviation. limit: of s at high noise. samples, seed, probes (None: exact trace, 0:
    Stein's identity), derivative: how they were estimated; samples = 0 for closed forms. seconds: what it took; not
    compared by ==.
    """

    lam: Tensor
    l: Tensor  # noqa: E741  (math.md §3.1)
    s: Tensor
    l_stderr: Tensor
    s_stderr: Tensor
    s_bias: Tensor
    s_without_l: Tensor
    s_without_l_stderr: Tensor
    s_without_l_bias: Tensor
    mean: Tensor
    sigma_data: float
    limit: float
    samples: int
    seed: int
    probes: int | None
    is_shrunk: bool = False
    seconds: float = 0.0
    derivative: Literal["exact", "finite-difference"] = later(lambda: "exact")
    class_means: Tensor | None = later(lambda: None)

    def __post_init__(self) -> None:
        if self.lam.ndim != 1 or len(self.lam) < 3 or not self.sigma_data > 0:
            raise ConfigError("trajectory statistics need at least 3 noise levels, (points,), and sigma_data > 0")
        if not bool(torch.isfinite(self.mean).all()):
            raise ConfigError("trajectory statistics: mean has values that are not finite")
        if self.class_means is not None and self.class_means.shape[1:] != self.mean.shape:
            raise ConfigError("trajectory statistics: class_means must be a mean of a sample's shape for each class")
        tables = {f.name: getattr(self, f.name) for f in fields(self) if f.type is Tensor and f.name != "mean"}
        for name, table in tables.items():
            if table.shape != self.lam.shape or table.dtype != torch.float64 or not bool(table.isfinite().all()):
                raise ConfigError(
                    f"trajectory statistics: {name} must be {len(self.lam)} finite float64 values, "
                    f"got {table.dtype} of shape {tuple(table.shape)}"
                )
        steps = self.lam.diff()
        if not bool((steps > 0).all()) or float(steps.max() - steps.min()) > 1e-6 * float(steps.mean()):
            raise ConfigError("trajectory statistics: lam must increase in even steps")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TrajectoryStatistics):
            return NotImplemented
        return to_json(replace(self, seconds=0.0)) == to_json(replace(other, seconds=0.0))

    def __hash__(self) -> int:
        return hash((len(self.lam), float(self.lam[0]), self.samples, self.seed, self.is_shrunk))

    @classmethod
    def closed_form(cls, lam: Tensor, l: Tensor, s: Tensor, mean: Tensor, sigma_data: float) -> "TrajectoryStatistics":  # noqa: E741
        """Known l and s (points,), without error. s for l = 0 is not known and set to 0."""
        none = torch.zeros_like(lam)
        return cls(lam, l, s, none, none, none, none, none, none, mean, sigma_data, 1.0, 0, 0, None)

    @cached_property
    def origin(self) -> Tensor | None:
        """The mean, or None where it is zero: asked once, as a traced program cannot."""
        return self.mean if bool(self.mean.any()) else None

    @property
    def tau(self) -> Tensor:
        """The noise levels on the EDM path, falling."""
        return torch.exp(-self.lam)

    def without(self, name: Literal["l", "s"]) -> "TrajectoryStatistics":
        """An ablation: l = 0 with the s that belongs to it, or s = 0; raises ConfigError for another name."""
        zero = torch.zeros_like(self.lam)
        if name == "l":
            s, stderr, bias = self.s_without_l, self.s_without_l_stderr, self.s_without_l_bias
            return replace(self, l=zero, l_stderr=zero, s=s, s_stderr=stderr, s_bias=bias)
        if name == "s":
            free = replace(self, s_without_l=zero, s_without_l_stderr=zero, s_without_l_bias=zero)
            return replace(free, s=zero, s_stderr=zero, s_bias=zero)
        raise ConfigError(f"without {name!r}: there is l and there is s")

    def shrunk(self) -> "TrajectoryStatistics":
        """l and s drawn to their limits (0 and `limit`) at high noise, as far as they cannot be told from them.

        An estimate z with limit z0 becomes z0 + (1 - e^2/(z - z0)^2)_+ (z - z0), the positive-part rule of James and
        Stein, with e^2 = stderr^2 for l and stderr^2 + bias^2 for s. Where the denoiser is exact (bias 0) nothing moves
        by more than a standard error; where its error outweighs the residual, bias reaches |z - z0| and s is the limit.
        Only above HIGH_NOISE deviations of the data, fully so from twice that level. Done once: a second call changes
        nothing.
        """
        if self.is_shrunk:
            return self
        ramp = (torch.log2(self.tau / (HIGH_NOISE * self.sigma_data))).clamp(0, 1)
        ramp = ramp * ramp * (3 - 2 * ramp)
        error = torch.hypot(self.s_stderr, self.s_bias)
        plain_error = torch.hypot(self.s_without_l_stderr, self.s_without_l_bias)
        return replace(
            self,
            l=torch.lerp(self.l, _drawn(self.l, 0.0, self.l_stderr), ramp),
            s=torch.lerp(self.s, _drawn(self.s, self.limit, error), ramp),
            s_without_l=torch.lerp(self.s_without_l, _drawn(self.s_without_l, self.limit, plain_error), ramp),
            is_shrunk=True,
        )

    def save(self, file: FilePath | str) -> None:
        """Write JSON; raises CheckpointError when the disk refuses."""
        write_atomically(FilePath(file), json.dumps(to_json(self)) + "\n")

    @staticmethod
    def load(file: FilePath | str) -> "TrajectoryStatistics":
        """Read what `save` wrote; raises CheckpointError when it is missing or no JSON, ConfigError when it does not
        fit."""
        if not FilePath(file).is_file():
            raise CheckpointError(f"{file}: no such file")
        return from_json(TrajectoryStatistics, read_record(FilePath(file), "estimate it anew"), str(file))


def _drawn(estimate: Tensor, limit: float, error: Tensor) -> Tensor:
    deviation = estimate - limit
    square = deviation.square()
    keep = (1 - error.square() / torch.where(square > 0, square, 1.0)).clamp(min=0)
    return limit + torch.where(square > 0, keep, 0.0) * deviation
