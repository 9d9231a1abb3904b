"""How close one set of features is to another, and how often a sample is of the class that was asked for.

Every distance takes features (n, d) as an `Extractor` gives them, works in float64, and says nothing about which
extractor that was: a figure without its extractor's name means nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.utils.errors import ShapeError
from fewstep.utils.random import permutation

_CHUNK_ELEMENTS = 1 << 18  # pairwise values held at once: 2 MiB of float64, which stay in cache


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared 2-Wasserstein distance between the Gaussians fitted to features a (n, d) and b (m, d).

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S with the unbiased 1 / (n - 1) (Heusel et al. 2017, eq. 6).
    With S = R^T R from a QR decomposition, the last trace is the sum of the singular values of R_a R_b^T. This takes
    no square root of a rounding error, so it stays exact to about 1e-14 when a covariance is singular.
    It is biased upwards at small n: compare only figures of equal sample counts.
    Raises ShapeError unless both are finite, of one dimension, with at least 2 samples.
    """
    a, b = _check_features(a, b, minimum=2)
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    squared = (a.mean(0) - b.mean(0)).square().sum() + root_a.square().sum() + root_b.square().sum() - 2.0 * cross
    return max(float(squared), 0.0)


def _covariance_root(x: Tensor) -> Tensor:
    """R (min(n, d), d) with R^T R the unbiased covariance of x (n, d)."""
    upper: Tensor = torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R
    return upper


@dataclass(frozen=True)
class KernelDistance:
    """An estimate of the squared kernel distance; it may be slightly negative, as an unbiased estimate of 0 must.

    standard_error: of `value`. subset_size: samples of each set in one estimate, None for the whole sets.
    subsets: how many estimates `value` is the mean of.
    """

    value: float
    standard_error: float
    subset_size: int | None
    subsets: int


def kernel_distance(a: Tensor, b: Tensor, subset_size: int | None = None, seed: int = 0) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy of a (n, d) and b (m, d) under k(x, y) = (x.y / d + 1)^3.

    mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j) (Binkowski et al. 2018).
    Without `subset_size` it uses every pair, with the standard error of the U-statistic's first-order projection
    (Sutherland et al. 2017), which is on the large side where the distance is 0. With `subset_size` it averages
    over disjoint random subsets, as many as fit, so that their spread gives an honest standard error; the paper's
    overlapping subsets would not.
    Raises ShapeError on unfit features, fewer than 2 samples, or where fewer than 2 subsets fit.
    """
    a, b = _check_features(a, b, minimum=2)
    if subset_size is None:
        value, variance = _squared_discrepancy(a, b)
        return KernelDistance(value, math.sqrt(variance), None, 1)
    subsets = min(len(a), len(b)) // subset_size if subset_size >= 2 else 0
    if subsets < 2:
        raise ShapeError(
            f"subset_size {subset_size} does not give two subsets of two or more out of {len(a)} and {len(b)} samples: "
            f"choose from 2 to {min(len(a), len(b)) // 2}, or None for the whole sets"
        )
    parts_a = permutation(seed, 0, len(a))[: subsets * subset_size].reshape(subsets, subset_size)
    parts_b = permutation(seed, 1, len(b))[: subsets * subset_size].reshape(subsets, subset_size)
    values = torch.tensor(
        [_squared_discrepancy(a[i], b[j])[0] for i, j in zip(parts_a, parts_b, strict=True)], dtype=torch.float64
    )
    return KernelDistance(float(values.mean()), float(values.std()) / math.sqrt(subsets), subset_size, subsets)


def _squared_discrepancy(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The unbiased estimate over all pairs, and the variance of its first-order projection."""
    within_a = (_kernel_sums(a, a)[0] - _cubic(a.square().sum(1), a.shape[1])) / (len(a) - 1)
    within_b = (_kernel_sums(b, b)[0] - _cubic(b.square().sum(1), b.shape[1])) / (len(b) - 1)
    sums_a, sums_b = _kernel_sums(a, b)
    value = within_a.mean() + within_b.mean() - 2.0 * sums_a.mean() / len(b)
    variance = 4.0 * (within_a - sums_a / len(b)).var() / len(a) + 4.0 * (within_b - sums_b / len(a)).var() / len(b)
    return float(value), float(variance)


def _cubic(products: Tensor, dimension: int) -> Tensor:
    shifted = products / dimension + 1.0
    return shifted * shifted * shifted


def _kernel_sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j k(a_i, b_j), shape (n,), and sum_i k(a_i, b_j), shape (m,)."""
    of_rows, of_columns = [], torch.zeros_like(b[:, 0])
    for rows in _row_chunks(a, len(b)):
        kernel = _cubic(rows @ b.T, b.shape[1])
        of_rows.append(kernel.sum(1))
        of_columns += kernel.sum(0)
    return torch.cat(of_rows), of_columns


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall of fake (m, d) against real (n, d) by k-nearest-neighbour balls (Kynkaanniemi et al. 2019).

    Precision is the share of fakes inside a ball around some real sample, the ball reaching to that sample's k-th
    nearest other real sample; recall is the same with the sets exchanged. Both depend on n and m: state them. Wherever
    the features lie, distances are taken about their common mean; below 1e-6 of the spread about it they count as 0.
    Raises ShapeError on unfit features, or unless both sets have more than k >= 1 samples.
    """
    if k < 1:
        raise ShapeError(f"k must be at least 1, not {k}")
    real, fake = _check_features(real, fake, minimum=k + 1)
    centre = torch.cat([real, fake]).mean(0)
    real, fake = real - centre, fake - centre
    return _coverage(real, fake, k), _coverage(fake, real, k)


def _coverage(centres: Tensor, queries: Tensor, k: int) -> float:
    """Share of queries within some centre's distance to its k-th nearest other centre."""
    radii = torch.cat([_neighbour_distance(rows, centres, k) for rows in _row_chunks(centres, len(centres))])
    inside = [(_squared_distances(rows, centres) <= radii).any(1) for rows in _row_chunks(queries, len(centres))]
    return float(torch.cat(inside).double().mean())


def _neighbour_distance(a: Tensor, b: Tensor, k: int) -> Tensor:
    """Squared distance of each row of a, itself one of b, to its k-th nearest other row of b: (n,)."""
    return _squared_distances(a, b).topk(k + 1, largest=False).values[:, -1]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 (n, m); what is below its rounding error is 0, so that a repeated sample lies in its own ball."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    squared = torch.addmm(norms, a, b.T, alpha=-2.0)
    return torch.where(squared > 1e-12 * norms, squared, 0.0)


def class_accuracy(predicted: Tensor, intended: Tensor) -> float:
    """Share of samples whose predicted class (n,) is the intended one (n,).

    Raises ShapeError when empty, of different shapes, or when a sample had no intended class (a negative label).
    """
    if predicted.ndim != 1 or predicted.shape != intended.shape or len(predicted) == 0:
        raise ShapeError(
            f"predicted {tuple(predicted.shape)} and intended {tuple(intended.shape)} classes must be one number "
            f"per sample, for at least one sample"
        )
    if bool((intended < 0).any()):
        raise ShapeError("some samples were drawn without a class: accuracy is defined only where every one had one")
    return float((predicted.to(intended.device) == intended).double().mean())


def _row_chunks(a: Tensor, columns: int) -> Iterator[Tensor]:
    """Rows of a, few enough at once that a (rows, columns) table stays small."""
    yield from torch.split(a, max(64, _CHUNK_ELEMENTS // columns))


def _check_features(a: Tensor, b: Tensor, minimum: int) -> tuple[Tensor, Tensor]:
    """Both as float64 on one device; raises ShapeError when they cannot be compared."""
    for name, x in (("first", a), ("second", b)):
        if x.ndim != 2 or len(x) < minimum or x.shape[1] == 0:
            raise ShapeError(
                f"the {name} set of features has shape {tuple(x.shape)}: need (n, d) with n >= {minimum} and d >= 1"
            )
        if not bool(torch.isfinite(x).all()):
            raise ShapeError(f"the {name} set of features holds NaN or infinity: were the images finite?")
    if a.shape[1] != b.shape[1]:
        raise ShapeError(f"features of {a.shape[1]} and {b.shape[1]} dimensions: use one extractor for both sets")
    return a.double(), b.to(a.device).double()
