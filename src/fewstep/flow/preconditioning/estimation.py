"""Estimating l and s from a denoiser in one pass over the data (math.md §3.2), with standard errors.

On the EDM coordinate y = x0 + tau eps, lambda = -log tau, with a fixed origin m:
  c = y - m,  d = D - m,  k = x0 - m,  u = dy/dlambda = D - y,  w = dD/dlambda = J_D u + d_lambda D.
For any l the residual r = d - l c has dr/dlambda = w - l' c - l u, so that sums of the products of c, d, k, u, w give
l, s for that l, s for l = 0, and how far the denoiser's own error reaches into them. Memory does not grow with the
number of samples. Every noise level sees the same (x0, eps), so that estimates are smooth in lambda.
"""

import math
import time
import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, final, get_args

import torch
from torch import Tensor

from fewstep.flow.derivatives import DerivativeKind, no_forward_mode
from fewstep.flow.paths import EDM, Path
from fewstep.flow.preconditioning.interpolation import derivative, widths
from fewstep.flow.preconditioning.statistics import HIGH_NOISE, TrajectoryStatistics
from fewstep.flow.preconditioning.tangents import DenoiserTangents, PlainDenoiser
from fewstep.utils.errors import ConfigError, FewstepWarning, ShapeError
from fewstep.utils.random import Draws, shuffled_rows
from fewstep.utils.tensors import expand

FedData = Tensor | Callable[[Tensor], Tensor]

STREAM_NOISE, STREAM_PROBES = 1, 2
LOWEST_TAU, HIGHEST_TAU = 0.002, 80.0
EXACT_DIMENSION = 64
BLOCKS = 32


Moments = namedtuple("Moments", "number trace a p q ap aq pp pq qq dd dc cc dw cw du cu ww wu uu kd kc")
"""Means over the samples, per element of a sample: products of c, d, k, u, w, and what the trace needs.

number: 1, so that its sum counts. trace: tr J_D by probes. a = <eps, d>/tau, and its companions of mean zero
p = <eps, k>/tau, q = |eps|^2 - 1. kd, kc: <k, d> and <k, c>, at high noise by a difference of the same mean.
"""


class Estimate(NamedTuple):
    """Everything that is solved for from the moments, (..., points) each.

    credit = <x0 - m - l c, r>/|r|^2; drift = |dr/dlambda - limit r|^2/|r|^2. plain: for l = 0. coarse: s with an l' of
    lower order.
    """

    l: Tensor  # noqa: E741  (math.md §3.1)
    s: Tensor
    credit: Tensor
    drift: Tensor
    plain_s: Tensor
    plain_credit: Tensor
    plain_drift: Tensor
    coarse: Tensor


def stein_trace(m: Moments) -> Tensor:
    """E[tr J_D]/dim from the noise alone: E<eps, D>/tau (Stein's identity), no derivative of the denoiser.

    Its variance is cut by regression on p and q, whose means are known to be zero: subtracting beta p is replacing D by
    D - m - beta (x0 - m). Regression adds a bias of order 1/samples. Exact for isotropic Gaussian data; elsewhere its
    error falls with the noise slower than 1 - l, and with it s is lost at low noise (on a mixture of deviation 0.5,
    below 0.1): take a probe where that matters.
    """
    pp, pq, qq = m.pp - m.p * m.p, m.pq - m.p * m.q, m.qq - m.q * m.q
    ap, aq = m.ap - m.a * m.p, m.aq - m.a * m.q
    determinant = pp * qq - pq * pq
    sound = determinant > 1e-12 * pp * qq
    over = torch.where(sound, determinant, 1.0)
    of_p = torch.where(sound, (ap * qq - aq * pq) / over, 0.0)
    of_q = torch.where(sound, (aq * pp - ap * pq) / over, 0.0)
    trace: Tensor = m.a - of_p * m.p - of_q * m.q
    return trace


def rate_estimate(
    m: Moments,
    l: Tensor | float,  # noqa: E741
    l_slope: Tensor | float,
    limit: float,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(s, credit, drift): s = E<r, dr/dlambda>/E|r|^2 for r = d - l c.

    Where E|r|^2 is below `floor` of its parts, which is rounding, s is 0.
    """
    rr = m.dd - 2 * l * m.dc + l * l * m.cc
    null = rr <= floor * (m.dd + l * l * m.cc)
    over = torch.where(null, 1.0, rr)
    forward = m.dw - l_slope * m.dc - l * (m.du + m.cw) + l * l_slope * m.cc + l * l * m.cu
    square = m.ww + l_slope * l_slope * m.cc + l * l * m.uu - 2 * l_slope * m.cw - 2 * l * (m.wu - l_slope * m.cu)
    s = torch.where(null, 0.0, forward / over)
    credit = torch.where(null, 1.0, (m.kd - l * (m.kc + m.dc) + l * l * m.cc) / over)
    drift = torch.where(null, 0.0, square / over - 2 * limit * s + limit**2)
    return s, credit, drift.clamp(min=0)


@final
@dataclass(frozen=True)
class EstimationSettings:
    """How statistics are estimated. Raises ConfigError for what does not suffice.

    points: noise levels, evenly spaced in lambda. samples: at each. seed: of their choice, their noise and the probes.
    probes: None for the exact trace up to 64 dimensions and one Rademacher probe beyond; 0 for Stein's identity.
    centred: about the data's mean. batch_size: samples that pass the denoiser at once. shrink: draw l and s to their
    limits at high noise (TrajectoryStatistics.shrunk). derivative: None for the exact one, by forward mode, where a
    probe finds that it works, and differences, with a FewstepWarning, where it does not.
    """

    points: int = 120
    samples: int = 256
    seed: int = 0
    probes: int | None = 1
    centred: bool = True
    batch_size: int = 512
    shrink: bool = True
    derivative: DerivativeKind | None = None

    def __post_init__(self) -> None:
        if self.points < 3 or self.samples < 2 or self.batch_size < 1 or (self.probes is not None and self.probes < 0):
            raise ConfigError(
                "statistics need points >= 3, samples >= 2, probes >= 0 and batch_size >= 1, got "
                f"{self.points}, {self.samples}, {self.probes} and {self.batch_size}"
            )
        if self.derivative not in (None, *get_args(DerivativeKind)):
            raise ConfigError(f"derivative is {self.derivative!r}: give exact, finite-difference or None")


class StatisticsEstimator:
    """Sums over samples, fed in any order and portions; `statistics` solves for l and s at any time.

    denoiser: (x (B, ...), t (B,)) -> (B, ...) in the coordinates and clock of `path`. data: tensor (n, ...), cycled
    in a shuffled order of every epoch, or a function from sample numbers (B,) in [0, samples) to x0 (B, ...).
    settings: the points cover the path's range held within [0.002, 80]. mean: what centred statistics are about;
    measured on the data unless given. Runs on `device`, by default the data's.

    sums (points, blocks, moments) float64 is all the state there is: processes that feed disjoint portions may
    add theirs up, and `state`/`restore` carry it over an interruption.
    """

    def __init__(
        self,
        denoiser: PlainDenoiser,
        data: FedData,
        path: Path = EDM(),
        settings: EstimationSettings = EstimationSettings(),
        *,
        mean: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.denoiser, self.data, self.path = denoiser, data, path
        self.samples, self.seed = settings.samples, settings.seed
        self.device = device or (data.device if isinstance(data, Tensor) else torch.device("cpu"))
        first = self._rows(torch.zeros(1, dtype=torch.int64))
        self.shape, self.dtype, self.dimension = tuple(first.shape[1:]), first.dtype, first[0].numel()
        if not self.dtype.is_floating_point or self.dimension == 0:
            raise ShapeError(f"data must be floating-point samples (n, ...), got {self.dtype} of shape {self.shape}")
        self.probes = 1 if settings.probes is None and self.dimension > EXACT_DIMENSION else settings.probes
        measured, self.sigma_data = self._measured()
        self.data_mean = (measured if mean is None else mean).to(self.device, torch.float64)
        if self.data_mean.shape != self.shape:
            raise ShapeError(f"mean has shape {tuple(self.data_mean.shape)}, samples have {self.shape}")
        self.origin = self.data_mean if settings.centred else torch.zeros_like(self.data_mean)
        self.limit = 1.0 if settings.centred or float(measured.square().mean()) <= 0.01 * self.sigma_data**2 else 0.0
        self.lam = noise_grid(path, settings.points)
        self.sums = torch.zeros(settings.points, min(BLOCKS, self.samples), len(Moments._fields), dtype=torch.float64)
        self.sums = self.sums.to(self.device)
        ends = math.exp(-float(self.lam[-1])), math.exp(-float(self.lam[0]))
        self.tangents = DenoiserTangents(self._denoise, ends, settings.derivative or "exact")
        if settings.derivative is None:
            self._probe()

    def _probe(self) -> None:
        """Take differences, with a FewstepWarning, where forward mode fails at the data's own noise level."""
        numbers = torch.arange(2, device=self.device)
        x0, eps = self._rows(numbers), Draws(self.seed, 0, numbers).normal(STREAM_NOISE, self.shape, self.dtype)
        tau = torch.full((2,), self.sigma_data, dtype=torch.float64, device=self.device).clamp(*self.tangents.ends)
        if reason := self.tangents.fault(x0 + expand(tau, x0).to(x0.dtype) * eps, tau):
            warnings.warn(no_forward_mode(reason), FewstepWarning, stacklevel=3)
            self.tangents = replace(self.tangents, kind="finite-difference")

    @property
    def seen(self) -> int:
        """Number of samples fed so far."""
        return int(self.sums[0, :, 0].sum())

    def update(self, first: int, count: int) -> None:
        """Feed the samples numbered first .. first + count - 1."""
        numbers = torch.arange(first, first + count, device=self.device)
        draws = Draws(self.seed, 0, numbers)
        x0, eps = self._rows(numbers), draws.normal(STREAM_NOISE, self.shape, self.dtype)
        block = numbers % self.sums.shape[1]
        with torch.no_grad():
            probes = self._probes(draws, eps)
            for i, lam in enumerate(self.lam.tolist()):
                tau = torch.full((count,), math.exp(-lam), dtype=torch.float64, device=self.device)
                self.sums[i].index_add_(0, block, self._moments(x0, eps, tau, probes))

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs; a copy."""
        return {"sums": self.sums.cpu().clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a stored state; raises ConfigError when it belongs to other points or blocks."""
        if state.get("sums") is None or state["sums"].shape != self.sums.shape:
            raise ConfigError("this state of the estimation belongs to other settings: points or samples differ")
        self.sums = state["sums"].to(self.sums)

    def statistics(self, seconds: float = 0.0) -> TrajectoryStatistics:
        """l and s with standard errors by leaving out one block at a time, not shrunk; raises ConfigError when fewer
        than two blocks have samples or a moment is not finite.

        l' is taken by differences over the grid: how much s moves when they are of lower order is part of s_stderr.

        s_bias: with D_hat = D + e, the truth's regression on the residual, credit = E<x0 - m - l c, r>/E|r|^2, is 1 for
        the exact denoiser and the signal's share in r where e is uncorrelated with it. By Cauchy and Schwarz e moves s
        away from its high-noise limit by at most sqrt((1 - credit) drift). 1 - credit counts as far as it exceeds twice
        its standard error, by the rule of TrajectoryStatistics.shrunk, and never falls as the noise rises. Below
        HIGH_NOISE deviations of the data it is not estimated, and 0.
        """
        sums = self.sums.cpu()
        sums = sums[:, sums[0, :, 0] > 0]
        if sums.shape[1] < 2:
            raise ConfigError("statistics need at least 2 samples to tell their own error: feed more")
        if not bool(sums.isfinite().all()):
            tau = math.exp(-float(self.lam[int((~sums.isfinite()).any(-1).any(-1).nonzero()[0])]))
            raise ConfigError(f"the denoiser or its derivative is not finite at noise level {tau:g}")
        total = sums.sum(1)
        best = self._solve(total)
        error = _jackknife(self._solve((total[:, None] - sums).transpose(0, 1)))
        high = torch.exp(-self.lam) > HIGH_NOISE * self.sigma_data
        return TrajectoryStatistics(
            lam=self.lam,
            l=best.l,
            s=best.s,
            l_stderr=error.l,
            s_stderr=torch.hypot(error.s, best.s - best.coarse),
            s_bias=_bias(best.credit, best.drift, error.credit, high),
            s_without_l=best.plain_s,
            s_without_l_stderr=error.plain_s,
            s_without_l_bias=_bias(best.plain_credit, best.plain_drift, error.plain_credit, high),
            mean=self.origin.cpu(),
            sigma_data=self.sigma_data,
            limit=self.limit,
            samples=int(total[0, 0]),
            seed=self.seed,
            probes=self.probes,
            seconds=seconds,
            derivative=self.tangents.kind,
        )

    def _solve(self, sums: Tensor) -> Estimate:
        """From sums (..., points, moments)."""
        moments = Moments(*(sums / sums[..., :1]).unbind(-1))
        step = float(self.lam[-1] - self.lam[0]) / (len(self.lam) - 1)
        floor = max((10 * torch.finfo(self.dtype).eps) ** 2, 64 * torch.finfo(torch.float64).eps)
        l = stein_trace(moments) if self.probes == 0 else moments.trace  # noqa: E741
        fine, coarse = (
            rate_estimate(moments, l, derivative(l, step, width), self.limit, floor) for width in widths(step)
        )
        return Estimate(l, *fine, *rate_estimate(moments, 0.0, 0.0, self.limit, floor), coarse[0])

    def _moments(self, x0: Tensor, eps: Tensor, tau: Tensor, probes: list[Tensor]) -> Tensor:
        """Moments of every sample at its noise level, (B, moments) float64."""
        y = x0 + expand(tau, x0).to(x0.dtype) * eps
        trace, denoised = self._trace(y, tau, probes)
        moved = denoised - y
        change = self.tangents.change(y, tau, moved)
        noise, w, u = eps.double(), change.double(), moved.double()
        c, d, k = y.double() - self.origin, denoised.double() - self.origin, x0.double() - self.origin
        a, p, q = _dot(noise, d) / tau, _dot(noise, k) / tau, _dot(noise, noise) - 1
        companions = (a, p, q, a * p, a * q, p * p, p * q, q * q)
        pairs = ((d, d), (d, c), (c, c), (d, w), (c, w), (d, u), (c, u), (w, w), (w, u), (u, u))
        truth = self._truth(x0.double(), eps, tau, d, c)
        return torch.stack([torch.ones_like(tau), trace, *companions, *(_dot(*pair) for pair in pairs), *truth], dim=1)

    def _truth(self, x0: Tensor, eps: Tensor, tau: Tensor, d: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates of E<k, d> and E<k, c>, (B,) each.

        At high noise d hardly depends on x0, and <k, d> is all noise; <k, d - d'> with d' at the data's mean under the
        same eps has the same mean (x0 and eps are independent) and hardly any.
        """
        if float(tau[0]) <= HIGH_NOISE * self.sigma_data:
            return _dot(x0 - self.origin, d), _dot(x0 - self.origin, c)
        bare = (self.data_mean + expand(tau, x0) * eps.double()).to(eps.dtype)
        known = self._denoise(bare, tau).double() - self.origin
        k, shift = x0 - self.data_mean, (self.data_mean - self.origin).expand_as(x0)
        return _dot(k, d - known) + _dot(shift, d), _dot(k, k) + _dot(shift, c)

    def _trace(self, y: Tensor, tau: Tensor, probes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(tr J_D/dim (B,), D) at y and tau; the trace is 0 where no probe is used."""
        trace = torch.zeros_like(tau)
        if not probes:
            return trace, self._denoise(y, tau)
        for probe in probes:
            denoised, along = self.tangents.along(y, tau, probe)
            trace = trace + _dot(probe.double(), along.double()) / (self.probes or 1)
        return trace, denoised

    def _probes(self, draws: Draws, like: Tensor) -> list[Tensor]:
        """Rademacher vectors, or the unit vectors of a sample's space for the exact trace, over the batch."""
        if self.probes is None:
            units = torch.eye(self.dimension).to(like).reshape(-1, *self.shape)
            return [unit.expand_as(like).contiguous() for unit in units]
        signs = (draws.uniform(STREAM_PROBES + i, self.shape) < 0.5 for i in range(self.probes))
        return [torch.where(sign, -1.0, 1.0).to(like) for sign in signs]

    def _denoise(self, y: Tensor, tau: Tensor) -> Tensor:
        """The denoiser on the EDM coordinate: D(alpha y, t) at the time t of noise level tau."""
        t = self.path.time_from_tau(tau)
        return self.denoiser(expand(self.path.values(t).alpha, y).to(y.dtype) * y, t)

    def _rows(self, numbers: Tensor) -> Tensor:
        if not isinstance(self.data, Tensor):
            return self.data(numbers).to(self.device)
        count = len(self.data)
        if count == 0:
            raise ShapeError("the data hold no samples")
        rows = shuffled_rows(self.seed, numbers, count)
        return self.data[rows.to(self.data.device)].to(self.device)

    def _measured(self) -> tuple[Tensor, float]:
        """The data's mean, float64, and standard deviation; raises ConfigError when they are all the same."""
        if isinstance(self.data, Tensor):
            mean, square = self.data.double().mean(0).to(self.device), float(self.data.double().square().mean())
        else:
            mean, square = torch.zeros(self.shape, dtype=torch.float64, device=self.device), 0.0
            for numbers in torch.arange(self.samples, device=self.device).split(512):
                rows = self._rows(numbers).double()
                mean += rows.sum(0) / self.samples
                square += float(rows.square().mean()) * len(numbers) / self.samples
        variance = square - float(mean.square().mean())
        if not variance > 1e-12 * square:
            raise ConfigError("the data are all the same or not finite: there are no statistics to estimate")
        return mean, math.sqrt(variance)


def estimate_statistics(
    denoiser: PlainDenoiser,
    data: FedData,
    path: Path = EDM(),
    settings: EstimationSettings = EstimationSettings(),
    *,
    mean: Tensor | None = None,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TrajectoryStatistics:
    """l and s of a denoiser on data (math.md §3.2); see StatisticsEstimator for what the arguments mean.

    progress: called with (samples fed, samples). Costs points * samples network calls, each with as many tangents as
    there are probes (dim for the exact trace) and one more; at high noise one plain call besides.
    """
    begin, samples = time.perf_counter(), settings.samples
    estimator = StatisticsEstimator(denoiser, data, path, settings, mean=mean, device=device)
    for first in range(0, samples, settings.batch_size):
        count = min(settings.batch_size, samples - first)
        estimator.update(first, count)
        if progress is not None:
            progress(first + count, samples)
    found = estimator.statistics(time.perf_counter() - begin)
    return found.shrunk() if settings.shrink else found


def noise_grid(path: Path, points: int) -> Tensor:
    """lambda = -log tau at evenly spaced points over the path's range held within [0.002, 80]; float64, increasing."""
    ends = torch.tensor([path.t_max, path.t_min], dtype=torch.float64)
    high, low = path.tau(ends).clamp(LOWEST_TAU, HIGHEST_TAU).tolist()
    return torch.linspace(-math.log(high), -math.log(low), points, dtype=torch.float64)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The mean over a sample's elements of x y, (B,)."""
    return (x * y).flatten(1).mean(1)


def _jackknife(left_out: Estimate) -> Estimate:
    """Standard errors from the estimates (blocks, points) that leave out one block each."""
    blocks = len(left_out.l)
    return Estimate(*(math.sqrt((blocks - 1) ** 2 / blocks) * each.std(0) for each in left_out))


def _bias(credit: Tensor, drift: Tensor, credit_stderr: Tensor, high: Tensor) -> Tensor:
    """The bound on what the denoiser's error does to s, sqrt(deficit drift), at the levels of high noise; 0 below."""
    lack = torch.where(high, 1 - credit, 0.0).clamp(min=0)
    deficit = (lack - 4 * credit_stderr.square() / torch.where(lack > 0, lack, 1.0)).clamp(0, 1)
    rising = deficit.flip(0).cummax(0).values.flip(0)
    return torch.where(high, torch.sqrt(rising * drift), 0.0)
