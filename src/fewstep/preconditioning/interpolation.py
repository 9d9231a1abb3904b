"""The curve through estimates at evenly spaced knots: cubic on every cell, once continuously differentiable.

One interpolant serves l, its derivative l' and s, so that the statistics are estimated for the very curve that the
coefficients integrate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


class Curve(NamedTuple):
    """A cubic Hermite interpolant in powers of the fraction u of a cell: p(u) = sum_k cells[:, k] u^k.

    cells (points - 1, 4); area (points,): the exact integral from the first knot to each; step: between knots.
    """

    cells: Tensor
    area: Tensor
    step: float

    @staticmethod
    def through(values: Tensor, step: float) -> Curve:
        """The curve through `values` (points,) with the slopes of `slopes`."""
        rise, run = values[1:] - values[:-1], step * slopes(values, step)
        left, right = run[:-1], run[1:]
        cells = torch.stack([values[:-1], left, 3 * rise - 2 * left - right, left + right - 2 * rise], dim=1)
        whole = step * (cells / torch.arange(1, 5, dtype=values.dtype, device=values.device)).sum(1)
        return Curve(cells, torch.cat([whole.new_zeros(1), whole.cumsum(0)]), step)

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


def locate(points: Tensor, start: float, step: float, cells: int) -> Place:
    """The cell of every point on the grid start + i step; points beyond it belong to the end cells."""
    cell = torch.floor((points - start) / step).long().clamp(0, cells - 1)
    return Place(cell, (points - (start + step * cell.to(points.dtype))) / step)
