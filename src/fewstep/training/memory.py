"""What cannot fit into the machine's memory, found by counting before anything is built."""

import dataclasses
import math

import torch

from fewstep.networks.base import NetworkConfig
from fewstep.recipes.config import RunConfig
from fewstep.utils.errors import ConfigError
from fewstep.utils.tensors import check_memory

_LARGEST = 2**24
_COPIES = 4


def check_run(config: RunConfig, shape: tuple[int, ...], num_classes: int, share: int) -> None:
    """Raise ConfigError where the network, or the `share` samples that a process takes at once, cannot fit.

    The network counts four times: weights, gradients and the two moments of the optimiser, in float32.
    """
    parameters = count_parameters(config.network, shape, num_classes, config.objective.guided)
    check_memory(4 * _COPIES * parameters, f"a network of {parameters:.3g} parameters", "take a smaller network")
    advice = "take smaller batches, or --runtime.micro-batch"
    check_memory(4 * share * math.prod(shape), f"a batch of {share} samples", advice)


def count_parameters(network: NetworkConfig, shape: tuple[int, ...], num_classes: int, guided: bool) -> int:
    """Trainable numbers of a network, built without memory; 0 for one that cannot be built so.

    Raises ConfigError for settings so large that their product is no number of 64 bits.
    """
    try:
        with torch.device("meta"):
            built = network.build(shape, num_classes, guided)
    except ConfigError:
        raise
    except Exception as error:  # whatever a network does with its numbers while it is built
        for field in dataclasses.fields(network):  # type: ignore[arg-type]  # networks' settings are dataclasses
            value = getattr(network, field.name)
            if isinstance(value, int) and value > _LARGEST:
                raise ConfigError(
                    f"out of memory (a network of {field.name} {value}): take a smaller network"
                ) from error
        return 0
    return sum(parameter.numel() for parameter in built.parameters())
