"""Settings that change as training goes on: functions of the images seen."""

import math

import torch
from torch import Tensor


def doubling_cells(images: int, first: int, last: int, duration: int) -> int:
    """Cells of a grid that doubles from `first` up to `last` over `duration` images seen (iCT, 2310.14189).

    min(first 2^k, last) with k = floor(images / (duration / (log2 floor(last / first) + 1))): equally long stages, and
    a shorter last one where the logarithm is not whole.
    """
    stages = math.log2(last // first) + 1
    return min(first << math.floor(min(images * stages / duration, stages) + 1e-9), last)


def falling_ratio(tau: Tensor, images: int, q: float, stage_images: int, stages: int, k: float, b: float) -> Tensor:
    """1 - n(tau)/q^a with n = 1 + k sigmoid(-b tau), at least 0: the level tau_u/tau_t of ECT (2406.14548); (B,).

    a = 1 + floor(images / stage_images), at most `stages`, for images seen; at tau of infinity it is 1 - 1/q^a.
    """
    a = min(1 + images // stage_images, stages)
    return (1 - (1 + k * torch.sigmoid(-b * tau)) / q**a).clamp(min=0)


def warm_up(images: int, duration: int) -> float:
    """Rises from 0 to 1 over `duration` images seen; 1 throughout where that is 0."""
    return 1.0 if duration == 0 else min(images / duration, 1.0)
