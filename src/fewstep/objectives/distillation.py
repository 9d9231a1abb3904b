"""Distillation from a diffusion teacher (math.md §4): consistency distillation and consistency trajectory models.

The teacher's ODE carries x_t down to x_u; the student's jump from t must end where its slow average, started at x_u,
ends. Both are compared at the data end of the clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.ode import SolverName, denoiser_on, solve
from fewstep.flow.times import LogNormalTimes, TimeDistribution, edm_grid
from fewstep.networks import Network
from fewstep.networks.condition import Condition
from fewstep.objectives.base import ALONE, STREAM_S, STREAM_T, Batch, Companions, Generated, Losses, Objective
from fewstep.objectives.flow_matching import check_dropout, conditioned, denoising_loss, deviation_of
from fewstep.objectives.gan import generator_loss
from fewstep.objectives.losses import error_norm, gradient_balance
from fewstep.utils.errors import ConfigError

STREAM_U, STREAM_DIAGONAL, STREAM_DIAGONAL_NOISE = 13, 14, 15

Distance = Literal["l2", "pseudo-huber", "features"]


@final
@dataclass(frozen=True)
class TeacherSteps:
    """The teacher's grid and its walk: t = t_n, n uniform over the grid of `points` noise levels (EDM, rho = 7)."""

    points: int = 18
    """Noise levels of the grid, at least 2; 18 in CTM at 32 x 32."""
    solver: SolverName = "heun"
    """The teacher's solver, one step a cell: euler and dpm-solver++ call it once a step, heun twice."""
    u: Literal["drawn", "adjacent"] = "drawn"
    """The grid point where the teacher stops: drawn between s and t (CTM), or the next one below t (CD)."""
    longest: int = 0
    """Most grid cells between t and u; 0 for no limit."""

    def __post_init__(self) -> None:
        if self.points < 2 or self.longest < 0:
            raise ConfigError(f"a teacher's grid needs at least 2 points and longest of at least 0, got {self}")

    def draw(self, batch: Batch, to_end: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Grid indices n < k <= j of t, u and s, (B,) int64; j is the last where every jump goes `to_end`."""
        last = self.points - 1
        n = batch.draws.integers(STREAM_T, last)
        spread = (batch.draws.uniform(STREAM_S) * (last - n)).long().clamp(max=last - 1)
        j = torch.full_like(n, last) if to_end else n + 1 + torch.minimum(spread, last - 1 - n)
        if self.u == "adjacent":
            return n, n + 1, j
        reach = j - n if self.longest == 0 else (j - n).clamp(max=self.longest)
        k = n + 1 + torch.minimum((batch.draws.uniform(STREAM_U) * reach).long(), reach - 1)
        return n, k, j

    def walk(self, flow_map: FlowMap, x: Tensor, n: Tensor, k: Tensor, cond: Condition, teacher: FlowMap) -> Tensor:
        """x_u: the teacher's solution at grid point k from x at grid point n; without gradient."""
        grid = edm_grid(flow_map.path, self.points - 1).to(x.device)
        cells = torch.arange(int((k - n).max()) + 1, device=x.device)
        times = grid[torch.minimum(n[:, None] + cells, k[:, None])]
        with torch.no_grad():
            return solve(denoiser_on(flow_map.path, teacher), flow_map.path, x, times, self.solver, cond)


@final
@dataclass(frozen=True)
class CD(Objective):
    """Consistency distillation (2303.01469): d( X(x_t, t, t_min), sg X_ema(x_u, u, t_min) ), u adjacent to t."""

    steps: TeacherSteps = field(default_factory=lambda: TeacherSteps(u="adjacent"))
    decay: float = 0.95
    """Decay per step, in [0, 1), of the slow average that gives the target."""
    distance: Distance = "l2"
    """Between what is compared: l2 (squared), pseudo-huber, or features (squared, of a feature extractor)."""
    huber: float = 0.03
    """The c of pseudo-huber, above 0: an error much larger counts by its size, a smaller one by its square."""
    dropout: float = 0.0
    """Probability in [0, 1] of hiding a sample's label; guidance needs a model without labels too."""

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        check_decay(self.decay)

    @property
    def to_data_end(self) -> bool:
        return True

    @property
    def needs_velocity(self) -> bool:
        return False

    @property
    def label_dropout(self) -> float:
        return self.dropout

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def target_decay(self) -> float:
        return self.decay

    @property
    def measures_features(self) -> bool:
        return self.distance == "features"

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        target, cond = companions.slow(), conditioned(batch, self.dropout)
        n, k, j = self.steps.draw(batch, to_end=True)
        grid = edm_grid(flow_map.path, self.steps.points - 1).to(batch.x0.device)
        t, u, s = grid[n], grid[k], grid[j]
        x = flow_map.path.interpolate(batch.x0, batch.noise(), t)
        x_u = self.steps.walk(flow_map, x, n, k, cond, companions.master())
        with torch.no_grad():
            goal = jump_where_apart(target, x_u, u, s, cond)
        reached = flow_map.jump(x, t, s, cond)
        error = distance(batch, reached, goal, self.distance, self.huber, companions)
        return Losses(error, t, s, {"consistency": error.detach()})


@final
@dataclass(frozen=True)
class CTM(Objective):
    """Consistency trajectory model (2310.02279): jumps between any two levels, compared at the data end,

    d( X_sg(X(x_t, t, s), s, t_min), X_sg(X_sg(x_u, u, s), s, t_min) ) + lambda * denoising loss on the diagonal,
    t > u >= s grid points, X_sg the slow average, through which the gradient passes to X(x_t, t, s).

    lambda = `denoising`, with `balance` times |grad of the first loss| / |grad of the second|; `adversarial` likewise.
    """

    steps: TeacherSteps = field(default_factory=TeacherSteps)
    decay: float = 0.999
    """Decay per step, in [0, 1), of the slow average X_sg; 0.999 in the paper at 32 x 32."""
    distance: Distance = "l2"
    """Between what is compared: l2 (squared), pseudo-huber, or features (squared, of a feature extractor)."""
    huber: float = 0.03
    """The c of pseudo-huber, above 0: an error much larger counts by its size, a smaller one by its square."""
    denoising: float = 1.0
    """Weight of the denoising loss at noise levels `times`; 0 leaves it out."""
    balance: bool = True
    """Multiply both weights by the ratio of the losses' gradient norms on the network's last layer."""
    adversarial: float = 0.0
    """Weight of -critic on what is compared, while there is a critic; 0 trains none."""
    times: TimeDistribution = field(default_factory=LogNormalTimes)
    sigma_data: float | None = None
    """The data's standard deviation in the denoising loss; None takes what the flow map's configuration says."""
    to_end: bool = False
    """Make every jump one to the data end, s = t_min."""
    dropout: float = 0.0
    """Probability in [0, 1] of hiding a sample's label; guidance needs a model without labels too."""

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        check_decay(self.decay)
        if not (0 <= self.denoising < math.inf and 0 <= self.adversarial < math.inf):
            raise ConfigError(
                f"weights of the denoising and adversarial losses are {self.denoising} and {self.adversarial}; "
                "they must be finite and at least 0"
            )

    @property
    def label_dropout(self) -> float:
        return self.dropout

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def target_decay(self) -> float:
        return self.decay

    @property
    def measures_features(self) -> bool:
        return self.distance == "features"

    @property
    def to_data_end(self) -> bool:
        return self.to_end

    @property
    def needs_critic(self) -> bool:
        return self.adversarial > 0

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        target, cond = companions.slow(), conditioned(batch, self.dropout)
        n, k, j = self.steps.draw(batch, self.to_end)
        grid = edm_grid(flow_map.path, self.steps.points - 1).to(batch.x0.device)
        t, u, s, end = grid[n], grid[k], grid[j], grid[-1].expand(len(n))
        x = flow_map.path.interpolate(batch.x0, batch.noise(), t)
        x_u = self.steps.walk(flow_map, x, n, k, cond, companions.master())
        with torch.no_grad():
            goal = jump_where_apart(target, jump_where_apart(target, x_u, u, s, cond), s, end, cond)
        reached = jump_where_apart(target, flow_map.jump(x, t, s, cond), s, end, cond)
        consistency = distance(batch, reached, goal, self.distance, self.huber, companions)
        terms, logs = {"consistency": consistency}, {"consistency": consistency.detach()}
        if self.denoising:
            denoising = self.denoising_loss(flow_map, batch, cond)
            scale = self.denoising * self.weight(consistency, denoising, flow_map, companions)
            terms["denoising"] = scale * denoising
            logs |= {"denoising": denoising.detach(), "balance": scale.expand(len(t))}
        if self.adversarial and companions.critic is not None:
            adversarial = generator_loss(companions.critic, reached, cond.labels)
            scale = self.adversarial * self.weight(consistency, adversarial, flow_map, companions)
            terms["adversarial"] = scale * adversarial
            logs |= {"adversarial": adversarial.detach()}
        total = torch.stack(list(terms.values())).sum(0)
        judged = Generated(reached.detach(), cond.labels) if self.adversarial else None
        return Losses(total, t, s, logs, terms, judged)

    def weight(self, first: Tensor, second: Tensor, flow_map: FlowMap, companions: Companions) -> Tensor:
        """What makes the second loss weigh as much as the first on the last layer; 1 when not balanced."""
        if not self.balance:
            return first.new_ones(())
        return gradient_balance(first, second, last_layer(flow_map), companions.average)

    def denoising_loss(self, flow_map: FlowMap, batch: Batch, cond: Condition) -> Tensor:
        """EDM's denoising loss of the same images at noise levels and noise of its own."""
        t = self.times.quantile(flow_map.path, batch.draws.uniform(STREAM_DIAGONAL))
        eps = batch.draws.normal(STREAM_DIAGONAL_NOISE, tuple(batch.x0.shape[1:]), batch.x0.dtype)
        deviation = deviation_of(flow_map) if self.sigma_data is None else self.sigma_data
        return denoising_loss(flow_map, batch, eps, t, cond, deviation)


def jump_where_apart(model: FlowMap, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
    """X(x, t, s), evaluated for the samples with s < t alone: the others stay where they are."""
    rows = torch.nonzero(s < t).squeeze(1)
    if len(rows) == len(x):
        return model.jump(x, t, s, cond)
    if len(rows) == 0:
        return x
    return x.index_copy(0, rows, model.jump(x[rows], t[rows], s[rows], cond[rows]).to(x.dtype))


def distance(batch: Batch, a: Tensor, b: Tensor, kind: Distance, huber: float, companions: Companions) -> Tensor:
    """(B, ...), (B, ...) -> (B,): between samples, or between their features."""
    if kind == "features":
        features = companions.perception()
        return error_norm(features(a) - features(b), "l2", huber)
    return error_norm(batch.count(a - b), kind, huber)


def last_layer(flow_map: FlowMap) -> Tensor:
    """The weight of the network's output layer; raises ConfigError for a foreign network."""
    if not isinstance(flow_map.network, Network):
        raise ConfigError("balancing losses by gradient norm needs a fewstep network: set balance to false")
    return flow_map.network.last_layer


def check_decay(decay: float) -> None:
    """Raise ConfigError unless the decay of an average lies in [0, 1)."""
    if not 0 <= decay < 1:
        raise ConfigError(f"decay of the target is {decay}; it must lie in [0, 1)")
