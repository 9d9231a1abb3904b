"""What an objective is: a function of a flow map, a batch and companions, giving one loss per sample."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import NoGuidance, TrainingGuidance, dropped, guide
from fewstep.flow.paths import Path
from fewstep.networks.condition import Condition, Prompts
from fewstep.utils.errors import ConfigError
from fewstep.utils.random import Draws
from fewstep.utils.tensors import check_share, expand, on_host, rows_where

Acting = Literal["map", "gamma", "euler", "mean"]
"""How a policy samples: by jumps, by jumps to the data end, by Euler's method, or by one jump from zero."""

DiscriminatorFunction = Callable[[Tensor, Tensor | None], Tensor]
"""Samples (B, ...) and labels (B,) or None to scores (B,): high for what looks real."""

STREAM_NOISE, STREAM_T, STREAM_S, STREAM_U = 10, 11, 12, 13

T = TypeVar("T")


def is_diagonal(indices: Tensor, share: float) -> Tensor:
    """Which samples of the global batch take s = t: evenly spread, a function of their index alone. (B,) bool."""
    count = indices.double()  # float32 would miscount
    return torch.floor((count + 1) * share + 1e-9) > torch.floor(count * share + 1e-9)


@dataclass(frozen=True)
class Batch:
    """Data x0 (B, ...), labels (B,) int64 or None, and the random numbers of these samples.

    images: seen in training before this batch, which curricula are functions of. observation: (B, To, Do) that
    the samples are conditioned on. loss_mask: (B, ...) bool, broadcasting to x0: the numbers that a loss may count;
    None for all. places, host_labels: (B,) int64 on the host, the samples' indices in the global batch and their
    labels, by which rows are chosen without asking the device; None reads those above. prompts: that the samples are
    conditioned on.
    """

    x0: Tensor
    labels: Tensor | None
    draws: Draws
    images: int = 0
    observation: Tensor | None = None
    loss_mask: Tensor | None = None
    places: Tensor | None = None
    prompts: Prompts | None = None
    host_labels: Tensor | None = None

    def take(self, places: Tensor, rows: Tensor) -> "Batch":
        """The samples of these rows (k,), which are given on the host and on the device."""
        labels, observation, loss_mask = (
            None if each is None else each[rows] for each in (self.labels, self.observation, self.loss_mask)
        )
        here = (None if each is None else each[places] for each in (self.places, self.host_labels))
        draws = replace(self.draws, indices=self.draws.indices[rows])
        prompts = None if self.prompts is None else self.prompts[rows]
        return Batch(self.x0[rows], labels, draws, self.images, observation, loss_mask, next(here), prompts, next(here))

    def __getitem__(self, rows: Tensor) -> "Batch":
        known = self.places is not None or self.host_labels is not None
        return self.take(rows.cpu() if known else rows, rows)

    def on_host(self) -> "Batch":
        """What is known of the samples on the host: random numbers, labels, and which prompts are kept. No data."""
        places = self.draws.indices.cpu() if self.places is None else self.places
        labels = self.host_labels if self.labels is None or self.host_labels is not None else self.labels.cpu()
        prompts = self.prompts if self.prompts is None else self.prompts.on_host()
        draws = replace(self.draws, indices=places)
        return Batch(torch.empty(len(places), 0), labels, draws, self.images, None, None, places, prompts, labels)

    def matched(self, share: float) -> Tensor:
        """Which samples take s = t, a `share` of all: (B,) bool, on the device."""
        return is_diagonal(self.draws.indices, share)

    def split(self, share: float) -> tuple[Tensor, Tensor]:
        """Rows of the samples that take s = t, a `share` of all, and of the others; decided on the host."""
        first, second = (rows.to(self.x0.device, non_blocking=True) for rows in self._split(share))
        return first, second

    def halves(self, share: float) -> "tuple[tuple[Batch, Batch], tuple[Tensor, Tensor]]":
        """The samples of `split`, and the rows themselves."""
        first, second = (
            (self.take(rows, moved), moved) for rows, moved in zip(self._split(share), self.split(share), strict=True)
        )
        return (first[0], second[0]), (first[1], second[1])

    def _split(self, share: float) -> tuple[Tensor, Tensor]:
        on = is_diagonal(self.draws.indices.cpu() if self.places is None else self.places, share)
        return rows_where(on), rows_where(~on)

    def noise(self) -> Tensor:
        """Standard normal, shape and dtype of x0."""
        return self.draws.normal(STREAM_NOISE, tuple(self.x0.shape[1:]), self.x0.dtype)

    def masked(self, error: Tensor, rows: Tensor | None = None) -> Tensor:
        """An error (B, ...), or that of some rows, with zeros for the numbers that do not count, the others scaled up.

        The mean square over all numbers is then the mean square over those that count.
        """
        if self.loss_mask is None:
            return error
        mask = (self.loss_mask if rows is None else self.loss_mask[rows]).expand_as(error)
        share = mask.flatten(1).to(error.dtype).mean(1)
        return error * mask * expand(share.clamp(min=1e-12).rsqrt(), error)


class FakeSamples(NamedTuple):
    """Samples (B, ...) at the data end that a discriminator may learn from, without gradient.

    labels: (B,) of the classes that they were asked for, NULL_LABEL where the label was dropped; None without classes.
    """

    samples: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class Losses:
    """Per-sample losses (B,), the times they were taken at, and detached values worth logging.

    logs: of those samples that have the value, (k,) with k from 0 to B. terms: parts (B,) that add up to the loss, with
    their graphs; empty where it has one part.
    generated: what a discriminator may learn from; None where there is no such loss.
    """

    loss: Tensor
    t: Tensor
    s: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)
    generated: FakeSamples | None = None

    def mean(self) -> Tensor:
        """The batch's loss."""
        return self.loss.mean()


class Companions:
    """What an objective may consult beside the flow map in training; none of it is trained by the objective.

    discriminator: for an adversarial loss; None while it is off. average: the mean of a tensor over processes.
    """

    def __init__(
        self,
        teacher: FlowMap | None = None,
        ema_target: FlowMap | None = None,
        perceptual_features: Callable[[Tensor], Tensor] | None = None,
        discriminator: DiscriminatorFunction | None = None,
        average: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> None:
        self._teacher, self._ema_target, self._features = teacher, ema_target, perceptual_features
        self.discriminator, self.average = discriminator, average

    @property
    def teacher(self) -> FlowMap:
        """The model to distil; raises ConfigError when there is none."""
        return _given(self._teacher, "this objective distils a teacher: name its run with --teacher")

    @property
    def ema_target(self) -> FlowMap:
        """A slow average of the flow map; raises ConfigError when there is none."""
        return _given(self._ema_target, "this objective needs a slow average of the model beside it")

    @property
    def perceptual_features(self) -> Callable[[Tensor], Tensor]:
        """Images (B, ...) -> (B, d), differentiable; raises ConfigError when there are none."""
        message = "a distance of features needs an extractor: none was given to the training loop"
        return _given(self._features, message)


def _given(value: T | None, message: str) -> T:
    if value is None:
        raise ConfigError(message)
    return value


ALONE = Companions()


class Velocities(Protocol):
    """What has a velocity on a path: a flow map, or a teacher carried over to the flow map's path."""

    @property
    def path(self) -> Path:
        """Whose clock the times are in."""

    @property
    def takes_guidance(self) -> bool:
        """Whether the condition's guidance is an input."""

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """v(x, t), (B, ...); x (B, ...), t (B,)."""


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Subclasses are frozen dataclasses, abstract or final; an objective holds settings and no state."""

    label_dropout: float = 0.0
    """Probability in [0, 1] of hiding a sample's label and prompt; guidance needs a model without them too."""

    def __post_init__(self) -> None:
        check_share("label dropout", self.label_dropout)
        if self.target_decay is not None and not 0 <= self.target_decay < 1:
            raise ConfigError(f"decay of the target is {self.target_decay}; it must lie in [0, 1)")

    @abstractmethod
    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        """The losses of a batch."""

    def condition(self, flow_map: FlowMap, batch: Batch, t: Tensor) -> Condition:
        """Labels and prompts with dropout, observations, and for networks that take it the guidance at times t (B,).

        Raises ConfigError for drawn guidance with a network that does not take it.
        """
        cond = Condition(batch.labels, observation=batch.observation, prompts=batch.prompts)
        if self.label_dropout and cond.kept is not None:
            cond = cond.drop(dropped(self.label_dropout, batch.draws))
        if self.guidance.conditions_network and cond.kept is not None and not flow_map.guided:
            raise ConfigError("drawn guidance needs a network that takes it as an input: build it with guided=True")
        return replace(cond, guidance=self.guidance.fed(flow_map.path, batch.draws, t)) if flow_map.guided else cond

    def guide(self, model: Velocities, batch: Batch, x: Tensor, t: Tensor, cond: Condition, v: Tensor) -> Tensor:
        """v_null + omega (v - v_null), v_null the model's own velocity unconditioned and without gradient.

        Guided where a label or prompt is kept and t lies in the guidance interval; v (B, ...) elsewhere.
        """
        if not self.guidance.active or cond.kept is None:
            return v
        omega = self.guidance.strength(model.path, batch.draws, t, cond.kept)
        rows = self.guided_rows(model.path, batch, omega)
        if len(rows) == 0:
            return v
        with torch.no_grad():
            null = model.velocity(x[rows], t[rows], cond[rows].unconditional())
        return v.index_copy(0, rows, guide(null, v[rows], omega[rows]))

    def guided_rows(self, path: Path, batch: Batch, omega: Tensor) -> Tensor:
        """Rows (k,) whose strength omega (B,) is not 1; of another device they are found again on the host."""
        if on_host(omega):
            return rows_where(omega != 1)
        rows = self.rows_on_host(path, batch)
        return rows_where(omega.cpu() != 1, omega.device) if rows is None else rows.to(omega.device, non_blocking=True)

    def rows_on_host(self, path: Path, batch: Batch) -> Tensor | None:
        """`guided_rows` by the batch's random numbers and labels; None where `target_times` says nothing."""
        own = batch.on_host()
        t, kept = self.target_times(path, own), Condition(own.labels, prompts=own.prompts).kept
        if t is None or kept is None:
            return None
        if self.label_dropout:
            kept = kept & ~dropped(self.label_dropout, own.draws)
        return rows_where(self.guidance.strength(path, own.draws, t, kept) != 1)

    def target_times(self, path: Path, batch: Batch) -> Tensor | None:
        """The times (B,) at which the targets of a batch are guided, by its draws alone; None where that is not said.

        Where it is, guidance finds its rows on the host, and the device is not asked.
        """
        return None

    def guided_velocity(self, model: Velocities, batch: Batch, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """v(x, t) of a model, (B, ...), guided by its own without a label, or by its own input of a strength."""
        asked = self.teacher_condition(batch, cond)
        if model.takes_guidance:
            return model.velocity(x, t, asked)
        cond = replace(cond, guidance=None)
        return self.guide(model, batch, x, t, cond, model.velocity(x, t, cond))

    def teacher_condition(self, batch: Batch, cond: Condition) -> Condition:
        """The condition with the strength and interval that a teacher is guided by; with none where it is not."""
        return replace(cond, guidance=self.guidance.draw(batch.draws) if self.guidance.active else None)

    def method(self, preconditioning: str, labelled: bool) -> str:
        """What figures call it; preconditioning: that of its map. labelled: whether the data have classes."""
        return type(self).__name__

    def forward_passes(self, bf16: bool = False) -> tuple[float, float]:
        """Evaluations of a sample in a step's forward passes, and how many of these bf16 leaves in float32.

        One with a tangent is 2, one backward 2. Raises ConfigError for an objective whose evaluations are not counted.
        """
        raise ConfigError(f"the evaluations of {type(self).__name__} are not counted: see fewstep objectives")

    @property
    def anchored(self) -> bool:
        """Whether anything in it ties the map to the data, or to a teacher, with these settings."""
        return True

    differentiates: ClassVar[bool] = False
    """Whether it compares evaluations of one network at neighbouring times, which dropout would make two."""
    passes_back_tangents: ClassVar[bool] = False
    """Whether its gradient flows through such a derivative, and not through the evaluation alone."""
    needs_velocity: ClassVar[bool] = True
    """Whether it reads the velocity off the diagonal, which CM preconditioning has not."""

    @property
    def acting(self) -> Acting:
        """The sampler that a policy trained by it acts with."""
        if self.on_diagonal:
            return "euler"
        return "gamma" if self.endpoint_only else "map"

    on_diagonal: ClassVar[bool] = False
    """Whether the network is only ever asked at s = t."""

    endpoint_only = False
    """Whether only jumps to s = t_min are trained: such a map has no velocity, and re-noises between steps."""
    needs_teacher: ClassVar[bool] = False
    """Whether a teacher must be given."""

    @property
    def target_decay(self) -> float | None:
        """Decay per step of the slow average that the objective consults; None when it consults none."""
        return None

    @property
    def needs_discriminator(self) -> bool:
        """Whether a discriminator must be trained beside the flow map."""
        return False

    @property
    def measures_features(self) -> bool:
        """Whether a feature extractor must be given."""
        return False

    @property
    def guidance(self) -> TrainingGuidance:
        """How its targets are guided towards their class."""
        return NoGuidance()

    @property
    def guided(self) -> bool:
        """Whether the network must take guidance as an input."""
        return self.guidance.conditions_network
