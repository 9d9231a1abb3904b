"""What training a diffusion transformer takes: parameters and FLOPs, counted from its settings without building it.

A multiply-add is 2 FLOPs. Left out are what is no matrix product, the optimiser's own work, and encoding the images.
"""

import math
from dataclasses import dataclass

from fewstep.networks.dit import DiTConfig, gated_width
from fewstep.objectives import ISD, TABLE, DiagonalMatching, Objective
from fewstep.recipes.config import RunConfig
from fewstep.utils.errors import ConfigError

UTILISATION = 0.4
"""Assumed share of a device's peak that training reaches."""


@dataclass(frozen=True)
class Peak:
    """FLOP/s of dense matrix products, as the vendor states them: in bf16, and in float32 without rounding to TF32."""

    bf16: float
    float32: float


PEAKS = {"H100": Peak(989e12, 67e12), "A100": Peak(312e12, 19.5e12)}
"""Of the SXM modules."""

_TIME_FEATURES = 64


@dataclass(frozen=True)
class Cost:
    """Of a run: parameters of the network; forward, the FLOPs of one evaluation of one sample; passes, a training
    sample's evaluations in forward passes, and of these `wide` in float32, the others in bf16; images seen.
    """

    parameters: int
    forward: int
    passes: float
    images: int
    wide: float = 0.0

    @property
    def flops(self) -> float:
        """Of the whole training."""
        return self.images * self.passes * self.forward

    def hours(self, peak: Peak, utilisation: float = UTILISATION) -> float:
        """Of one device with that peak."""
        seconds = (self.passes - self.wide) / peak.bf16 + self.wide / peak.float32
        return self.images * self.forward * seconds / utilisation / 3600


def training_cost(config: RunConfig, shape: tuple[int, int, int], num_classes: int) -> Cost:
    """The cost of a run on samples of that shape; raises ConfigError for another network than a DiT."""
    if not isinstance(config.network, DiTConfig):
        raise ConfigError(f"the cost of {type(config.network).__name__} is not counted, only a DiT's")
    guided, bf16 = config.objective.guided, config.training.precision == "bf16"
    total = passes(config.objective, bf16)
    return Cost(
        parameters(config.network, shape, num_classes, guided),
        forward_flops(config.network, shape, guided),
        total,
        config.training.images,
        difference_passes(config.objective) if bf16 else total,
    )


def difference_passes(objective: Objective) -> float:
    """Of `passes` under bf16, those of a finite difference: its three points are taken in float32 (derivatives.py)."""
    if not isinstance(objective, ISD) or objective.derivative.kind == "exact":
        return 0.0
    return 3 * (1 - objective.pairs.flow_matching_ratio)


def passes(objective: Objective, bf16: bool = False) -> float:
    """Evaluations of a sample in forward passes, from the table: one with a tangent is 2, one backward 2.

    Guidance asks for a null evaluation where the label is kept; samples with s = t are spared the second term. A finite
    difference takes two more, under bf16 three: its middle too, once more in float32. Raises ConfigError for objectives
    other than iSD and matching on the diagonal: their shares and teachers are not counted.
    """
    if isinstance(objective, DiagonalMatching):
        return 3.0
    if not isinstance(objective, ISD):
        raise ConfigError(f"the evaluations of {type(objective).__name__} are not counted: see fewstep objectives")
    passes = next(each.passes for each in TABLE if each.name == "iSD")
    null = objective.guidance.share(objective.label_dropout)
    derivative = passes.tangents if objective.derivative.kind == "exact" else 3 if bf16 else 2
    off = passes.forward + passes.frozen + derivative + 2 * passes.backward
    on = 1 + 2
    return null + objective.pairs.flow_matching_ratio * on + (1 - objective.pairs.flow_matching_ratio) * off


def forward_flops(config: DiTConfig, shape: tuple[int, int, int], guided: bool) -> int:
    """FLOPs of the matrix products in one evaluation of one sample."""
    width, hidden = config.width, gated_width(config.width, config.mlp_ratio)
    tokens, size = _tokens(config, shape)
    block = tokens * width * (4 * width + 3 * hidden) + 2 * tokens**2 * width + 6 * width**2
    embedding = 2 * (_TIME_FEATURES * width + width**2)
    embedding += 3 * width + width**2 if guided else 0
    return 2 * (config.depth * block + 2 * tokens * size * width + 2 * width**2 + embedding)


def parameters(config: DiTConfig, shape: tuple[int, int, int], num_classes: int, guided: bool) -> int:
    """Trainable numbers of the network."""
    width, hidden = config.width, gated_width(config.width, config.mlp_ratio)
    tokens, size = _tokens(config, shape)
    attention = _linear(width, 3 * width) + _linear(width, width) + 2 * (width // config.heads)
    mlp = _linear(width, 2 * hidden) + _linear(hidden, width)
    block = attention + mlp + _linear(width, 6 * width) + 2 * width
    embedding = 2 * (_linear(_TIME_FEATURES, width) + _linear(width, width))
    embedding += (num_classes + 1) * width if num_classes else 0
    embedding += _linear(3, width) + _linear(width, width) if guided else 0
    ends = _linear(size, width) + tokens * width + width + _linear(width, 2 * width) + _linear(width, size)
    return config.depth * block + embedding + ends


def cost_lines(cost: Cost) -> list[str]:
    """The cost in words, with its assumption."""
    hours = " or ".join(f"{cost.hours(peak):,.0f} {device}-hours" for device, peak in PEAKS.items())
    return [
        f"Computed cost: {cost.parameters / 1e6:,.0f} M parameters, {cost.forward / 1e9:,.1f} GFLOP an evaluation, "
        f"{cost.passes:g} forward passes a sample, {cost.wide:g} of them in float32, {cost.images / 1e6:,.1f} M "
        f"samples: {cost.flops:.1e} FLOP.",
        f"{hours}, if {UTILISATION:.0%} of the peaks is reached (an assumption); encoding is not in it.",
    ]


def _tokens(config: DiTConfig, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Tokens of a sample, and numbers in a token."""
    size = shape[0] * config.patch**2
    return math.prod(shape) // size, size


def _linear(inputs: int, outputs: int) -> int:
    """Weights and biases of a linear layer."""
    return (inputs + 1) * outputs
