"""Consistency training, maps to s = t_min alone (math.md §4, §5.2): CT, ECT, sCT, and sCD from a teacher.

CT and ECT compare adjacent points of one noise; sCT and sCD take the limit, in which the difference is a derivative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import final, get_args

import torch
from torch import Tensor

from fewstep.flow.derivatives import DerivativeKind, OutputDerivative
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import NoGuidance, TrainingGuidance
from fewstep.flow.ode import denoiser_on
from fewstep.flow.paths import EDM, Path
from fewstep.flow.preconditioning import CMPreconditioning, TrigPreconditioning
from fewstep.flow.times import LogNormalTimes, TimeDistribution, doubling_cells, edm_grid, falling_ratio, warm_up
from fewstep.networks.condition import Condition
from fewstep.objectives.base import ALONE, STREAM_T, Batch, Companions, Losses, Objective
from fewstep.objectives.distillation import check_decay
from fewstep.objectives.eulerian import eulerian_residual
from fewstep.objectives.flow_matching import conditioned
from fewstep.objectives.losses import LossNorm, error_norm, normalised
from fewstep.objectives.pairs import Comparison, check_settings, guided_condition, guided_velocity, noised
from fewstep.utils.errors import ConfigError
from fewstep.utils.tensors import check_choice, expand


@final
@dataclass(frozen=True)
class CT(Objective):
    """Consistency training (2303.01469, iCT 2310.14189): d( X(x_t, t, t_min), sg X(x_u, u, t_min) ) / (t - u).

    x_t and x_u are made of the same image and noise, t and u neighbours on EDM's grid: t is the grid's first time above
    a draw of `times`. The grid's cells double from `first` to `last` over `duration` images seen. norm: of d.
    """

    times: TimeDistribution = field(default_factory=lambda: LogNormalTimes(-1.1, 2.0))
    first: int = 10
    """Cells of the grid when training begins, at least 1; 10 in iCT."""
    last: int = 1280
    """Cells of the grid in the end, at least `first`; 1280 in iCT."""
    duration: int = 1_000_000
    """Images seen over which the grid grows from `first` to `last`."""
    decay: float | None = None
    """Decay per step, in [0, 1), of the slow average that gives the target; None is the model itself (iCT)."""
    norm: LossNorm = "pseudo-huber"
    """How errors are measured: l2, their mean square, or pseudo-huber, which counts large ones less."""
    huber: float = 0.03
    """Constant c of pseudo-huber, above 0; iCT's is 0.00054 times the root of the numbers in a sample."""
    dropout: float = 0.0
    """Probability in [0, 1] of hiding a sample's label; guidance needs a model without labels too."""

    def __post_init__(self) -> None:
        check_settings(self.dropout, 0.0, first=self.first, duration=self.duration, huber=self.huber)
        check_choice("norm", self.norm, get_args(LossNorm))
        if self.last < self.first:
            raise ConfigError(f"the grid grows from {self.first} cells to {self.last}: last must be at least first")
        if self.decay is not None:
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
    def target_decay(self) -> float | None:
        return self.decay

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        target = flow_map if self.decay is None else companions.slow()
        t, u = self.neighbours(flow_map.path, batch)
        return adjacent_losses(flow_map, target, batch, (t, u), self.dropout, self.norm, self.huber)

    def neighbours(self, path: Path, batch: Batch) -> tuple[Tensor, Tensor]:
        """(t, u), u < t neighbours on the grid of this moment of training; (B,) float64."""
        cells = doubling_cells(batch.images, self.first, self.last, self.duration)
        rising = edm_grid(path, cells).flip(0).to(batch.x0.device)
        drawn = self.times.quantile(path, batch.draws.uniform(STREAM_T))
        n = torch.searchsorted(rising, drawn, right=True).clamp(1, cells)
        return rising[n], rising[n - 1]


@final
@dataclass(frozen=True)
class ECT(Objective):
    """Easy consistency tuning (2406.14548): d( X(x_t, t, t_min), sg X(x_u, u, t_min) ) / (t - u), u = t (1 - n(t)/q^a).

    n(t) = 1 + k sigmoid(-b t), both at the noise levels tau, u held above t_min. a = 1, 2, ... `stages` grows by one
    every `stage_images` images seen; from a diffusion model's weights (a = 0 would be one) training is a fine-tuning.
    """

    times: TimeDistribution = field(default_factory=lambda: LogNormalTimes(-1.1, 2.0))
    q: int = 2
    """Base of the stages, at least 2: with each the gap between t and u shrinks to 1/q."""
    stage_images: int = 125_000
    """Images seen in one stage."""
    stages: int = 8
    """Stages in all; the last one goes on to the end."""
    k: float = 8.0
    """How much wider the gap is at low noise, at least 0; 8 in the paper."""
    b: float = 1.0
    """How soon that fades as noise grows, at least 0; 1 in the paper."""
    decay: float | None = None
    """Decay per step, in [0, 1), of the slow average that gives the target; None is the model itself."""
    norm: LossNorm = "pseudo-huber"
    """How errors are measured: l2, their mean square, or pseudo-huber, which counts large ones less."""
    huber: float = 0.03
    """Constant c of pseudo-huber, above 0, as in CT."""
    dropout: float = 0.0
    """Probability in [0, 1] of hiding a sample's label; guidance needs a model without labels too."""

    def __post_init__(self) -> None:
        check_settings(self.dropout, 0.0, stage_images=self.stage_images, stages=self.stages, huber=self.huber)
        check_choice("norm", self.norm, get_args(LossNorm))
        if not (self.q >= 2 and 0 <= self.k < math.inf and 0 <= self.b < math.inf):
            raise ConfigError(f"ECT needs q of at least 2 and finite k, b of at least 0, got {self}")
        if self.decay is not None:
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
    def target_decay(self) -> float | None:
        return self.decay

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        target = flow_map if self.decay is None else companions.slow()
        t, u = self.neighbours(flow_map.path, batch)
        return adjacent_losses(flow_map, target, batch, (t, u), self.dropout, self.norm, self.huber)

    def neighbours(self, path: Path, batch: Batch) -> tuple[Tensor, Tensor]:
        """(t, u), u <= t as near as this moment of training says; equal at t_min alone; (B,) float64."""
        t = self.times.quantile(path, batch.draws.uniform(STREAM_T))
        tau = path.tau(t)
        ratio = falling_ratio(tau, batch.images, self.q, self.stage_images, self.stages, self.k, self.b)
        return t, path.time_from_tau(tau * ratio).clamp(min=path.t_min)


def adjacent_losses(
    flow_map: FlowMap,
    target: FlowMap,
    batch: Batch,
    times: tuple[Tensor, Tensor],
    dropout: float,
    norm: LossNorm,
    huber: float,
) -> Losses:
    """d( X(x_t, t, t_min), sg X_target(x_u, u, t_min) ) / (t - u) with one noise for both; 0 where t = u = t_min."""
    check_end(flow_map)
    (t, u), path, eps = times, flow_map.path, batch.noise()
    s, cond = torch.full_like(t, path.t_min), conditioned(batch, dropout)
    x, x_u = path.interpolate(batch.x0, eps, t), path.interpolate(batch.x0, eps, u)
    devices = [x.device] if x.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):  # both evaluations see the same dropout
        goal = target.jump(x_u, u, s, cond)
    reached = flow_map.jump(x, t, s, cond)
    compared = Comparison(reached - goal, reached)
    error = error_norm(batch.count(compared.error), norm, huber)
    weight = torch.where(t > u, 1 / torch.where(t > u, t - u, 1.0), 0.0).to(error.dtype)
    return Losses(weight * error, t, s, compared.sizes() | {"consistency": error.detach()})


@final
@dataclass(frozen=True)
class Tangent:
    """The step that sCM (2410.11081) takes at s = t_min: h = c R, R of math.md §5.1, as a target of N or of the map.

    Where the residual may be added to N, c = -g_t (cos t for trig: the paper's) and the error is N - sg(N + h); else
    c = -(t - s) and it is X - sg(X + h), for Euler on the EDM path nearly N - sg(N - t dN/dt).

    Warmed up, R = (f + g c_skip)(v - v_N) + r (rest) with v_N = f_s x + g_s N and f + g c_skip the share of x in the
    jump: the rest is -sin t (x + dN/dt) for trig. Normalising takes the rms in place of the paper's norm, so that the
    constant does not depend on the dimension.
    """

    warm_up_images: int = 0
    """Images seen over which r in R rises from 0 to 1; 0 begins with r = 1."""
    normalise: bool = True
    """Whether h becomes h / (rms(h) + constant)."""
    constant: float = 0.1
    """Added to rms(h), above 0; 0.1 in the paper."""
    derivative: DerivativeKind = "exact"
    """How dN/dt is taken: exact, by forward-mode AD, or finite-difference, by evaluations beside t."""
    step: float = 0.005
    """Step of the finite difference, above 0, in units of the path's or network's time scale."""

    def __post_init__(self) -> None:
        check_settings(0.0, 0.0, constant=self.constant)
        OutputDerivative(self.derivative, self.step).check()
        if self.warm_up_images < 0:
            raise ConfigError(f"warm_up_images is {self.warm_up_images}; it must be at least 0")

    def compare(self, flow_map: FlowMap, batch: Batch, x: Tensor, v: Tensor, t: Tensor, cond: Condition) -> Comparison:
        """N, or the map, against itself moved by h, with gradient through N alone; v (B, ...) drives the tangent."""
        own, s = flow_map.preconditioning, torch.full_like(t, flow_map.path.t_min)
        output, d_output = OutputDerivative(self.derivative, self.step).along_flow(flow_map, x, v, t, s, cond)
        frozen = output.detach()
        residual = eulerian_residual(flow_map, x, v, frozen, d_output, t, s)
        f, g, _, g_t = (expand(c, x).to(x.dtype) for c in own.derivatives(t, s))
        share = f + g * expand(flow_map.scaling.values(t).c_skip, x).to(x.dtype)
        straight = share * (v - flow_map.velocity_from_output(x, frozen, t))
        residual = straight + warm_up(batch.images, self.warm_up_images) * (residual - straight)
        scale = -g_t if own.target_in_network else -expand(t - s, x).to(x.dtype)
        step = scale * residual
        step = normalised(step, self.constant, batch.count(step)) if self.normalise else step
        moved = output - frozen
        if own.target_in_network:
            return Comparison(moved - step, output, d_output)
        return Comparison(g * moved - step, flow_map.apply_jump(x, output, t, s), d_output)


def continuous_losses(flow_map: FlowMap, batch: Batch, compared: Comparison, t: Tensor) -> Losses:
    """The mean square of the error, at s = t_min."""
    loss = error_norm(batch.count(compared.error), "l2", 0.0)
    logs = compared.sizes() | {"consistency": loss.detach()}
    return Losses(loss, t, torch.full_like(t, flow_map.path.t_min), logs)


@final
@dataclass(frozen=True)
class SCT(Objective):
    """sCT (2410.11081), continuous-time consistency training: |N - sg(N + h)|^2 with h of Tangent.

    The conditional velocity alpha' x0 + sigma' eps drives the tangent. The paper's learned weight in t is left out.
    """

    times: TimeDistribution = field(default_factory=lambda: LogNormalTimes(-1.0, 1.4))
    tangent: Tangent = field(default_factory=Tangent)
    dropout: float = 0.0
    """Probability in [0, 1] of hiding a sample's label; guidance needs a model without labels too."""

    def __post_init__(self) -> None:
        check_settings(self.dropout, 0.0)

    @property
    def to_data_end(self) -> bool:
        return True

    @property
    def differentiates(self) -> bool:
        return True

    @property
    def label_dropout(self) -> float:
        return self.dropout

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        check_end(flow_map, continuous=True)
        t = self.times.quantile(flow_map.path, batch.draws.uniform(STREAM_T))
        x, v = noised(flow_map.path, batch, t)
        cond = conditioned(batch, self.dropout)
        return continuous_losses(flow_map, batch, self.tangent.compare(flow_map, batch, x, v, t, cond), t)


@final
@dataclass(frozen=True)
class SCD(Objective):
    """sCD (2410.11081), continuous-time consistency distillation: |N - sg(N + h)|^2 with h of Tangent.

    The teacher's velocity drives the tangent, guided by the teacher's own without a label where `guidance` says: fixed,
    or drawn and fed to the student. The paper's learned weight in t is left out.
    """

    times: TimeDistribution = field(default_factory=lambda: LogNormalTimes(-0.8, 1.6))
    tangent: Tangent = field(default_factory=Tangent)
    guidance: TrainingGuidance = field(default_factory=NoGuidance)
    dropout: float = 0.0
    """Probability in [0, 1] of hiding a sample's label; guidance needs a model without labels too."""

    def __post_init__(self) -> None:
        check_settings(self.dropout, 0.0)

    @property
    def to_data_end(self) -> bool:
        return True

    @property
    def differentiates(self) -> bool:
        return True

    @property
    def label_dropout(self) -> float:
        return self.dropout

    @property
    def target_guidance(self) -> TrainingGuidance:
        return self.guidance

    @property
    def needs_teacher(self) -> bool:
        return True

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        check_end(flow_map, continuous=True)
        teacher = TeacherVelocity(flow_map.path, companions.master())
        t = self.times.quantile(flow_map.path, batch.draws.uniform(STREAM_T))
        x = noised(flow_map.path, batch, t)[0]
        cond = guided_condition(flow_map, batch, self.dropout, self.guidance)
        v = guided_velocity(teacher, x, t, cond, teacher.velocity(x, t, cond), self.guidance, batch)
        return continuous_losses(flow_map, batch, self.tangent.compare(flow_map, batch, x, v, t, cond), t)


@final
@dataclass(frozen=True)
class TeacherVelocity:
    """A teacher's velocity, without gradient, on another path than its own."""

    path: Path
    teacher: FlowMap

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """v(x, t), (B, ...)."""
        cond = cond if self.teacher.guided else replace(cond, guidance=None)
        with torch.no_grad():
            if self.teacher.path == self.path:
                return self.teacher.velocity(x, t, cond)
            return self.path.velocity_from_denoised(x, denoiser_on(self.path, self.teacher)(x, t, cond), t)


def check_end(flow_map: FlowMap, continuous: bool = False) -> None:
    """Raise ConfigError for a preconditioning that cannot jump to s = t_min of this path, or, in continuous time,
    whose network says nothing of the velocity."""
    own, path = flow_map.preconditioning, flow_map.path
    if isinstance(own, CMPreconditioning):
        if continuous:
            raise ConfigError("sCT and sCD need a network with a velocity: CM preconditioning has none; use BCM")
        if not (isinstance(path, EDM) and math.isclose(path.t_min, own.t_min, abs_tol=1e-6)):
            raise ConfigError(f"CM preconditioning jumps to {own.t_min} of the EDM path, not to {path.t_min} of {path}")
    if isinstance(own, TrigPreconditioning) and path.t_max - path.t_min > math.pi / 2 + 1e-9:
        raise ConfigError("trig preconditioning needs a clock of at most pi/2: use Euler or BCM on this path")
