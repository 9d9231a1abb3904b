"""What an objective is: a function of a flow map and a batch, giving one loss per sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import NoGuidance, TrainingGuidance
from fewstep.utils.errors import ConfigError
from fewstep.utils.random import Draws
from fewstep.utils.tensors import expand

Acting = Literal["map", "gamma", "euler", "mean"]
"""How a policy samples: by jumps, by jumps to the data end, by Euler's method, or by one jump from zero."""

STREAM_NOISE, STREAM_T, STREAM_S = 10, 11, 12


@dataclass(frozen=True)
class Batch:
    """Data x0 (B, ...), labels (B,) int64 or None, and the random numbers of these samples.

    images: seen in training before this batch, which curricula are functions of. observation: (B, To, Do) that
    the samples are conditioned on. counted: (B, ...) bool, broadcasting to x0: the numbers that a loss may count; None
    for all.
    """

    x0: Tensor
    labels: Tensor | None
    draws: Draws
    images: int = 0
    observation: Tensor | None = None
    counted: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> Batch:
        labels, observation, counted = (
            None if each is None else each[rows] for each in (self.labels, self.observation, self.counted)
        )
        draws = replace(self.draws, indices=self.draws.indices[rows])
        return Batch(self.x0[rows], labels, draws, self.images, observation, counted)

    def noise(self) -> Tensor:
        """Standard normal, shape and dtype of x0."""
        return self.draws.normal(STREAM_NOISE, tuple(self.x0.shape[1:]), self.x0.dtype)

    def count(self, error: Tensor, rows: Tensor | None = None) -> Tensor:
        """An error (B, ...), or that of some rows, with zeros for the numbers that do not count, the others scaled up.

        The mean square over all numbers is then the mean square over those that count.
        """
        if self.counted is None:
            return error
        counted = (self.counted if rows is None else self.counted[rows]).expand_as(error)
        share = counted.flatten(1).to(error.dtype).mean(1)
        return error * counted * expand(share.clamp(min=1e-12).rsqrt(), error)


class Generated(NamedTuple):
    """Samples (B, ...) at the data end that a critic may learn from, without gradient.

    labels: (B,) of the classes that they were asked for, NULL_LABEL where the label was dropped; None without classes.
    """

    samples: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class Losses:
    """Per-sample losses (B,), the times they were taken at, and detached values worth logging.

    logs: of those samples that have the value, (k,) with k from 0 to B. terms: parts (B,) that add up to the loss, with
    their graphs; empty where it has one part.
    generated: what a critic may learn from; None where there is no such loss.
    """

    loss: Tensor
    t: Tensor
    s: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)
    generated: Generated | None = None

    def mean(self) -> Tensor:
        """The batch's loss."""
        return self.loss.mean()


def _own(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Companions:
    """What an objective may consult beside the flow map in training; none of it is trained by the objective.

    teacher: the model to distil. target: a slow average of the flow map. features: images (B, ...) -> (B, d),
    differentiable. critic: samples and labels to scores (B,), for an adversarial loss; None while it is off.
    average: the mean of a tensor over processes.
    """

    teacher: FlowMap | None = None
    target: FlowMap | None = None
    features: Callable[[Tensor], Tensor] | None = None
    critic: Callable[[Tensor, Tensor | None], Tensor] | None = None
    average: Callable[[Tensor], Tensor] = _own

    def master(self) -> FlowMap:
        """The teacher; raises ConfigError when there is none."""
        if self.teacher is None:
            raise ConfigError("this objective distils a teacher: name its run with --teacher")
        return self.teacher

    def slow(self) -> FlowMap:
        """The slow average; raises ConfigError when there is none."""
        if self.target is None:
            raise ConfigError("this objective needs a slow average of the model beside it")
        return self.target

    def perception(self) -> Callable[[Tensor], Tensor]:
        """The features; raises ConfigError when there are none."""
        if self.features is None:
            raise ConfigError("a distance of features needs an extractor: none was given to the training loop")
        return self.features


ALONE = Companions()


class Objective(ABC):
    """Subclasses are final frozen dataclasses; an objective holds settings and no state."""

    @abstractmethod
    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        """The losses of a batch."""

    @property
    @abstractmethod
    def label_dropout(self) -> float:
        """Probability with which labels are replaced by the null label."""

    @property
    def on_diagonal(self) -> bool:
        """Whether the network is only ever asked at s = t."""
        return False

    @property
    def to_data_end(self) -> bool:
        """Whether only jumps to s = t_min are trained: such a map has no velocity, and re-noises between steps."""
        return False

    @property
    def anchored(self) -> bool:
        """Whether anything in it ties the map to the data, or to a teacher, with these settings."""
        return True

    @property
    def differentiates(self) -> bool:
        """Whether it compares evaluations of one network at neighbouring times, which dropout would make two."""
        return False

    @property
    def needs_velocity(self) -> bool:
        """Whether it reads the velocity off the diagonal, which CM preconditioning has not."""
        return True

    @property
    def acting(self) -> Acting:
        """The sampler that a policy trained by it acts with."""
        if self.on_diagonal:
            return "euler"
        return "gamma" if self.to_data_end else "map"

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher must be given."""
        return False

    @property
    def target_decay(self) -> float | None:
        """Decay per step of the slow average that the objective consults; None when it consults none."""
        return None

    @property
    def needs_critic(self) -> bool:
        """Whether a critic must be trained beside the flow map."""
        return False

    @property
    def measures_features(self) -> bool:
        """Whether a feature extractor must be given."""
        return False

    @property
    def target_guidance(self) -> TrainingGuidance:
        """How its targets are guided towards their class."""
        return NoGuidance()

    @property
    def guided(self) -> bool:
        """Whether the network must take guidance as an input."""
        return self.target_guidance.conditions_network
