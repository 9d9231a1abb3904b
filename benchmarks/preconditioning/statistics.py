"""Are the statistics of a closed-form denoiser what they should be, within the errors they state? (math.md §3.2)

The mixture of Gaussians in 16 dimensions, `estimate_statistics` with its defaults for several seeds, against a
reference that shares no code with it: fresh samples and many more of them, the trace of the Jacobian written out, and s
as half the rate at which log E|r|^2 grows, since the flow keeps the marginals:

    d/dlambda E|r|^2 = 2 E<r, dr/dlambda>    so    s = d log E|r|^2 / dlambda / 2

by differences of fourth order over a tenth of the grid's step: no derivative of the denoiser, none of l. Differences
are in units of both stated errors together, their mean square 1 where those are honest; levels of one seed share their
samples, so that their scores go together. A test repeats the first seed of what is stored.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, Row, markdown
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.flow.closed_form import MixtureData, toy_mixture
from fewstep.flow.paths import EDM
from fewstep.flow.preconditioning.estimation import EstimationSettings, estimate_statistics
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics

CHECKED = RESULTS / "statistics_check.json"
BANDS = (80.0, 12.0, 2.0, 0.3, 0.06, 0.03, 0.0)
BLOCKS = 32
CHUNK = 16_384
# Weights of f(-2h), f(-h), f(h), f(2h) in 12 h f'(0), to fourth order.
DIFFERENCE = (1.0, -8.0, 8.0, -1.0)


@dataclass(frozen=True)
class Reference:
    """l and s with standard errors, each (points,) float64."""

    l: Tensor  # noqa: E741  (math.md §3.1)
    s: Tensor
    l_stderr: Tensor
    s_stderr: Tensor


def moments(data: MixtureData, x: Tensor, t: float) -> Tensor:
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


def portions(data: MixtureData, samples: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """x0 and eps (n, d), a portion at a time; by torch's own generator, not by the library's random numbers."""
    generator, d = torch.Generator().manual_seed(seed), data.means.shape[1]
    for first in range(0, samples, CHUNK):
        count = min(CHUNK, samples - first)
        chosen = torch.multinomial(data.weights, count, replacement=True, generator=generator)
        noise = torch.randn(2, count, d, dtype=torch.float64, generator=generator)
        yield data.means[chosen] + data.sds[chosen, None] * noise[0], noise[1]


def reference(data: MixtureData, lam: Tensor, h: float, draws: Iterable[tuple[Tensor, Tensor]]) -> Reference:
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
    return Reference(best[0], best[1], errors[0], errors[1])


def solve(means: Tensor, h: float) -> Tensor:
    """(2, points): l and s from the means of the `moments` (points, 5, 4) at five levels around each."""
    trace, dd, dc, cc = means.unbind(-1)
    growth = torch.log(dd - 2 * trace * dc + trace * trace * cc)[:, [0, 1, 3, 4]]
    rate = (growth * growth.new_tensor(DIFFERENCE)).sum(1) / (12 * h)
    return torch.stack([trace[:, 2], rate / 2])


def scores(found: TrajectoryStatistics, truth: Reference) -> tuple[Tensor, Tensor]:
    """Differences of l and of s in units of both stated errors together, each (points,)."""
    of_l = (found.l - truth.l) / torch.hypot(found.l_stderr, truth.l_stderr)
    return of_l, (found.s - truth.s) / torch.hypot(found.s_stderr, truth.s_stderr)


def estimate(
    data: MixtureData, rows: Tensor, samples: int, seed: int, probes: int | None = None
) -> TrajectoryStatistics:
    """What is checked: the library's estimate, about the exact mean, not shrunk."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return data.denoise(EDM(), x, t)

    mean = data.weights @ data.means
    return estimate_statistics(
        denoise, rows, settings=EstimationSettings(samples=samples, seed=seed, probes=probes, shrink=False), mean=mean
    )


def rows_of(seed: int, found: TrajectoryStatistics, truth: Reference) -> list[Row]:
    """A row for every level."""
    of_l, of_s = scores(found, truth)
    columns = {
        "noise": found.tau, "l": found.l, "l_stderr": found.l_stderr, "l_reference": truth.l,
        "l_reference_stderr": truth.l_stderr, "l_score": of_l, "s": found.s, "s_stderr": found.s_stderr,
        "s_reference": truth.s, "s_reference_stderr": truth.s_stderr, "s_score": of_s,
    }  # fmt: skip
    tables = {name: values.tolist() for name, values in columns.items()}
    return [
        {"seed": seed, **{name: float(f"{values[i]:.6g}") for name, values in tables.items()}}
        for i in range(len(found.lam))
    ]


def checked(seeds: tuple[int, ...], samples: int, reference_samples: int) -> list[Row]:
    """A row for every seed and level."""
    data, train = toy_mixture(), load_dataset(DataConfig(source="mixture")).train
    x0 = train.fetch(torch.arange(len(train)))[0].double().flatten(1)
    estimates = {seed: estimate(data, x0, samples, seed) for seed in seeds}
    lam = next(iter(estimates.values())).lam
    truth = reference(data, lam, float(lam[1] - lam[0]) / 10, portions(data, reference_samples, seed=1))
    return [row for seed, found in estimates.items() for row in rows_of(seed, found, truth)]


def table(rows: list[Row]) -> str:
    """Root mean square and largest score of every band, over all seeds."""
    lines = []
    for high, low in pairwise(BANDS):
        own = [row for row in rows if low <= row["noise"] < high * 1.001]
        scores = [torch.tensor([row[name] for row in own]) for name in ("l_score", "s_score")]
        shown = [f"{float(value):.2f}" for each in scores for value in (each.square().mean().sqrt(), each.abs().max())]
        lines.append((f"{high:g} to {low or 0.002:g}", *shown))
    return markdown(("noise", "`l`", "", "`s`", ""), lines)
