"""Augmentations: functions of a batch and of the random numbers of its samples."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import ShapeError
from fewstep.randomness import Draws
from fewstep.shapes import expand


def random_flip(x: Tensor, draws: Draws, stream: int) -> Tensor:
    """Mirror each sample of x (n, C, H, W) left to right with probability 1/2, by the draws of `stream`.

    Raises ShapeError when x is not a batch of images with one draw each.
    """
    if x.ndim != 4 or len(x) != len(draws.indices):
        raise ShapeError(
            f"cannot flip samples of shape {tuple(x.shape)} with {len(draws.indices)} draws: "
            "give (n, C, H, W) and one draw per sample"
        )
    flipped = (draws.uniform(stream) < 0.5).to(x.device)
    return torch.where(expand(flipped, x), x.flip(-1), x)
