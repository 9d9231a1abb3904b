"""What a network is conditioned on besides the two times: a label, a prompt, an observation, a strength of guidance."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

NULL_LABEL = -1


@dataclass(frozen=True)
class Prompts:
    """Embedded prompts of a batch.

    text: (B, L, D), embeddings of a prompt's tokens; mask: (B, L) bool, which of them count, None for all;
    pooled: (B, P), one embedding of the whole. null: those of the empty prompt, of one row, with masks and pooled
    embeddings as here; None for zeros. kept: (B,) bool, False where the empty prompt stands in for another; None keeps
    all.
    """

    text: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    null: "Prompts | None" = None
    kept: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: Tensor | slice) -> "Prompts":
        mask, pooled, kept = (None if each is None else each[index] for each in (self.mask, self.pooled, self.kept))
        return Prompts(self.text[index], mask, pooled, self.null, kept)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Prompts":
        """The same on a device; non_blocking as of a tensor."""
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Prompts":
        """The same in memory from which a GPU copies by itself."""
        return self._each(lambda value: value.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Prompts":
        mask, pooled, kept = (None if each is None else change(each) for each in (self.mask, self.pooled, self.kept))
        return Prompts(change(self.text), mask, pooled, None if self.null is None else self.null._each(change), kept)

    def on_host(self) -> "Prompts":
        """Which of them are kept, without the embeddings."""
        kept = None if self.kept is None else self.kept.cpu()
        return Prompts(torch.empty(len(self.text), 1, 1), kept=kept)

    def drop(self, dropped: Tensor) -> "Prompts":
        """The same with the empty prompt where `dropped` (B,) bool says so."""
        null = Prompts(torch.zeros_like(self.text[:1])) if self.null is None else self.null
        kept = ~dropped if self.kept is None else self.kept & ~dropped
        mask = None if self.mask is None else _replaced(self.mask, null.mask, dropped)
        pooled = None if self.pooled is None else _replaced(self.pooled, null.pooled, dropped)
        return replace(self, text=_replaced(self.text, null.text, dropped), mask=mask, pooled=pooled, kept=kept)


def _replaced(values: Tensor, null: Tensor | None, dropped: Tensor) -> Tensor:
    """Rows `dropped` of values (B, ...) become the one row of `null`; zeros, of a mask ones, where there is none."""
    if null is None:
        null = torch.full_like(values[:1], values.dtype == torch.bool)
    return torch.where(dropped.reshape(-1, *[1] * (values.ndim - 1)), null.to(values), values)


@dataclass(frozen=True)
class Condition:
    """Per-sample conditions of a batch.

    labels: (B,) int64 in [0, num_classes), or NULL_LABEL (-1) for "no class"; None means no class for the whole batch.
    guidance: (B, 3) float: log omega, and the ends t_lo, t_hi of the guidance interval as fractions in [0, 1] of the
        path's range (Path.time_from_unit); only for networks built with guided=True, where None means omega = 1.
    observation: (B, To, Do) normalised, what a policy saw last; for networks built to take it, which must have it.
    prompts: embedded; only for foreign networks of text (fewstep.teachers).
    seen: (B, ...), what a skip lets through (`Preconditioning.shown`), which the flow map fills in.
    """

    labels: Tensor | None = None
    guidance: Tensor | None = None
    observation: Tensor | None = None
    prompts: Prompts | None = None
    seen: Tensor | None = None

    @property
    def text(self) -> Tensor | None:
        """(B, L, D), embeddings of the prompts' tokens."""
        return None if self.prompts is None else self.prompts.text

    @property
    def text_mask(self) -> Tensor | None:
        """(B, L) bool, which of the tokens count; None for all."""
        return None if self.prompts is None else self.prompts.mask

    @property
    def pooled(self) -> Tensor | None:
        """(B, P), one embedding of each prompt."""
        return None if self.prompts is None else self.prompts.pooled

    @property
    def kept(self) -> Tensor | None:
        """(B,) bool, which samples have a label or a prompt that guidance can push to; None without such conditions."""
        labelled = None if self.labels is None else self.labels >= 0
        if self.prompts is None:
            return labelled
        prompted = self.prompts.kept
        prompted = torch.ones_like(self.prompts.text[:, 0, 0], dtype=torch.bool) if prompted is None else prompted
        return prompted if labelled is None else prompted | labelled

    def drop(self, dropped: Tensor) -> "Condition":
        """The same with NULL_LABEL and the empty prompt where `dropped` (B,) bool says so."""
        labels = None if self.labels is None else torch.where(dropped, NULL_LABEL, self.labels)
        return replace(self, labels=labels, prompts=None if self.prompts is None else self.prompts.drop(dropped))

    def unconditional(self) -> "Condition":
        """The same conditions without labels and prompts: NULL_LABEL and the empty prompt in their places."""
        kept = self.kept
        return self if kept is None else self.drop(torch.ones_like(kept))

    def to(self, device: torch.device | str) -> "Condition":
        """The same on a device."""
        moved = (getattr(self, field.name) for field in fields(self))
        return Condition(*(None if each is None else each.to(device) for each in moved))

    def __getitem__(self, index: Tensor | slice) -> "Condition":
        parts = (getattr(self, field.name) for field in fields(self))
        return Condition(*(None if part is None else part[index] for part in parts))
