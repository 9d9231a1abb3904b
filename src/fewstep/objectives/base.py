"""What an objective is: a function of a flow map and a batch, giving one loss per sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor

from fewstep.flowmap import FlowMap
from fewstep.randomness import Draws

STREAM_NOISE, STREAM_T, STREAM_S = 10, 11, 12


@dataclass(frozen=True)
class Batch:
    """Data x0 (B, ...), labels (B,) int64 or None, and the random numbers of these samples."""

    x0: Tensor
    labels: Tensor | None
    draws: Draws

    def noise(self) -> Tensor:
        """Standard normal, shape and dtype of x0."""
        return self.draws.normal(STREAM_NOISE, tuple(self.x0.shape[1:]), self.x0.dtype)


@dataclass(frozen=True)
class Losses:
    """Per-sample losses (B,), the times they were taken at, and detached per-sample values worth logging."""

    loss: Tensor
    t: Tensor
    s: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)

    def mean(self) -> Tensor:
        """The batch's loss."""
        return self.loss.mean()


class Objective(ABC):
    """Subclasses are final frozen dataclasses; an objective holds settings and no state."""

    @abstractmethod
    def __call__(self, flow_map: FlowMap, batch: Batch) -> Losses:
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
    @abstractmethod
    def guided(self) -> bool:
        """Whether the network must take guidance as an input."""
