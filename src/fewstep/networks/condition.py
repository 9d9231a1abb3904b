"""What a network is conditioned on besides the two times: a class label, an observation, a strength of guidance."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

NULL_LABEL = -1


@dataclass(frozen=True)
class Condition:
    """Per-sample conditions of a batch.

    labels: (B,) int64 in [0, num_classes), or NULL_LABEL (-1) for "no class"; None means no class for the whole batch.
    guidance: (B, 3) float: log omega, and the ends t_lo, t_hi of the guidance interval as fractions in [0, 1] of the
        path's range (Path.time_from_unit); only for networks built with guided=True, where None means omega = 1.
    observation: (B, To, Do) normalised, what a policy saw last; for networks built to take it, which must have it.
    text: (B, L, D), embeddings of a prompt's tokens; text_mask: (B, L) bool, which of them count, None for all;
        pooled: (B, P), one embedding of the whole. Only for foreign networks of text (fewstep.teachers).
    """

    labels: Tensor | None = None
    guidance: Tensor | None = None
    observation: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    pooled: Tensor | None = None

    def without_labels(self) -> "Condition":
        """The same conditions with every label replaced by NULL_LABEL."""
        return replace(self, labels=None if self.labels is None else torch.full_like(self.labels, NULL_LABEL))

    def __getitem__(self, index: Tensor | slice) -> "Condition":
        parts = (getattr(self, field.name) for field in fields(self))
        return Condition(*(None if part is None else part[index] for part in parts))
