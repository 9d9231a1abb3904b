"""A network and a batch to time steps on."""

import torch

from fewstep import Batch, Companions, FlowMap, Linear, LinearPreconditioning, NetworkConfig, Objective
from fewstep.objectives import ALONE
from fewstep.utils.random import Draws


def warm(config: NetworkConfig, shape: tuple[int, ...], count: int, device: str = "cpu") -> tuple[FlowMap, Batch]:
    """A flow map with weights away from their zero initialisation, and a batch of ten classes."""
    torch.manual_seed(0)
    network = config.build(shape, 10, False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    draws = Draws(0, 0, torch.arange(count, device=device))
    batch = Batch(draws.normal(1, shape), torch.arange(count, device=device) % 10, draws)
    return FlowMap(Linear(), LinearPreconditioning(), network).to(device), batch


def take_step(objective: Objective, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> None:
    """Loss and gradient."""
    flow_map.zero_grad(set_to_none=True)
    objective(flow_map, batch, companions).mean().backward()
