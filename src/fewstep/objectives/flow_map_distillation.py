"""Continuous flow maps from a teacher, to any s: its velocity drives the tangent, or is met where the jump ends.

Where s = t the map's own velocity is regressed on the teacher's (math.md sections 4, 5.1 and 5.2).
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

import torch
from torch import Tensor

from fewstep.flow.derivatives import Derivative
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import Path
from fewstep.flow.times import LogitNormalTimes
from fewstep.objectives.base import ALONE, Batch, Companions, Losses
from fewstep.objectives.eulerian import step_error
from fewstep.objectives.losses import Comparison
from fewstep.objectives.pairs import AnchoredObjective, Pairs
from fewstep.objectives.scm import Tangent, TeacherVelocity
from fewstep.objectives.self_distillation import moving_end
from fewstep.utils.tensors import check_choice

Driver = Literal["teacher", "own"]


@dataclass(frozen=True, kw_only=True)
class FlowMapDistillation(AnchoredObjective):
    """w |v(x_t, t) - v_teacher(x_t, t)|^2 where s = t; the method's own error elsewhere.

    The teacher is guided by its own velocity without a label where `guidance` says.
    """

    label_dropout: float = 0.0
    pairs: Pairs = Pairs(times=LogitNormalTimes(), flow_matching_ratio=0.25)

    differentiates: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        t, s = self.pairs.draw(flow_map.path, batch)
        teacher = TeacherVelocity(flow_map.path, companions.teacher)

        def compare(own: Batch, rows: Tensor) -> Comparison:
            return self.off_diagonal(flow_map, teacher, own, t[rows], s[rows])

        return self.split(flow_map, batch, (t, s), self.pairs.flow_matching_ratio, compare, teacher)

    def target_times(self, path: Path, batch: Batch) -> Tensor | None:
        return self.pairs.draw(path, batch)[0]

    @abstractmethod
    def off_diagonal(
        self, flow_map: FlowMap, teacher: TeacherVelocity, batch: Batch, t: Tensor, s: Tensor
    ) -> Comparison:
        """The error of samples with s < t."""

    def forward_passes(self, bf16: bool = False) -> tuple[float, float]:
        """Every sample asks the teacher, twice where it is guided; those with s = t are spared the derivative.

        With the model's own velocity a sample with s < t asks the model instead, and is not guided."""
        off, teacher = 1 - self.pairs.flow_matching_ratio, 1 + self.guidance.share(self.label_dropout)
        added, wide = self.derivative_passes(bf16)
        return 3 + teacher + added * off, wide * off

    @abstractmethod
    def derivative_passes(self, bf16: bool) -> tuple[float, float]:
        """What the derivative adds to a sample with s < t, as `forward_passes`."""


@final
@dataclass(frozen=True, kw_only=True)
class EMD(FlowMapDistillation):
    """Eulerian map distillation: w |N - sg(N + R)|^2, R = d/dt X(x_t, t, s) along the teacher's velocity.

    R is warmed up, and normalised where that is asked for (`Tangent`). `velocity` own: along sg v(x_t, t), the model's
    own velocity, which the samples with s = t tie to the teacher's: iSD (2601.22679) from a teacher. With
    `weighting.weight_power` 1 and no normalisation it is MeanFlow (2505.13447) from a teacher.

    Source: AYF-EMD, 2506.14603; for any path and preconditioning math.md section 5.1.
    Deviations: pairs are two ordered draws, a share of them with s = t; the tangent's norm is its root mean square;
    guidance is the teacher's own without a label, not of a weaker model.
    """

    tangent: Tangent = Tangent()
    velocity: Driver = "teacher"
    """Which velocity drives the tangent: the teacher's, or the model's own, detached."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("velocity", self.velocity, get_args(Driver))

    @property
    def anchored(self) -> bool:
        return self.velocity == "teacher" or self.pairs.flow_matching_ratio > 0

    def derivative_passes(self, bf16: bool) -> tuple[float, float]:
        return self.tangent.derivative.evaluations(bf16)

    def off_diagonal(
        self, flow_map: FlowMap, teacher: TeacherVelocity, batch: Batch, t: Tensor, s: Tensor
    ) -> Comparison:
        x, cond = flow_map.path.interpolate(batch.x0, batch.noise(), t), self.condition(flow_map, batch, t)
        if self.velocity == "teacher":
            v = self.guided_velocity(teacher, batch, x, t, cond)
        else:
            with torch.no_grad():
                v = flow_map.velocity(x, t, cond)
        output, d_output, residual = self.tangent.residual(flow_map, batch, x, v, (t, s), cond)
        return step_error(flow_map, x, output, d_output, self.tangent.normalised(batch, residual), t, s, cond)


@final
@dataclass(frozen=True, kw_only=True)
class LMD(FlowMapDistillation):
    """Lagrangian map distillation: w |d_s X(x_t, t, s) - sg v_teacher(X(x_t, t, s), s)|^2.

    Source: 2406.07507.
    Deviations: the teacher's velocity, and the point where it is taken, are detached, as 2505.18825 does for LSD: no
    gradient passes through the teacher.
    """

    derivative: Derivative = Derivative()

    passes_back_tangents: ClassVar[bool] = True

    def derivative_passes(self, bf16: bool) -> tuple[float, float]:
        """Its gradient passes back through the derivative."""
        added, wide = self.derivative.evaluations(bf16)
        return 3 * added, 3 * wide

    def target_times(self, path: Path, batch: Batch) -> Tensor | None:
        """Where jumps end, which is where they begin for samples with s = t."""
        return self.pairs.draw(path, batch)[1]

    def off_diagonal(
        self, flow_map: FlowMap, teacher: TeacherVelocity, batch: Batch, t: Tensor, s: Tensor
    ) -> Comparison:
        x, cond = flow_map.path.interpolate(batch.x0, batch.noise(), t), self.condition(flow_map, batch, t)
        reached, d_reached, d_output = moving_end(self.derivative, flow_map, x, t, s, cond)
        v = self.guided_velocity(teacher, batch, reached.detach(), s, cond)
        return Comparison(d_reached - v, d_reached, d_output)
