"""Low-rank adapters (LoRA, 2106.09685): a frozen network learns W + (alpha/r) B A, B zero at first."""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from fewstep.networks.layers import LinearLayer, zeroed
from fewstep.utils.errors import ConfigError

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Names of attention's layers in networks of diffusers."""


class LoRALinear(nn.Module):
    """base(x) + B A x, with A (rank, in) drawn as layers are, B (out, rank) zero, so that alpha = rank."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = LinearLayer(base.in_features, rank, bias=False)
        self.up = zeroed(LinearLayer(rank, base.out_features, bias=False))
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + self.up(self.down(x))
        return found


def add_adapters(network: nn.Module, rank: int) -> None:
    """Freeze a network and adapt its attention; raises ConfigError for a rank below 1, or where there is none."""
    if rank < 1:
        raise ConfigError(f"lora is {rank}: give a rank of at least 1")
    network.requires_grad_(False)
    count = 0
    for name, module in list(network.named_modules()):
        if name.endswith(PROJECTIONS) and isinstance(module, nn.Linear):
            owner, _, last = name.rpartition(".")
            setattr(network.get_submodule(owner), last, LoRALinear(module, rank))
            count += 1
    if not count:
        raise ConfigError(f"{type(network).__name__} has no attention to adapt: train it without lora")


def base_name(key: str) -> str | None:
    """A tensor's name in the network without adapters; None for an adapter's own."""
    if key.endswith((".down.weight", ".up.weight")) and key.rpartition(".")[0].rpartition(".")[0].endswith(PROJECTIONS):
        return None
    parts = key.split(".base.")
    return ".".join(parts) if len(parts) == 2 and parts[0].endswith(PROJECTIONS) else key


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a network with adapters as those of one without: W + B A, by the names of `base_name`."""
    found = {}
    for key, value in weights.items():
        name = base_name(key)
        if name is None:
            continue
        stem = key.removesuffix(".base.weight")
        adapted = stem != key and f"{stem}.up.weight" in weights
        found[name] = value + weights[f"{stem}.up.weight"] @ weights[f"{stem}.down.weight"] if adapted else value
    return found
