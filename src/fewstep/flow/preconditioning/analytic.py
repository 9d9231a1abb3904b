"""Analytic-Precond (2502.02922): jump coefficients from the teacher's own statistics (math.md §3).

On the EDM path with lambda = -log t, A = lambda - int l and S = int s, the teacher's ODE is exactly
d(e^A x)/dlambda = e^{A+S} h with h = e^{-S} (D - l x); the jump holds h constant. l and s make it as constant as two
functions of time can.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, final, get_args

import torch
from torch import Tensor

from fewstep.flow.paths import EDM, Path
from fewstep.flow.preconditioning.base import Preconditioning, PreconditioningConfig, WrappedPreconditioning
from fewstep.flow.preconditioning.covariance import class_means
from fewstep.flow.preconditioning.interpolation import HermiteCurve, Place
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.utils.errors import ConfigError
from fewstep.utils.serialization import later
from fewstep.utils.tensors import check_choice

Weight = Literal["analytic", "euler"]

# Nodes and weights of the five-point Gauss-Legendre rule on [0, 1]: (x, w) of [-1, 1] halved.
_INNER, _OUTER = (0.5384693101056831, 0.47862867049936647), (0.906179845938664, 0.23692688505618908)
_NODES = ((-_OUTER[0], _OUTER[1]), (-_INNER[0], _INNER[1]), (0.0, 128 / 225), _INNER, _OUTER)


class Tables(NamedTuple):
    """What the coefficients look up: the curves of l and s, and integrals of exp(A + S) over runs of whole cells.

    runs: the k-th (cells - 2^k + 1,) holds the logarithms of the integrals over the 2^k cells from each cell on. Any
    range is a sum of at most log2(cells) of them, all positive, so that no digits are lost where A + S falls or rises
    by many powers of e; differences of one cumulative table would lose them.
    """

    end: float
    l: HermiteCurve  # noqa: E741  (math.md §3.1)
    s: HermiteCurve
    rule: Tensor
    runs: tuple[Tensor, ...] = ()

    def to(self, device: torch.device) -> "Tables":
        """The same tables on another device."""
        l_curve, s_curve = (c._replace(cells=c.cells.to(device), area=c.area.to(device)) for c in (self.l, self.s))
        return Tables(self.end, l_curve, s_curve, self.rule.to(device), tuple(run.to(device) for run in self.runs))

    def a(self, place: Place) -> Tensor:
        """A = lambda - int l."""
        return self.l.start + self.l.step * (place.cell + place.fraction) - self.l.integral(place)

    def within(self, cell: Tensor, low: Tensor, high: Tensor, reference: Tensor) -> Tensor:
        """The integral of exp(A + S - reference) over the fractions low..high of a cell, by Gauss-Legendre."""
        node = low[..., None] + (high - low)[..., None] * self.rule[0]
        place = Place(cell[..., None].expand(node.shape), node)
        height = torch.exp(self.a(place) + self.s.integral(place) - reference[..., None])
        return self.l.step * (high - low) * (height * self.rule[1]).sum(-1)

    def whole(self, first: Tensor, stop: Tensor, reference: Tensor) -> Tensor:
        """The integral of exp(A + S - reference) over the cells first .. stop - 1; 0 where there are none."""
        left, total = (stop - first).clamp(min=0), torch.zeros_like(reference)
        for k, run in enumerate(self.runs):
            taken = (left >> k) % 2 == 1
            log_part = run[first.clamp(max=len(run) - 1)] - reference
            total = total + torch.exp(torch.where(taken, log_part, -torch.inf))
            first = torch.where(taken, first + 2**k, first)
        return total

    def between(self, t: Place, s: Place, reference: Tensor) -> Tensor:
        """The integral of exp(A + S - reference) from t to s, relatively as exact as the curves are."""
        rising = (s.cell < t.cell) | ((s.cell == t.cell) & (s.fraction < t.fraction))
        first, last = (
            Place(torch.where(rising, two.cell, one.cell), torch.where(rising, two.fraction, one.fraction))
            for one, two in ((t, s), (s, t))
        )
        same, one = first.cell == last.cell, torch.ones_like(first.fraction)
        head = self.within(first.cell, first.fraction, torch.where(same, last.fraction, one), reference)
        tail = self.within(last.cell, torch.where(same, last.fraction, 0 * one), last.fraction, reference)
        total = head + tail + self.whole(first.cell + 1, last.cell, reference)
        return torch.where(rising, -total, total)


def build_tables(statistics: TrajectoryStatistics) -> Tables:
    """The tables of one set of statistics; float64, on the CPU."""
    start, points = float(statistics.lam[0]), len(statistics.lam)
    step = (float(statistics.lam[-1]) - start) / (points - 1)
    curve_l, curve_s = (HermiteCurve.through(values.cpu(), start, step) for values in (statistics.l, statistics.s))
    rule = torch.tensor([[(1 + x) / 2, w / 2] for x, w in _NODES], dtype=torch.float64).T
    bare = Tables(float(statistics.lam[-1]), curve_l, curve_s, rule)
    cell, left = torch.arange(points - 1), torch.zeros(points - 1, dtype=torch.float64)
    middle = Place(cell, left + 0.5)
    height = bare.a(middle) + curve_s.integral(middle)
    runs = [height + torch.log(bare.within(cell, left, left + 1, height))]
    while (reach := 2 ** (len(runs) - 1)) < len(runs[-1]):
        runs.append(torch.logaddexp(runs[-1][:-reach], runs[-1][reach:]))
    return bare._replace(runs=tuple(runs))


@final
@dataclass(frozen=True)
class AnalyticPreconditioning(Preconditioning):
    """f and g from l and s (math.md §3.3): with E = exp(A_t - A_s), on the EDM path at noise levels tau_t -> tau_s,

    backward (h frozen at s): J = int exp(A - A_s + S - S_s) dlambda, f = E/(1 + l_s J), g = J/(1 + l_s J);
    forward (h frozen at t):  J = int exp(A - A_s + S - S_t) dlambda, f = E - l_t J,     g = J.
    N is the denoiser on the diagonal. Students train with the backward form: forward's g grows without bound on long
    jumps. l = s = 0 is Euler's preconditioning. Beyond the noise levels of the statistics the jump goes on with Euler
    steps, so that any path's whole clock is covered.

    weight "euler": X - alpha_s m = f (x - alpha_t m) + g_E (N - m), g_E Euler's weight: N scaled about the mean m by
    g_E/g, which is 1 at s = t. A student that starts as its teacher's denoiser starts at the DDIM step but for
    (f - f_E)(x - alpha_t m), where g, the smaller, would draw it to the mean.
    """

    denoises: ClassVar[bool] = True
    statistics: TrajectoryStatistics
    form: Literal["backward", "forward"] = "backward"
    path: Path = EDM()
    weight: Weight = later(lambda: "analytic")
    _tables: ClassVar[dict[torch.device, Tables]]

    def __post_init__(self) -> None:
        check_choice("form", self.form, ("backward", "forward"))
        check_choice("weight", self.weight, get_args(Weight))
        if not isinstance(self.statistics, TrajectoryStatistics):
            raise ConfigError(
                f"analytic preconditioning takes TrajectoryStatistics, not {type(self.statistics).__name__}: "
                "TrajectoryStatistics.load(FILE) reads them"
            )
        tables = build_tables(self.statistics)
        self._refuse_wild_jumps(tables)
        object.__setattr__(self, "_tables", {torch.device("cpu"): tables})

    @property
    def origin(self) -> Tensor | None:
        """The mean about which the jump is taken (math.md §3.6); None when it is zero."""
        return self.statistics.origin

    @property
    def frozen_at(self) -> Literal["t", "s"]:
        return "s" if self.form == "backward" else "t"

    def known_statistics(self) -> TrajectoryStatistics:
        return self.statistics

    def of(self, labels: Tensor | None) -> Preconditioning:
        means = self.statistics.class_means
        if means is None or labels is None:
            return self
        return Recentred(self, class_means(self.statistics.mean, means, labels))

    def with_statistics(self, statistics: TrajectoryStatistics) -> "AnalyticPreconditioning":
        return replace(self, statistics=statistics)

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(f, g). With scale = alpha inside the table and sigma over its end beyond it,

        f = f0 scale_s/scale_t, g = g0 scale_s + f (scale_t - alpha_t) - (scale_s - alpha_s),
        f0, g0 between the noise levels held within the table: the Euler steps beyond it, without dividing by alpha.
        """
        t, s = torch.broadcast_tensors(self.path.clock(t), self.path.clock(s))
        tables = self._tables_on(t.device)
        (lam_t, scale_t, excess_t), (lam_s, scale_s, excess_s) = self._clamped(t, tables), self._clamped(s, tables)
        f, g = self._between(lam_t, lam_s, tables)
        clean = scale_t == 0
        f = torch.where(clean, 1.0, f * scale_s / torch.where(clean, 1.0, scale_t))
        if self.weight == "euler":
            return f, EulerPreconditioning(self.path).coefficients(t, s)[1]
        return f, g * scale_s + f * excess_t - excess_s

    def diagonal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Euler's, for any l and s."""
        return EulerPreconditioning(self.path).diagonal(t)

    def _refuse_wild_jumps(self, tables: Tables) -> None:
        """Raise ConfigError where a jump between two levels of the statistics has no finite f or no positive g."""
        lam = self.statistics.lam
        few = torch.combinations(lam[:: max(1, len(lam) // 40)], 2)
        ends = [(lam[:-1], lam[1:]), (lam[:1].expand(len(lam) - 1), lam[1:]), (lam[:-1], lam[-1:].expand(len(lam) - 1))]
        starts, stops = (torch.cat([each[i] for each in ends] + [few[:, i]]) for i in (0, 1))
        f, g = self._between(starts, stops, tables)
        wild = torch.nonzero(~(f.isfinite() & g.isfinite() & (g > 0)))
        if len(wild):
            i, steepest = int(wild[0]), float(self.statistics.s.abs().max())
            t, s = math.exp(-float(starts[i])), math.exp(-float(stops[i]))
            raise ConfigError(
                f"the statistics give the jump from noise {t:.3g} to {s:.3g} f = {float(f[i]):.3g}, g = "
                f"{float(g[i]):.3g}, where f must be finite and g positive (s reaches {steepest:.3g}): "
                "train the teacher longer, or estimate with more samples"
            )

    def _clamped(self, t: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """(lambda held within the table, scale, scale - alpha) at times t.

        scale = sigma/tau at the table's end where tau lies beyond it, else alpha. alpha is divided by only where it
        is not small against sigma, so that values and derivatives stay finite where tau is 0 or infinite.
        """
        p = self.path.values(t)
        highest, lowest = math.exp(-tables.l.start), math.exp(-tables.end)
        above, below = p.sigma > highest * p.alpha, p.sigma < lowest * p.alpha
        beyond = above | below
        held = torch.where(above, torch.full_like(t, highest), lowest)
        tau = torch.where(beyond, held, p.sigma / torch.where(beyond, 1.0, p.alpha))
        scale = torch.where(beyond, p.sigma / held, p.alpha)
        return -torch.log(tau), scale, scale - p.alpha

    def _between(self, lam_t: Tensor, lam_s: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        """(f, g) between two places of the table on the EDM path."""
        t, s = tables.l.locate(lam_t), tables.l.locate(lam_s)
        a_t, a_s = tables.a(t), tables.a(s)
        e = torch.exp(a_t - a_s)
        if self.form == "forward":
            j = tables.between(t, s, a_s + tables.s.integral(t))
            return e - tables.l.value(t) * j, j
        j = tables.between(t, s, a_s + tables.s.integral(s))
        implicit = 1 + tables.l.value(s) * j
        return e / implicit, j / implicit

    def _tables_on(self, device: torch.device) -> Tables:
        if device not in self._tables:
            self._tables[device] = next(iter(self._tables.values())).to(device)
        return self._tables[device]


@final
@dataclass(frozen=True)
class Recentred(WrappedPreconditioning):
    """Another's (f, g) about other origins, (B, ...): of a batch, and never stored."""

    about: Tensor

    @property
    def origin(self) -> Tensor:
        return self.about


@dataclass(frozen=True)
class AnalyticPreconditioningConfig(PreconditioningConfig):
    """From statistics of the teacher, or of the model itself."""

    needs_statistics: ClassVar[bool] = True
    form: ClassVar[Literal["backward", "forward"]] = "backward"
    weight: Weight = later(lambda: "analytic")
    """Of the network: the computed g, or euler, so that a student starts at the length of the teacher's DDIM steps."""

    def __post_init__(self) -> None:
        check_choice("weight", self.weight, get_args(Weight))

    def build(
        self, path: Path, sigma_data: float, statistics: TrajectoryStatistics | None = None
    ) -> AnalyticPreconditioning:
        if statistics is None:
            raise ConfigError(
                "analytic preconditioning is computed from statistics: name a teacher with --teacher, or set "
                "--statistics.refresh-images to estimate them from the model itself"
            )
        return AnalyticPreconditioning(statistics, self.form, path, self.weight)


@final
@dataclass(frozen=True)
class AnalyticForwardPreconditioningConfig(AnalyticPreconditioningConfig):
    """The ablation of analytic, frozen at the start of a jump."""

    form: ClassVar[Literal["backward", "forward"]] = "forward"
