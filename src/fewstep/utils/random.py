"""Random numbers that are a function of (seed, step, index, stream) and nothing else.

Every sample of the global batch draws from its own counter, so how a batch is split over processes, accumulation
steps or sampling batches never changes a number, and a resumed run draws what an unbroken one would have drawn.
The generator is a keyed 64-bit counter hash (the finaliser of SplitMix64; Steele, Lea and Flood, OOPSLA 2014).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch stores."""
    value &= _WORD
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical (not arithmetic) right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_2)
    return z ^ _shift_right(z, 31)


def _advance(key: Tensor | int, counter: Tensor) -> Tensor:
    """The key's children of these numbers."""
    return _mix(key + (counter + 1) * _signed(_GOLDEN))


def _key(*parts: int) -> int:
    """The key of a seed, step and stream: the same in whole numbers, where tensors of one element would be slow."""
    key = 0
    for part in parts:
        z = (key + (part + 1) * _GOLDEN) & _WORD
        z = ((z ^ (z >> 30)) * _MIX_1) & _WORD
        z = ((z ^ (z >> 27)) * _MIX_2) & _WORD
        key = z ^ (z >> 31)
    return _signed(key)


@dataclass(frozen=True)
class Draws:
    """Random numbers for the samples `indices` (n,) int64 of step `step` under `seed`.

    Each use names its own `stream` (a small integer), so that adding one use does not shift another.
    """

    seed: int
    step: int
    indices: Tensor

    def _bits(self, stream: int, count: int) -> Tensor:
        rows = _advance(_key(self.seed, self.step, stream), self.indices)
        return _advance(rows[:, None], torch.arange(count, device=self.indices.device))

    def uniform(self, stream: int, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> Tensor:
        """Uniform on the open interval (0, 1), shape (n, *shape)."""
        bits = _shift_right(self._bits(stream, math.prod(shape)), 11)
        below_one = 1 - torch.finfo(dtype).eps / 2  # the largest patterns would round to 1
        values = ((bits.to(torch.float64) + 0.5) * 2.0**-53).to(dtype).clamp(max=below_one)
        return values.reshape(len(self.indices), *shape)

    def normal(self, stream: int, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal, shape (n, *shape), by the Box-Muller transform."""
        count = math.prod(shape)
        half = (count + 1) // 2
        u = self.uniform(stream, (2 * half,))
        radius = (-2.0 * u[:, :half].log()).sqrt().to(dtype)
        angle = (2.0 * math.pi * u[:, half:]).to(dtype)
        pair = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return pair[:, :count].reshape(len(self.indices), *shape)

    def integers(self, stream: int, high: int) -> Tensor:
        """Uniform integers in [0, high), shape (n,)."""
        return (self.uniform(stream) * high).long().clamp_(max=high - 1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, torch's random numbers on the CPU follow from the seed; then they are as they were before."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        yield


def shuffled_rows(seed: int, numbers: Tensor, count: int) -> Tensor:
    """Rows (n,) in [0, count) of the samples `numbers` (n,) in an endless sequence of epochs, each freshly shuffled."""
    rows = torch.empty_like(numbers)
    for epoch in torch.unique(numbers // count).tolist():
        here = numbers // count == epoch
        rows[here] = permutation(seed, epoch, count).to(numbers.device)[numbers[here] % count]
    return rows


def permutation(seed: int, epoch: int, count: int) -> Tensor:
    """The order of one epoch over `count` items: a function of (seed, epoch)."""
    draws = Draws(seed, epoch, torch.arange(count))
    return torch.argsort(draws.uniform(0), stable=True)
