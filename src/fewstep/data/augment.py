"""Augmentations: functions of the random numbers of a batch's samples."""

from torch import Tensor

from fewstep.utils.random import Draws


def random_flips(draws: Draws, stream: int) -> Tensor:
    """Which samples to mirror left to right, each with probability 1/2: (n,) bool, by the draws of `stream`."""
    return draws.uniform(stream) < 0.5
