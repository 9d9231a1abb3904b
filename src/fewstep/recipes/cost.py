"""What training takes: parameters and FLOPs, counted on the network built without memory.

A multiply-add is 2 FLOPs. Left out are what is no matrix product, the optimiser's own work, and encoding the images.
"""

from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from fewstep.networks.base import NetworkConfig
from fewstep.networks.condition import Condition, Prompts
from fewstep.recipes.config import RunConfig
from fewstep.recipes.peaks import PEAKS, Peak

_TOKENS = 77
"""Of a prompt."""
UTILISATION = 0.4
"""Assumed share of a device's peak that training reaches."""


DEVICES = ("H100", "A100")
"""That hours are stated for."""


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
        seconds = peak.seconds(self.passes - self.wide, self.wide)
        return self.images * self.forward * seconds / utilisation / 3600


def training_cost(config: RunConfig, shape: tuple[int, ...], num_classes: int) -> Cost:
    """The cost of a run on samples of that shape; raises ConfigError for objectives whose passes are not counted."""
    bf16 = config.training.precision == "bf16"
    passes, wide = config.objective.forward_passes(bf16)
    parameters, forward = count(config.network, shape, num_classes, config.objective.guided)
    return Cost(parameters, forward, passes, config.training.images, wide if bf16 else passes)


def student_cost(config: RunConfig, teacher: NetworkConfig, shape: tuple[int, ...], num_classes: int) -> Cost:
    """The same of a student whose network is its teacher's; of adapters too a backward pass counts as 2."""
    return training_cost(replace(config, network=config.network.beside(teacher)), shape, num_classes)


def count(network: NetworkConfig, shape: tuple[int, ...], num_classes: int, guided: bool) -> tuple[int, int]:
    """Trainable numbers of a network, and FLOPs of the matrix products in one evaluation of one sample."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        built = network.build(shape, num_classes, guided)
        labels = torch.zeros(1, dtype=torch.long) if num_classes else None
        width, pooled = built.prompt_widths
        prompts = Prompts(torch.empty(1, _TOKENS, width), pooled=torch.empty(1, pooled)) if width else None
        cond = Condition(labels, torch.empty(1, 3) if guided else None, prompts=prompts)
        built(torch.empty(1, *shape), torch.empty(1), torch.empty(1), cond)
    return sum(parameter.numel() for parameter in built.parameters()), counter.get_total_flops()


def cost_lines(cost: Cost) -> list[str]:
    """The cost in words, with its assumption."""
    hours = " or ".join(f"{cost.hours(PEAKS[device]):,.0f} {device}-hours" for device in DEVICES)
    return [
        f"Computed cost: {cost.parameters / 1e6:,.0f} M parameters, {cost.forward / 1e9:,.1f} GFLOP an evaluation, "
        f"{cost.passes:g} forward passes a sample, {cost.wide:g} of them in float32, {cost.images / 1e6:,.1f} M "
        f"samples: {cost.flops:.1e} FLOP.",
        f"{hours}, if {UTILISATION:.0%} of the peaks is reached (an assumption); encoding is not in it.",
    ]
