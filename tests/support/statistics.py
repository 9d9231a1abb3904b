"""Trajectory statistics in closed form, and a preconditioning's table with nothing special about it."""

import math

import torch
from torch import Tensor

from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from tests.support.cases import F64, SD


def grid(points: int = 120, low: float = 0.002, high: float = 80.0) -> Tensor:
    """lambda = -log(tau), evenly from the highest noise level to the lowest."""
    return torch.linspace(-math.log(high), -math.log(low), points, dtype=F64)


def constant(l: float, s: float, mean: float = 0.0) -> TrajectoryStatistics:  # noqa: E741
    """The same l and s at every noise level."""
    lam = grid(60)
    mean_tensor = torch.full((3,), mean, dtype=F64)
    return TrajectoryStatistics.closed_form(lam, torch.full_like(lam, l), torch.full_like(lam, s), mean_tensor, SD)


def wavy(mean: float = 0.3) -> TrajectoryStatistics:
    """An l and an s of the usual size and shape, with nothing special about them."""
    lam = grid(60)
    l = torch.sigmoid(1.5 * lam + 0.2 * torch.sin(lam))  # noqa: E741
    return TrajectoryStatistics.closed_form(
        lam, l, 1 - 3 * l + 0.3 * torch.cos(2 * lam), torch.tensor(mean).double(), SD
    )


def exact_statistics(sd: float, mean: float = 0.0, points: int = 2000) -> TrajectoryStatistics:
    """Of N(., sd^2 I): l = sd^2/(sd^2 + t^2) and s = -l'/(1 - l) = -2 l, about the origin `mean`."""
    lam = grid(points)
    l = sd**2 / (sd**2 + torch.exp(-2 * lam))  # noqa: E741
    return TrajectoryStatistics.closed_form(lam, l, -2 * l, torch.tensor(mean, dtype=F64), sd)


def copy_with_mean(statistics: TrajectoryStatistics, mean: Tensor) -> TrajectoryStatistics:
    """About another origin."""
    return TrajectoryStatistics.closed_form(statistics.lam, statistics.l, statistics.s, mean, statistics.sigma_data)
