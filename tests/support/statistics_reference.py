"""l and s of a mixture of Gaussians by another way than the library's (math.md §3.2), and the estimate held against it.

Fresh samples, the trace of the Jacobian written out, and s as half the rate at which log E|r|^2 grows, since the flow
keeps the marginals:

    d/dlambda E|r|^2 = 2 E<r, dr/dlambda>    so    s = d log E|r|^2 / dlambda / 2

by differences of fourth order: no derivative of the denoiser, none of l.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import fewstep as fs

BLOCKS = 32
CHUNK = 16_384
# Weights of f(-2h), f(-h), f(h), f(2h) in 12 h f'(0), to fourth order.
DIFFERENCE = (1.0, -8.0, 8.0, -1.0)


class Reference(NamedTuple):
    """l and s with standard errors, each (points,) float64."""

    l: Tensor  # noqa: E741  (math.md §3.1)
    s: Tensor
    l_stderr: Tensor
    s_stderr: Tensor


def moments(data: fs.MixtureData, x: Tensor, t: float) -> Tensor:
    """(4, B): tr J_D/dim, and |D - m|^2, <D - m, x - m>, |x - m|^2 per dimension, of x (B, d) at noise level t.

    With p_k the posterior, e_k = mu_k + a_k (x - mu_k), a_k = sd_k^2/v_k, v_k = sd_k^2 + t^2 and the components' scores
    q_k = -(x - mu_k)/v_k: D = sum p_k e_k and tr J_D = sum p_k (d a_k + <e_k, q_k - sum_j p_j q_j>).
    """
    d, means, mean = x.shape[1], data.means, data.weights @ data.means
    variance = data.sds.square() + t * t
    gain, squares = data.sds.square() / variance, x.square().sum(1, keepdim=True)
    products, norms = x @ means.T, means.square().sum(1)
    log_density = -(squares - 2 * products + norms) / (2 * variance) - d / 2 * torch.log(variance)
    posterior = torch.softmax(torch.log(data.weights) + log_density, dim=1)
    denoised = (posterior * (1 - gain)) @ means + (posterior * gain).sum(1, keepdim=True) * x
    score = (posterior / variance) @ means - (posterior / variance).sum(1, keepdim=True) * x
    along = ((1 - gain) * (norms - products) - gain * (squares - products)) / variance
    trace = (posterior * (d * gain + along)).sum(1) - (denoised * score).sum(1)
    c, r = x - mean, denoised - mean
    return torch.stack([trace, r.square().sum(1), (r * c).sum(1), c.square().sum(1)]) / d


def portions(data: fs.MixtureData, samples: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """x0 and eps (n, d), a portion at a time; by torch's own generator, not by the library's random numbers."""
    generator, d = torch.Generator().manual_seed(seed), data.means.shape[1]
    for first in range(0, samples, CHUNK):
        count = min(CHUNK, samples - first)
        chosen = torch.multinomial(data.weights, count, replacement=True, generator=generator)
        noise = torch.randn(2, count, d, dtype=torch.float64, generator=generator)
        yield data.means[chosen] + data.sds[chosen, None] * noise[0], noise[1]


def reference(data: fs.MixtureData, lam: Tensor, h: float, draws: Iterable[tuple[Tensor, Tensor]]) -> Reference:
    """l and s at `lam`, s by differences over h, from portions of (x0, eps), each of a multiple of BLOCKS samples.

    Errors by leaving out one of BLOCKS blocks at a time.
    """
    sums, count = torch.zeros(len(lam), 5, 4, BLOCKS, dtype=torch.float64), 0
    for x0, eps in draws:
        count += len(x0)
        for i, level in enumerate(lam.tolist()):
            for j in range(5):
                tau = math.exp(-(level + (j - 2) * h))
                sums[i, j] += moments(data, x0 + tau * eps, tau).reshape(4, BLOCKS, -1).sum(2)
    best, share = solve(sums.sum(-1) / count, h), (BLOCKS - 1) / BLOCKS
    left_out = [solve((sums.sum(-1) - sums[..., block]) / (count * share), h) for block in range(BLOCKS)]
    errors = (BLOCKS - 1) / math.sqrt(BLOCKS) * torch.stack(left_out).std(0)
    return Reference(*best, *errors)


def solve(means: Tensor, h: float) -> Tensor:
    """(2, points): l and s from the means of the `moments` (points, 5, 4) at five levels around each."""
    trace, dd, dc, cc = means.unbind(-1)
    growth = torch.log(dd - 2 * trace * dc + trace * trace * cc)[:, [0, 1, 3, 4]]
    rate = (growth * growth.new_tensor(DIFFERENCE)).sum(1) / (12 * h)
    return torch.stack([trace[:, 2], rate / 2])


def estimate(
    data: fs.MixtureData, rows: Tensor, samples: int, seed: int, probes: int | None = None
) -> fs.TrajectoryStatistics:
    """What is checked: the library's estimate, about the exact mean, not shrunk."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return data.denoise(fs.EDM(), x, t)

    mean = data.weights @ data.means
    return fs.estimate_statistics(
        denoise,
        rows,
        settings=fs.EstimationSettings(samples=samples, seed=seed, probes=probes, shrink=False),
        mean=mean,
    )
