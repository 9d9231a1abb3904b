"""Self-distillation on Gaussian data with maps affine in x: expected updates, and their Jacobians as small matrices.

What docs/explanation/why-an-anchor.md proves, for its tests and the tables of its study: expected updates of the
objectives by quadrature that is exact in x, their Jacobians with detached parts included, at the data's flow map and at
flow maps of other velocities, for two families of maps. All in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.flow.closed_form import GaussianData
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import Linear, Path, Trig
from fewstep.flow.preconditioning.base import Preconditioning
from fewstep.flow.preconditioning.jumps import LinearPreconditioning, TrigPreconditioning
from fewstep.objectives import eulerian_residual
from fewstep.utils.forward_ad import jvp

F64 = torch.float64
OFFSET = 0.01
"""c in the weight 1/(loss + c)."""


@dataclass(frozen=True)
class Case:
    """Data N(mean, sd^2) of one dimension, a path, and a preconditioning whose target lies in the network."""

    path: Path
    preconditioning: Preconditioning
    data: GaussianData

    def stretch(self, gap: Tensor) -> Tensor:
        """w(t - s) with -g dw/dt = w, the variable in which departures are powers: t - s, or 2 tan((t - s)/2)."""
        return 2 * torch.tan(gap / 2) if isinstance(self.preconditioning, TrigPreconditioning) else gap


def case(sd: float = 0.5, mean: float = 1.0, path: str = "linear") -> Case:
    """Data N(mean, sd^2) on a path with its own preconditioning."""
    data = GaussianData(torch.tensor(mean, dtype=F64), sd)
    return (
        Case(Linear(), LinearPreconditioning(), data) if path == "linear" else Case(Trig(), TrigPreconditioning(), data)
    )


@dataclass(frozen=True)
class Points:
    """Quadrature for x_t, s <= t: x (B, 1), t, s (B,), and weights (B,) that add up to 1."""

    x: Tensor
    t: Tensor
    s: Tensor
    weight: Tensor


def points(case: Case, times: int = 8) -> Points:
    """t and s as two ordered uniform draws, by Gauss and Legendre; x_t given t by Gauss and Hermite.

    Two values of x are enough for expectations of products of affine functions.
    """
    nodes, weights = (torch.tensor(values) for values in np.polynomial.legendre.leggauss(times))
    u, w = (nodes + 1) / 2, weights / 2
    first, second, sign = (
        v.flatten() for v in torch.meshgrid(u, u, torch.tensor([-1.0, 1.0], dtype=F64), indexing="ij")
    )
    t, s = case.path.time_from_unit(first), case.path.time_from_unit(first * second)
    p = case.path.values(t)
    deviation = torch.sqrt(p.alpha**2 * case.data.sd**2 + p.sigma**2)
    weight = (2 * u * w)[:, None, None] * w[:, None] * torch.full((2,), 0.5, dtype=F64)
    return Points((p.alpha * case.data.mean + sign * deviation)[:, None], t, s, weight.flatten())


class Closed(nn.Module):
    """A network given in closed form: N(x, t, s) for x (B, 1), t, s (B,)."""

    def __init__(self, output: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: object = None) -> Tensor:
        return self.output(x, t, s)


@dataclass(frozen=True)
class AffineFlow:
    """X(x, t, s) = M(s) + S(s)/S(t) (x - M(t)), the flow map of v(x, t) = M' + (S'/S) (x - M); S, M: (B,) -> (B,)."""

    name: str
    scale: Callable[[Tensor], Tensor]
    mean: Callable[[Tensor], Tensor]


def exact(case: Case) -> AffineFlow:
    """The data's own: S^2 = alpha^2 sd^2 + sigma^2, M = alpha m."""

    def scale(t: Tensor) -> Tensor:
        p = case.path.values(t)
        return torch.sqrt(p.alpha**2 * case.data.sd**2 + p.sigma**2)

    return AffineFlow("exact", scale, lambda t: case.path.values(t).alpha * case.data.mean)


def contraction(towards: float, strength: float) -> AffineFlow:
    """X = c + (1 + k s)/(1 + k t) (x - c): straight lines; the identity for k = 0, the constant c as k grows."""
    name = f"contraction, k = {strength:g}" if strength else "identity"
    return AffineFlow(name, lambda t: 1 + strength * t, lambda t: torch.full_like(t, towards))


class Family(Protocol):
    """Flow maps by a vector of parameters, zero at the flow of interest."""

    @property
    def size(self) -> int: ...

    def map(self, parameters: Tensor) -> FlowMap: ...


@dataclass(frozen=True)
class Tangent:
    """A flow, the flows about it, and departures from being one: a chart of maps about a consistent map.

    log S + sum theta_j t^j and M + sum mu_j t^j are flows; departures add sum_k w(t - s)^k S(s) (c_k z + d_k), with
    z = (x - M(t))/S(t). Parameters: theta, c, mu, d.
    """

    case: Case
    flow: AffineFlow
    velocity: tuple[int, ...] = (1,)
    departures: tuple[int, ...] = (2,)

    @property
    def size(self) -> int:
        return 2 * (len(self.velocity) + len(self.departures))

    def of_velocity(self) -> Tensor:
        """Which parameters change the velocity, (size,) bool."""
        half = [True] * len(self.velocity) + [False] * len(self.departures)
        return torch.tensor(half + half)

    def powers(self) -> Tensor:
        """0 for parameters of the velocity, k for departures: (size,)."""
        half = [0] * len(self.velocity) + list(self.departures)
        return torch.tensor(half + half, dtype=F64)

    def map(self, parameters: Tensor) -> FlowMap:
        theta, c, mu, d = parameters.split([len(self.velocity), len(self.departures)] * 2)

        def state(t: Tensor) -> tuple[Tensor, Tensor]:
            basis = torch.stack([t**j for j in self.velocity], -1)
            return self.flow.scale(t) * torch.exp(basis @ theta), self.flow.mean(t) + basis @ mu

        def output(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            (scale_t, mean_t), (d_scale, d_mean) = jvp(state, (t,), (torch.ones_like(t),))
            scale_s, mean_s = state(s)
            z = (x[:, 0] - mean_t) / scale_t
            w = torch.stack([self.case.stretch(t - s) ** k for k in self.departures], -1)
            jumped = mean_s + scale_s * (z + (w @ c) * z + w @ d)
            return network_output(self.case, x, jumped[:, None], (d_mean + d_scale * z)[:, None], t, s)

        return FlowMap(self.case.path, self.case.preconditioning, Closed(output))


@dataclass(frozen=True)
class Shared:
    """N = N_flow + sum over i + j < degree of t^i (t - s)^j (a_ij z + b_ij): parameters a, b shared by all times."""

    case: Case
    flow: AffineFlow
    degree: int

    @property
    def size(self) -> int:
        return self.degree * (self.degree + 1)

    def map(self, parameters: Tensor) -> FlowMap:
        base = Tangent(self.case, self.flow)
        inner = base.map(torch.zeros(base.size, dtype=F64)).network

        def output(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            exponents = [(i, j) for i in range(self.degree) for j in range(self.degree - i)]
            basis = torch.stack([t**i * (t - s) ** j for i, j in exponents], -1)
            a, b = parameters.chunk(2)
            return inner(x, t, s) + (basis @ a)[:, None] * (x - self.flow.mean(t)[:, None]) + (basis @ b)[:, None]

        return FlowMap(self.case.path, self.case.preconditioning, Closed(output))


def network_output(case: Case, x: Tensor, jumped: Tensor, velocity: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """N = (X - f x)/g, and (v - f_s x)/g_s where s = t."""
    same = (t == s)[:, None]
    f, g = (c[:, None] for c in case.preconditioning.coefficients(t, s))
    f_s, g_s = (c[:, None] for c in case.preconditioning.diagonal(t))
    return torch.where(same, (velocity - f_s * x) / g_s, (jumped - f * x) / torch.where(same, 1.0, g))


def residual(flow_map: FlowMap, x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """R = dX/dt along v, (B, 1), with all its derivatives."""
    output, d_output = jvp(lambda x, t: flow_map.output(x, t, s), (x, t), (v, torch.ones_like(t)))
    return eulerian_residual(flow_map, x, v, output, d_output, t, s)


Error = Callable[[FlowMap, FlowMap, Points, Case], Tensor]
"""What an objective squares, (B, 1): of the map that the gradient moves and the same map where it is detached."""


def isd_error(moving: FlowMap, frozen: FlowMap, at: Points, case: Case) -> Tensor:
    """N - N_target with the model's own velocity."""
    change = moving.output(at.x, at.t, at.s) - frozen.output(at.x, at.t, at.s)
    return change - residual(frozen, at.x, frozen.velocity(at.x, at.t), at.t, at.s)


def meanflow_error(moving: FlowMap, frozen: FlowMap, at: Points, case: Case) -> Tensor:
    """The mean over x0 given x_t of N - N_target, which is linear in the conditional velocity."""
    change = moving.output(at.x, at.t, at.s) - frozen.output(at.x, at.t, at.s)
    return change - residual(frozen, at.x, case.data.velocity(case.path, at.x, at.t), at.t, at.s)


def esd_error(moving: FlowMap, frozen: FlowMap, at: Points, case: Case) -> Tensor:
    """R, nothing detached."""
    return residual(moving, at.x, moving.velocity(at.x, at.t), at.t, at.s)


def lsd_error(moving: FlowMap, frozen: FlowMap, at: Points, case: Case) -> Tensor:
    """d_s X - v(X, s)."""
    d_jump = jvp(lambda s: moving.jump(at.x, at.t, s), (at.s,), (torch.ones_like(at.s),))[1]
    return d_jump - frozen.velocity(frozen.jump(at.x, at.t, at.s), at.s)


def psd_error(moving: FlowMap, frozen: FlowMap, at: Points, case: Case) -> Tensor:
    """(X(x, t, s) - X(X(x, t, u), u, s))/(t - s), u in the middle."""
    u = (at.t + at.s) / 2
    goal = frozen.jump(frozen.jump(at.x, at.t, u), u, at.s)
    return (moving.jump(at.x, at.t, at.s) - goal) / (at.t - at.s)[:, None]


def anchor_error(moving: FlowMap, frozen: FlowMap, at: Points, case: Case) -> Tensor:
    """The mean over x0 given x_t of v(x_t, t) less the conditional velocity."""
    return moving.velocity(at.x, at.t) - case.data.velocity(case.path, at.x, at.t)


ERRORS: dict[str, Error] = {
    "iSD": isd_error, "ESD": esd_error, "LSD": lsd_error, "PSD": psd_error, "MeanFlow": meanflow_error,
}  # fmt: skip


def update(family: Family, error: Error, case: Case, parameters: Tensor) -> Tensor:
    """Minus the gradient of E|error|^2/2 by the moving map alone, (size,): the expected step of gradient descent."""
    at, frozen = points(case), family.map(parameters)

    def loss(moving: Tensor) -> Tensor:
        return (at.weight * error(family.map(moving), frozen, at, case)[:, 0].square()).sum() / 2

    found: Tensor = -torch.func.grad(loss)(parameters)
    return found


def jacobian(family: Family, error: Error, case: Case) -> Tensor:
    """The derivative of the update by the parameters, detached ones included, at the family's origin: (size, size)."""
    found: Tensor = torch.func.jacfwd(lambda p: update(family, error, case, p))(torch.zeros(family.size, dtype=F64))
    return found


def features(family: Family, at: Points, diagonal: bool = False) -> Tensor:
    """dN/dparameters at the family's origin, (B, size); with `diagonal` at s = t."""
    s = at.t if diagonal else at.s
    found: Tensor = torch.func.jacfwd(lambda p: family.map(p).output(at.x, at.t, s)[:, 0])(
        torch.zeros(family.size, dtype=F64)
    )
    return found


def gram(values: Tensor, weight: Tensor) -> Tensor:
    """E[f f^T] of features (B, size)."""
    return values.T @ (weight[:, None] * values)


def spectrum(matrix: Tensor, metric: Tensor | None = None) -> Tensor:
    """Real parts of the eigenvalues, rising; with `metric` G those of G^-1 J, which no change of parameters alters."""
    matrix = matrix if metric is None else torch.linalg.solve(metric, matrix)
    return torch.linalg.eigvals(matrix).real.sort().values


def irreducible_loss(case: Case) -> float:
    """E Var[alpha' x0 + sigma' eps | x_t] = E (alpha' sigma - alpha sigma')^2 sd^2/S^2: the anchor's own."""
    at = points(case)
    p = case.path.values(at.t)
    deviation = (p.d_alpha * p.sigma - p.alpha * p.d_sigma) * case.data.sd / exact(case).scale(at.t)
    return float((at.weight * deviation.square()).sum())


def weight_apart(case: Case) -> float:
    """The anchor's weight over the distillation's at the exact map when each is normalised by its own loss + c."""
    return OFFSET / (irreducible_loss(case) + OFFSET)


def sufficient_weight(case: Case, times: int = 48) -> float:
    """C^2/2, C^2 the largest over t of E[(S(s)/S(t))^2 | t]: an anchor of more weight makes iSD stable."""
    at, scale = points(case, times), exact(case).scale
    ratio, weight = ((v.reshape(times, -1)) for v in ((scale(at.s) / scale(at.t)).square(), at.weight))
    return float(((weight * ratio).sum(1) / weight.sum(1)).max()) / 2


def critical_weight(distillation: Tensor, anchor: Tensor, metric: Tensor, lowest: float = 1e-4) -> float:
    """The least weight of the anchor from which on J + weight J_anchor is stable, to 1%; 0 when below `lowest`."""

    def stable(weight: float) -> bool:
        return float(spectrum(distillation + weight * anchor, metric)[-1]) < 0

    grid = torch.logspace(np.log10(lowest), 1.2, 80, dtype=F64).tolist()
    unstable = [index for index, weight in enumerate(grid[:-1]) if not stable(weight)]
    if not unstable:
        return 0.0
    low, high = grid[unstable[-1]], grid[unstable[-1] + 1]
    while high > 1.01 * low:
        middle = (high * low) ** 0.5
        low, high = (low, middle) if stable(middle) else (middle, high)
    return float(high)


@dataclass(frozen=True)
class OneSlope:
    """N = a x for N(0, sd^2) on the linear path: da/dtau = -curvature a^2 - weight (size a - pull), in closed form.

    iSD's R = -(t - s) a^2 x; a = 0, the identity, is the one consistent map. loss: E R^2/a^4 and E|v - v*|^2.
    """

    curvature: float
    size: float
    pull: float
    distance: float
    rest: float

    @staticmethod
    def of(case: Case) -> "OneSlope":
        """The expectations over the case's times."""
        at, scale = points(case), exact(case).scale
        s, d_s = jvp(scale, (at.t,), (torch.ones_like(at.t),))
        gap = at.t - at.s
        terms = (gap * s**2, s**2, s * d_s, gap**2 * s**2, d_s**2)
        found = [float((at.weight * term).sum()) for term in terms]
        return OneSlope(*found[:4], found[4] + irreducible_loss(case))

    def settled(self, weight: float) -> float | None:
        """The stable slope, the larger root; None where there is no fixed point."""
        inner = (weight * self.size) ** 2 + 4 * self.curvature * weight * self.pull
        return None if inner < 0 else (-weight * self.size + inner**0.5) / (2 * self.curvature)

    def weight_apart(self, slope: float) -> float:
        """(E R^2 + c)/(E|v - v*|^2 + c)."""
        anchor = self.size * slope**2 - 2 * self.pull * slope + self.rest
        return (self.distance * slope**4 + OFFSET) / (anchor + OFFSET)

    def settled_apart(self) -> float:
        """Where the slope settles under that weight, by iteration from the identity; needs pull > 0."""
        slope = 0.0
        for _ in range(1000):
            slope = 0.5 * slope + 0.5 * (self.settled(self.weight_apart(slope)) or 0.0)
        return slope
