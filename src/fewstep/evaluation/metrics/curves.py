"""How many images a method needs to a given quality, from learning curves alone.

A curve is a sequence of (images seen, value), images rising, lower values being better.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from fewstep.utils.errors import ShapeError
from fewstep.utils.random import Draws

Curve = Sequence[tuple[float, float]]

SHARES = (0.5, 0.75, 1.0)
_ENUMERATED = 5  # up to so many seeds, all n^n resamples


def time_to(curve: Curve, target: float) -> float | None:
    """Images from which on the curve stays at `target` or below; None when it ends above.

    An early dip that is lost again does not count. Between two points log(value) is linear in images (value itself
    where it falls to 0 or below). A curve that never leaves the target gives its first point: no earlier one is known.
    Raises ShapeError unless images are positive and rise.
    """
    points = settled(curve)
    if points[0][1] <= target:
        return points[0][0]
    for (x0, above), (x1, below) in pairwise(points):
        if below <= target:
            scale: Callable[[float], float] = math.log if below > 0 else float
            share = 1.0 if math.isinf(above) else (scale(above) - scale(target)) / (scale(above) - scale(below))
            return x0 + (x1 - x0) * share
    return None


def settled(curve: Curve) -> list[tuple[float, float]]:
    """The curve with each value replaced by the worst from there on; a value that is not a number counts as infinite.

    Raises ShapeError on images that do not rise from 0.
    """
    images = [x for x, _ in curve]
    if not images or not images[0] > 0 or any(not b > a for a, b in pairwise(images)):
        raise ShapeError(f"a curve needs points at rising, positive numbers of images, got {images[:8]}")
    worst, points = -math.inf, []
    for x, value in reversed(curve):
        worst = max(worst, math.inf if math.isnan(value) else value)
        points.append((x, worst))
    return points[::-1]


def common_target(curves: Sequence[Curve]) -> float:
    """The quality that every curve has at its end: the worst of their last values. Symmetric in the curves."""
    return max(settled(curve)[-1][1] for curve in curves)


def reached_by(curves: Sequence[Curve], share: float) -> float:
    """The quality that every curve keeps after `share` of its images."""
    values = []
    for curve in curves:
        points = settled(curve)
        end = max(share * points[-1][0], points[0][0])
        values.append([value for images, value in points if images <= end][-1])
    return max(values)


def targets_of(curves: Sequence[Curve], shares: Sequence[float] = SHARES) -> dict[float, float]:
    """share -> `reached_by`; a target that an earlier share has already, or an infinite one, is left out."""
    found: dict[float, float] = {}
    for share in shares:
        value = reached_by(curves, share)
        if math.isfinite(value) and value not in found.values():
            found[share] = value
    return found


@dataclass(frozen=True)
class Speedup:
    """How many times fewer images a method needs than the baseline: 2 is half the images.

    ratio: geometric mean over seeds and targets of images(baseline) / images(method). low, high: a percentile bootstrap
    over seeds, None for a single seed. seeds: those that both have. targets, at_targets: values, and the geometric mean
    over seeds at each. censored: (seed, target) pairs that the method never reached; censored_baseline: the baseline.
    A pair never reached counts with all images of its curve, which makes ratio, low and high bounds. at_start: pairs
    met at a curve's first point, by either method: their time is only known to be no longer.
    """

    ratio: float
    low: float | None
    high: float | None
    seeds: tuple[int, ...]
    targets: tuple[float, ...]
    at_targets: tuple[float, ...]
    censored: int = 0
    censored_baseline: int = 0
    at_start: int = 0

    @property
    def bound(self) -> str:
        """'<' where the method never reached a target, '>' where the baseline did not, '?' for both, '' for neither."""
        if self.censored and self.censored_baseline:
            return "?"
        return "<" if self.censored else ">" if self.censored_baseline else ""

    def __str__(self) -> str:
        """Such as '1.84' or '< 0.71'."""
        return f"{self.bound} {self.ratio:.2f}".strip()


def speedup(
    baseline: Mapping[int, Curve],
    other: Mapping[int, Curve],
    targets: Sequence[float] | None = None,
    *,
    shares: Sequence[float] = SHARES,
    resamples: int = 2000,
    level: float = 0.95,
) -> Speedup:
    """Compare the curves of two methods, each seed -> curve, over the seeds that both have.

    targets: values to reach; without them, those that all the baseline's curves reach after `shares` of their images.
    The interval resamples seeds: all n^n resamples of up to 5, `resamples` random ones of more. With few seeds a
    percentile interval is too narrow (Efron and Tibshirani 1993, chapter 13): read it beside the number of seeds.
    Raises ShapeError without a common seed or a target.
    """
    seeds = tuple(sorted(set(baseline) & set(other)))
    if not seeds:
        raise ShapeError(f"no seed in common: the baseline has {sorted(baseline)}, the other method {sorted(other)}")
    goals = tuple(targets_of([baseline[seed] for seed in seeds], shares).values() if targets is None else targets)
    if not goals:
        raise ShapeError("no target to reach: the baseline has no finite value")
    slow, fast = (_images_to(curves, seeds, goals) for curves in (baseline, other))
    logs = slow[..., 0].log() - fast[..., 0].log()
    low, high = _interval(logs.mean(1), resamples, level)
    return Speedup(
        ratio=math.exp(float(logs.mean())),
        low=low,
        high=high,
        seeds=seeds,
        targets=goals,
        at_targets=tuple(logs.mean(0).exp().tolist()),
        censored=int(fast[..., 1].sum()),
        censored_baseline=int(slow[..., 1].sum()),
        at_start=sum(
            time_to(curves[seed], goal) == curves[seed][0][0]
            for curves in (baseline, other)
            for seed in seeds
            for goal in goals
        ),
    )


def _images_to(curves: Mapping[int, Curve], seeds: Sequence[int], targets: Sequence[float]) -> Tensor:
    """(n, targets, 2) of each seed: images to the target and 0, or the whole curve's images and 1."""
    times = [[(curves[seed], time_to(curves[seed], target)) for target in targets] for seed in seeds]
    rows = [[(curve[-1][0], 1) if time is None else (time, 0) for curve, time in row] for row in times]
    return torch.tensor(rows, dtype=torch.float64)


def _interval(values: Tensor, resamples: int, level: float) -> tuple[float | None, float | None]:
    """Percentiles of exp(mean) over resamples of `values` (n,)."""
    n = len(values)
    if n < 2:
        return None, None
    if n <= _ENUMERATED:
        chosen = torch.tensor(list(product(range(n), repeat=n)))
    else:
        chosen = (Draws(0, 0, torch.arange(resamples)).uniform(0, (n,)) * n).long().clamp(max=n - 1)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(values[chosen].mean(1), tails).exp().tolist()
    return low, high


@dataclass(frozen=True)
class MeanCurve:
    """Several curves as one: at each number of images the mean, geometric where all are positive, and the extremes."""

    images: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def mean_curve(curves: Sequence[Curve]) -> MeanCurve:
    """Mean and spread at every number of images that some curve has and none ends before or starts after.

    Between its points a curve is interpolated; values that are not finite are left out.
    """
    kept = [[(x, y) for x, y in curve if math.isfinite(y)] for curve in curves]
    if not all(kept):
        return MeanCurve((), (), (), ())
    first, last = max(curve[0][0] for curve in kept), min(curve[-1][0] for curve in kept)
    images = sorted({x for curve in kept for x, _ in curve if first <= x <= last})
    positive = all(y > 0 for curve in kept for _, y in curve)
    rows = torch.tensor([[_value_at(curve, x, positive) for x in images] for curve in kept], dtype=torch.float64)
    mean = rows.log().mean(0).exp() if positive else rows.mean(0)
    low, high = rows.min(0).values if images else mean, rows.max(0).values if images else mean
    return MeanCurve(tuple(images), tuple(mean.tolist()), tuple(low.tolist()), tuple(high.tolist()))


def _value_at(curve: Curve, images: float, positive: bool) -> float:
    """The curve's value between its points: log(value) linear in images, or value itself where not all are positive."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 < images < x1:
            share = (images - x0) / (x1 - x0)
            return y0 * (y1 / y0) ** share if positive else y0 + share * (y1 - y0)
    return next(y for x, y in curve if x == images)
