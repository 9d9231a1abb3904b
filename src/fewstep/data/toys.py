"""Toy data whose denoiser is known in closed form: samples here, the oracle in fewstep.flow.closed_form."""

import math

import torch

from fewstep.data.base import Loaded, Samples
from fewstep.flow.closed_form import MIXTURE_SHAPE, toy_mixture
from fewstep.utils.random import Draws

_TRAIN, _HELDOUT = 50_000, 10_000
# Streams of their own: the order of an epoch is drawn from stream 0 of the same seeds.
_CHOICE, _NOISE = 50, 51


def load_mixture(seed: int) -> Loaded:
    """50,000 training and 10,000 held-out samples (1, 4, 4) of the mixture, drawn by `seed`; no labels."""
    return Loaded("mixture", _draw(seed, 0, _TRAIN), _draw(seed, 1, _HELDOUT))


def _draw(seed: int, part: int, count: int) -> Samples:
    draws = Draws(seed, part, torch.arange(count))
    noise = draws.normal(_NOISE, (math.prod(MIXTURE_SHAPE),), torch.float64)
    values = toy_mixture().sample(draws.uniform(_CHOICE), noise)
    return Samples(values.float().reshape(count, *MIXTURE_SHAPE))
