"""Toy data whose denoiser is known in closed form: samples here, the oracle in fewstep.oracles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.data.base import Loaded, Samples
from fewstep.randomness import Draws

MIXTURE_SHAPE = (1, 4, 4)
_COMPONENTS = 8
_PARAMETERS_SEED = 16
_TRAIN, _HELDOUT = 50_000, 10_000
# Streams of their own: the order of an epoch is drawn from stream 0 of the same seeds.
_CHOICE, _NOISE = 50, 51
_CENTRE, _SPREAD, _WIDTH, _WEIGHT = 0, 1, 2, 3


@dataclass(frozen=True)
class MixtureParameters:
    """x0 ~ sum_k weights_k N(means_k, sds_k^2 I): weights (K,), means (K, d), sds (K,), all float64."""

    weights: Tensor
    means: Tensor
    sds: Tensor


def mixture_parameters() -> MixtureParameters:
    """The mixture of source 'mixture': 8 components in 16 dimensions, always the same.

    The means lie about a centre of norm 2, so that centring matters, and spread by 1.2 along the first dimension down
    to 0.3 along the last; sds lie in [0.1, 0.3] and weights between 1/16 and 3/16 before they are normalised.
    """
    components = Draws(_PARAMETERS_SEED, 0, torch.arange(_COMPONENTS))
    dimension = math.prod(MIXTURE_SHAPE)
    centre = Draws(_PARAMETERS_SEED, 1, torch.zeros(1, dtype=torch.int64)).normal(_CENTRE, (dimension,), torch.float64)
    scales = torch.logspace(math.log10(1.2), math.log10(0.3), dimension, dtype=torch.float64)
    spread = components.normal(_SPREAD, (dimension,), torch.float64)
    weights = 0.5 + components.uniform(_WEIGHT)
    return MixtureParameters(
        weights=weights / weights.sum(),
        means=2.0 * centre / centre.norm() + scales * spread,
        sds=0.1 + 0.2 * components.uniform(_WIDTH),
    )


def load_mixture(seed: int) -> Loaded:
    """50,000 training and 10,000 held-out samples (1, 4, 4) of the mixture, drawn by `seed`; no labels."""
    return Loaded("mixture", _draw(seed, 0, _TRAIN), _draw(seed, 1, _HELDOUT))


def _draw(seed: int, part: int, count: int) -> Samples:
    mixture, draws = mixture_parameters(), Draws(seed, part, torch.arange(count))
    chosen = torch.searchsorted(mixture.weights.cumsum(0), draws.uniform(_CHOICE)).clamp(max=_COMPONENTS - 1)
    noise = draws.normal(_NOISE, (math.prod(MIXTURE_SHAPE),), torch.float64)
    values = mixture.means[chosen] + mixture.sds[chosen, None] * noise
    return Samples(values.float().reshape(count, *MIXTURE_SHAPE))
