"""Loss norms and adaptive weights, per sample."""

from __future__ import annotations

import math
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


def adaptive_weight(loss: Tensor, power: float, offset: float) -> Tensor:
    """sg (loss + offset)^-power, per sample; power 0 is no weight. iSD uses power 1, offset 0.01 (2601.22679)."""
    return torch.pow(loss.detach() + offset, -power)
