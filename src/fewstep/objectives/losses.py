"""Loss norms and adaptive weights, per sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

LossNorm = Literal["l2", "pseudo-huber"]


def error_norm(error: Tensor, norm: LossNorm, huber: float) -> Tensor:
    """(B, ...) -> (B,): mean square, or pseudo-Huber sqrt(sum of squares + c^2) - c (iCT, 2310.14189) over sqrt(dim).

    Dividing by sqrt(dim) keeps pseudo-Huber's size independent of the data's dimension, as the mean does for L2.
    """
    flat = error.flatten(1)
    if norm == "l2":
        return flat.square().mean(1)
    distance = torch.sqrt(flat.square().sum(1) + huber * huber) - huber
    return distance / math.sqrt(flat.shape[1])


def normalised(tangent: Tensor, constant: float, counted: Tensor | None = None) -> Tensor:
    """g / (rms(g) + constant), per sample (B, ...): the root mean square of a sample's numbers (sCM, 2410.11081).

    counted: g as a loss counts it, whose rms is taken instead (Batch.count).
    """
    size = (tangent if counted is None else counted).flatten(1).square().mean(1).sqrt()
    return tangent / (size + constant).reshape(-1, *[1] * (tangent.ndim - 1))


def adaptive_weight(loss: Tensor, power: float, offset: float) -> Tensor:
    """sg (loss + offset)^-power, per sample; power 0 is no weight. iSD uses power 1, offset 0.01 (2601.22679)."""
    return torch.pow(loss.detach() + offset, -power)


def gradient_balance(
    first: Tensor, second: Tensor, weight: Tensor, average: Callable[[Tensor], Tensor], largest: float = 1e4
) -> Tensor:
    """|grad of mean(first)| / |grad of mean(second)| on `weight`, a detached scalar of at most `largest`.

    Brings two losses (B,) to one influence on a layer (VQGAN, 2012.09841; CTM, 2310.02279). average: over processes.
    Both keep their graphs. Without gradients (under no_grad) it is 1.
    """
    if not (first.requires_grad and second.requires_grad):
        return first.new_ones(())
    first_norm, second_norm = (
        torch.linalg.vector_norm(average(torch.autograd.grad(loss.mean(), weight, retain_graph=True)[0]))
        for loss in (first, second)
    )
    ratio: Tensor = (first_norm / second_norm.clamp(min=1e-12)).clamp(max=largest)
    return ratio.to(first.dtype).detach()
