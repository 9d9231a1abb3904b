"""What is measured of latents, channel by channel, part by part."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.utils.errors import DataError

_ROUNDING, _SMALLEST = 1e-6, 1e-3  # relative, and the size below which it no longer shrinks


def varies(low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether values from low to high differ by more than rounding to the type that they are stored in, by channel."""
    resolution = max(torch.finfo(dtype).eps, _ROUNDING)
    return high - low > torch.maximum(low.abs(), high.abs()).clamp(min=_SMALLEST) * resolution


@dataclass
class ChannelMoments:
    """Mean and squares by channel, in float64, merged part by part (Chan, Golub and LeVeque 1979); and the range."""

    count: int = 0
    low: Tensor = field(default_factory=lambda: torch.full((), math.inf, dtype=torch.float64))
    high: Tensor = field(default_factory=lambda: torch.full((), -math.inf, dtype=torch.float64))
    dtype: torch.dtype = torch.float64
    mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, latents: Tensor) -> None:
        """Latents (n, c, h, w) of any type; n may be 0."""
        if len(latents) == 0:
            return
        values = latents.double().transpose(0, 1).flatten(1)
        count, mean = values.shape[1], values.mean(1)
        total, shift = self.count + count, mean - self.mean
        squares = (values - mean[:, None]).square().sum(1)
        self.squares = self.squares + squares + shift.square() * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.low, self.high = torch.minimum(self.low, values.amin(1)), torch.maximum(self.high, values.amax(1))
        self.count, self.dtype = total, latents.dtype

    def result(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, standard deviation), each (c,), 0 for a channel that never varies.

        Raises DataError unless they are finite, and where no channel varies.
        """
        if not self.count:
            raise DataError("there are no latents to measure")
        deviation = torch.where(varies(self.low, self.high, self.dtype), (self.squares / self.count).sqrt(), 0.0)
        mean, std = self.mean.tolist(), deviation.tolist()
        wrong = [i for i, value in enumerate(std) if not value < math.inf]
        if wrong:
            raise DataError(f"channel {wrong[0]} of the latents has standard deviation {std[wrong[0]]}")
        if not any(std):
            raise DataError("no channel of the latents varies: nothing can be learnt of them")
        return tuple(mean), tuple(std)
