"""sCM (2410.11081): consistency training and distillation in continuous time, to s = t_min alone (math.md section 5.2).

Neighbours in the limit: the difference of adjacent points is a derivative. The paper's learned weight in t is left out.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fewstep.flow.derivatives import Derivative
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import NoGuidance, TrainingGuidance
from fewstep.flow.paths import Path
from fewstep.flow.times import LogNormalTimes, TimeDistribution
from fewstep.networks.condition import Condition
from fewstep.objectives.base import ALONE, STREAM_T, Batch, Companions, Losses, Objective
from fewstep.objectives.eulerian import eulerian_residual
from fewstep.objectives.losses import Comparison, error_norm, normalised
from fewstep.objectives.pairs import Times
from fewstep.teachers import denoiser_on
from fewstep.utils.errors import ConfigError
from fewstep.utils.tensors import check_least, check_positive, expand

LEAST = 1e-3
"""Noise level tau below which a velocity read off a denoiser, (x - alpha D)/sigma, is rounding."""


@final
@dataclass(frozen=True)
class Tangent:
    """The step that sCM takes at s = t_min: h = c R, R of math.md section 5.1, as a target of N or of the map.

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
    derivative: Derivative = Derivative()

    def __post_init__(self) -> None:
        check_positive(constant=self.constant)
        check_least(0, warm_up_images=self.warm_up_images)

    def warmed_up(self, images: int) -> float:
        """r, which rises from 0 to 1 over the images seen."""
        return min(images / self.warm_up_images, 1.0) if self.warm_up_images else 1.0

    def residual(
        self, flow_map: FlowMap, batch: Batch, x: Tensor, v: Tensor, times: Times, cond: Condition
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(N, dN/dt, R) at (x, t, s), times = (t, s), along v (B, ...); R is warmed up and has no gradient."""
        t, s = times
        output, d_output = self.derivative.along(flow_map, x, v, t, s, cond)
        frozen = output.detach()
        residual = eulerian_residual(flow_map, x, v, frozen, d_output, t, s, cond)
        g = expand(flow_map.preconditioning.coefficients(t, s)[1], x).to(x.dtype)
        change = v - flow_map.velocity_from_output(x, frozen, t)
        c_skip = expand(flow_map.scaling.values(t).c_skip, x).to(x.dtype)
        straight = flow_map.jumping(cond).passed(flow_map.path, change, t, s) + g * c_skip * change
        return output, d_output, straight + self.warmed_up(batch.images) * (residual - straight)

    def normalised(self, batch: Batch, step: Tensor) -> Tensor:
        """h / (rms(h) + constant) where that is asked for, the rms of those numbers that a loss may count."""
        return normalised(step, self.constant, batch.masked(step)) if self.normalise else step

    def compare(self, flow_map: FlowMap, batch: Batch, x: Tensor, v: Tensor, t: Tensor, cond: Condition) -> Comparison:
        """N, or the map, against itself moved by h, with gradient through N alone; v (B, ...) drives the tangent."""
        own, s = flow_map.preconditioning, torch.full_like(t, flow_map.path.t_min)
        output, d_output, residual = self.residual(flow_map, batch, x, v, (t, s), cond)
        _, g, _, g_t = (expand(c, x).to(x.dtype) for c in own.derivatives(t, s))
        scale = -g_t if own.target_in_network else -expand(t - s, x).to(x.dtype)
        step, moved = self.normalised(batch, scale * residual), output - output.detach()
        if own.target_in_network:
            return Comparison(moved - step, output, d_output)
        return Comparison(g * moved - step, flow_map.apply_jump(x, output, t, s, cond), d_output)


@dataclass(frozen=True, kw_only=True)
class ContinuousObjective(Objective):
    """|N - sg(N + h)|^2 at s = t_min with h of Tangent."""

    times: TimeDistribution = LogNormalTimes(-1.0, 1.4)
    tangent: Tangent = Tangent()

    endpoint_only = True
    differentiates: ClassVar[bool] = True

    @abstractmethod
    def driving(
        self, flow_map: FlowMap, batch: Batch, t: Tensor, cond: Condition, companions: Companions
    ) -> tuple[Tensor, Tensor]:
        """(x_t, the velocity that drives the tangent), (B, ...) each."""

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        if flow_map.preconditioning.data_end_only:
            raise ConfigError("sCT and sCD need a network with a velocity: CM preconditioning has none; use BCM")
        flow_map.preconditioning.check_end(flow_map.path)
        t = self.times.quantile(flow_map.path, batch.draws.uniform(STREAM_T))
        cond = self.condition(flow_map, batch, t)
        x, v = self.driving(flow_map, batch, t, cond, companions)
        compared = self.tangent.compare(flow_map, batch, x, v, t, cond)
        loss = error_norm(batch.masked(compared.error), "l2", 0.0)
        logs = compared.sizes() | {"consistency": loss.detach()}
        return Losses(loss, t, torch.full_like(t, flow_map.path.t_min), logs)


@final
@dataclass(frozen=True, kw_only=True)
class SCT(ContinuousObjective):
    """sCT, continuous-time consistency training: the conditional velocity alpha' x0 + sigma' eps drives the tangent."""

    def method(self, preconditioning: str, labelled: bool) -> str:
        return "sCT"

    def driving(
        self, flow_map: FlowMap, batch: Batch, t: Tensor, cond: Condition, companions: Companions
    ) -> tuple[Tensor, Tensor]:
        return flow_map.path.sample(batch.x0, batch.noise(), t)


@final
@dataclass(frozen=True, kw_only=True)
class SCD(ContinuousObjective):
    """sCD, continuous-time consistency distillation: the teacher's velocity drives the tangent.

    It is guided by the teacher's own without a label where `guidance` says: fixed, or drawn and fed to the student.
    """

    times: TimeDistribution = LogNormalTimes(-0.8, 1.6)
    guidance: TrainingGuidance = NoGuidance()

    def method(self, preconditioning: str, labelled: bool) -> str:
        return "sCD"

    needs_teacher: ClassVar[bool] = True

    def target_times(self, path: Path, batch: Batch) -> Tensor | None:
        return self.times.quantile(path, batch.draws.uniform(STREAM_T))

    def driving(
        self, flow_map: FlowMap, batch: Batch, t: Tensor, cond: Condition, companions: Companions
    ) -> tuple[Tensor, Tensor]:
        teacher = TeacherVelocity(flow_map.path, companions.teacher)
        x = flow_map.path.interpolate(batch.x0, batch.noise(), t)
        return x, self.guided_velocity(teacher, batch, x, t, cond)


@final
@dataclass(frozen=True)
class TeacherVelocity:
    """A teacher's velocity, without gradient, on another path than its own."""

    path: Path
    teacher: FlowMap

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """v(x, t), (B, ...); times of less noise than the teacher knows, or than LEAST, are taken there."""
        t = self.path.clock(t).clamp(min=self.lowest())
        with torch.no_grad():
            if self.teacher.path == self.path:
                return self.teacher.velocity(x, t, cond)
            return self.path.velocity_from_denoised(x, denoiser_on(self.path, self.teacher)(x, t, cond), t)

    @property
    def takes_guidance(self) -> bool:
        return self.teacher.takes_guidance

    def lowest(self) -> float:
        """The time of the least noise at which the teacher has a velocity."""
        known = self.teacher.path.tau(torch.tensor([self.teacher.path.t_min], dtype=torch.float64))
        (lowest,) = self.path.time_from_tau(known.clamp(min=LEAST)).tolist()
        return float(lowest)
