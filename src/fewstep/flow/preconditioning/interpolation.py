"""The curve through estimates at evenly spaced knots: cubic on every cell, once continuously differentiable; and the
surface through estimates at pairs of knots.

Its slopes look at close neighbours alone, since estimates of s may be rough. The derivative l' that s depends on is
taken by wide differences of a smooth l.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

# Differences of high order over more of lambda than l itself varies in only do harm. Over the 120 levels of the default
# grid their truncation stays below what 4096 samples leave of s, at both ends too (benchmarks/preconditioning).
_SPAN, _MOST_KNOTS = 2.5, 9


class Place(NamedTuple):
    """Where points lie among the knots: the cell's number (int64) and the fraction of the cell, of one shape."""

    cell: Tensor
    fraction: Tensor


def slopes(values: Tensor, step: float) -> Tensor:
    """Derivatives at the knots, (..., points): by fourth-order central differences where two neighbours lie on each
    side, second-order ones beside the ends, one-sided at them. Needs at least 3 points.
    """
    inside = (values[..., 2:] - values[..., :-2]) / 2
    if values.shape[-1] >= 5:
        wide = (values[..., 4:] - values[..., :-4]) / 4
        inside = torch.cat([inside[..., :1], (4 * inside[..., 1:-1] - wide) / 3, inside[..., -1:]], dim=-1)
    first = -1.5 * values[..., :1] + 2 * values[..., 1:2] - 0.5 * values[..., 2:3]
    last = 1.5 * values[..., -1:] - 2 * values[..., -2:-1] + 0.5 * values[..., -3:-2]
    return torch.cat([first, inside, last], dim=-1) / step


def derivative(values: Tensor, step: float, width: int) -> Tensor:
    """Derivatives at the knots, (..., points): of the polynomials through `width` neighbouring knots, or all there are.

    The error is of order step^(width - 1); knots near an end use the stencil that lies at it. For smooth values: at the
    ends roughness of the size e becomes an error of many e/step, 33 of them at width 9. Needs at least 2 points.
    """
    points = values.shape[-1]
    width = min(width, points)
    knots = torch.arange(points, device=values.device)
    first = (knots - width // 2).clamp(0, points - width)
    weights = _differences(width).to(values)[knots - first]
    return (values.unfold(-1, width, 1)[..., first, :] * weights).sum(-1) / step


def widths(step: float) -> tuple[int, int]:
    """Of the stencils that l' is taken by on a grid of this step in lambda, and of those that tell its error.

    At the data end 1 - l falls as e^{-2 lambda}, of which one-sided stencils of one knot more or less err to either
    side: the difference bounds the error.
    """
    width = max(3, min(_MOST_KNOTS, 1 + 2 * int(_SPAN / step / 2)))
    return width, width - 1


@cache
def _differences(width: int) -> Tensor:
    """(width, width) float64: row i gives the derivative at knot i of the polynomial through knots 0, 1, 2, ...

    (b_j/b_i)/(i - j) with b_j = (-1)^j binomial(width - 1, j); on the diagonal what makes a row sum to 0 (Berrut and
    Trefethen 2004, section 9.3).
    """
    knots = torch.arange(width, dtype=torch.float64)
    b = torch.tensor([(-1.0) ** j * math.comb(width - 1, j) for j in range(width)], dtype=torch.float64)
    off_diagonal = b / b[:, None] / (knots[:, None] - knots).fill_diagonal_(torch.inf)
    return off_diagonal - torch.diag(off_diagonal.sum(1))


class HermiteCurve(NamedTuple):
    """A cubic Hermite interpolant in powers of the fraction u of a cell: p(u) = sum_k cells[:, k] u^k.

    cells (points - 1, 4); area (points,): the exact integral from the first knot to each; knots lie at start + i step.
    """

    cells: Tensor
    area: Tensor
    start: float
    step: float

    @staticmethod
    def through(values: Tensor, start: float, step: float) -> "HermiteCurve":
        """The curve through `values` (points,) with the slopes of `slopes`."""
        rise, run = values[1:] - values[:-1], step * slopes(values, step)
        left, right = run[:-1], run[1:]
        cells = torch.stack([values[:-1], left, 3 * rise - 2 * left - right, left + right - 2 * rise], dim=1)
        whole = step * (cells / torch.arange(1, 5, dtype=values.dtype, device=values.device)).sum(1)
        return HermiteCurve(cells, torch.cat([whole.new_zeros(1), whole.cumsum(0)]), start, step)

    def locate(self, points: Tensor) -> Place:
        """The cell of every point; points beyond the knots belong to the end cells."""
        cell = torch.floor((points - self.start) / self.step).long().clamp(0, len(self.cells) - 1)
        return Place(cell, (points - (self.start + self.step * cell.to(points.dtype))) / self.step)

    def value(self, place: Place) -> Tensor:
        """p at the places."""
        a, b, c, d = self.cells[place.cell].unbind(-1)
        u = place.fraction
        return a + u * (b + u * (c + u * d))

    def integral(self, place: Place) -> Tensor:
        """The integral of p from the first knot to the places."""
        a, b, c, d = self.cells[place.cell].unbind(-1)
        u = place.fraction
        return self.area[place.cell] + self.step * u * (a + u * (b / 2 + u * (c / 3 + u * d / 4)))


class Surface(NamedTuple):
    """Through values (..., K, K) at pairs of knots start + i step, by cubic convolution (Keys 1981) along both axes.

    Exact for polynomials of second degree in either; once continuously differentiable. values: with a frame of one more
    knot on every side, (..., K + 2, K + 2), the parabola's through the outermost three.
    """

    values: Tensor
    start: float
    step: float

    @staticmethod
    def through(values: Tensor, start: float, step: float) -> "Surface":
        """Through values (..., K, K), K at least 3."""
        for axis in (-2, -1):
            first, last = values.narrow(axis, 0, 3), values.narrow(axis, values.shape[axis] - 3, 3).flip(axis)
            frame = [3 * (e.select(axis, 0) - e.select(axis, 1)) + e.select(axis, 2) for e in (first, last)]
            values = torch.cat([frame[0].unsqueeze(axis), values, frame[1].unsqueeze(axis)], axis)
        return Surface(values, start, step)

    def at(self, a: Tensor, b: Tensor) -> Tensor:
        """The values at points (B,) each, on their device: (..., B); the outermost cells go on beyond the knots."""
        (rows, across), (columns, down) = self._cells(a), self._cells(b)
        patch = self.values[..., rows[:, :, None], columns[:, None, :]]
        return (patch * across[:, :, None] * down[:, None, :]).sum((-2, -1))

    def _cells(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """(indices (B, 4) of knots in the framed values, weights (B, 4)) of points (B,)."""
        last = self.values.shape[-1] - 4
        cell = torch.floor((points.detach() - self.start) / self.step).long().clamp(0, last)
        u = (points - (self.start + self.step * cell.to(points.dtype))) / self.step
        weights = (u * (u * (2 - u) - 1), u * u * (3 * u - 5) + 2, u * (u * (4 - 3 * u) + 1), u * u * (u - 1))
        return cell[:, None] + torch.arange(4, device=points.device), torch.stack(weights, 1) / 2
