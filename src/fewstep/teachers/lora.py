"""Low-rank adapters (LoRA, 2106.09685): a frozen network learns W + (alpha/rank) B A, B zero at first.

A layer X with adapters has the tensors X.base.weight, X.down.weight (A) and X.up.weight (B), and X.lora_alpha where
alpha is not the rank. Convolutions have a convolution to `rank` channels for A and one of 1 x 1 for B.
"""

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fewstep.networks.base import LoRA
from fewstep.networks.layers import Conv2d, LinearLayer, zeroed
from fewstep.utils.errors import ConfigError

BLOCKS = (
    "down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks", "blocks", "enc", "dec",
)  # fmt: skip
"""Where networks keep their blocks."""
_ALPHA = ".lora_alpha"
_OWN = (".down.weight", ".up.weight", _ALPHA)


@runtime_checkable
class Reweighable(Protocol):
    """A layer that is more than a product with its weight, and can be applied with another."""

    weight: nn.Parameter

    def with_weight(self, weight: Tensor, x: Tensor, *more: Any) -> Tensor:
        """The layer's output with this weight in place of its own."""


class Adapter(nn.Module):
    """What the adapters of a layer share: A drawn as layers are, B zero."""

    def __init__(self, base: nn.Module, lora: LoRA, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.base, self.down, self.up, self.scale = base, down, zeroed(up), lora.scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))  # type: ignore[arg-type]
        if lora.scale != 1.0:
            self.register_buffer("lora_alpha", torch.tensor(lora.alpha))


class ProductAdapter(Adapter):
    """base(x) + (alpha/rank) B A x, for a linear layer or a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.up(self.down(x))
        found: Tensor = self.base(x) + (added if self.scale == 1.0 else self.scale * added)
        return found


class WeightAdapter(Adapter):
    """The layer with the weight W + (alpha/rank) B A, for one that does more with it, such as normalising it."""

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        weight: Any = self.base.weight
        change = low_rank(self.down.weight, self.up.weight, weight, self.scale)  # type: ignore[arg-type]
        assert isinstance(self.base, Reweighable)
        return self.base.with_weight(weight + change, x, *more)


def low_rank(down: Tensor, up: Tensor, weight: Tensor, scale: float) -> Tensor:
    """scale B A in the shape of W."""
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def add_adapters(network: nn.Module, lora: LoRA, attention: tuple[str, ...], apart: str) -> None:
    """Freeze a network and give layers adapters.

    attention: last parts of the names of attention's layers. apart: the names of embeddings of time, as fnmatch reads
    them, which have none. Raises ConfigError where there is nothing to adapt.
    """
    network.requires_grad_(False)
    made = {}
    for name, module in network.named_modules():
        if lora.layers == "all":
            wanted = name.partition(".")[0] in BLOCKS and not fnmatch(name, apart) and not fnmatch(name, f"{apart}.*")
        else:
            wanted = f".{name}".endswith(tuple(f".{last}" for last in attention))
        adapter = _adapter(module, lora) if wanted else None
        if adapter is not None:
            made[name] = adapter
    if not made:
        raise ConfigError(f"{type(network).__name__} has no {lora.layers} layers to adapt: train it without lora")
    for name, adapter in made.items():
        owner, _, last = name.rpartition(".")
        container = network.get_submodule(owner)
        if isinstance(container, nn.ModuleDict):
            container[last] = adapter
        else:
            setattr(container, last, adapter)


def _adapter(layer: nn.Module, lora: LoRA) -> Adapter | None:
    """Of a layer of a kind that can have one."""
    if isinstance(layer, Reweighable):
        wide_out, wide_in = len(layer.weight), layer.weight[0].numel()
        down, up = LinearLayer(wide_in, lora.rank, bias=False), LinearLayer(lora.rank, wide_out, bias=False)
        assert isinstance(layer, nn.Module)
        return WeightAdapter(layer, lora, down, up)
    if isinstance(layer, nn.Linear):
        wide_in, wide_out = layer.in_features, layer.out_features
        down, up = LinearLayer(wide_in, lora.rank, bias=False), LinearLayer(lora.rank, wide_out, bias=False)
        return ProductAdapter(layer, lora, down, up)
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
        places: tuple[Any, Any, Any, Any] = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        narrow = Conv2d(layer.in_channels, lora.rank, *places, bias=False)
        return ProductAdapter(layer, lora, narrow, Conv2d(lora.rank, layer.out_channels, 1, bias=False))
    return None


def last_adapter(network: nn.Module) -> Tensor:
    """B of the last layer with adapters."""
    found = [module for module in network.modules() if isinstance(module, Adapter)]
    return found[-1].up.weight  # type: ignore[return-value]


def base_name(key: str) -> str | None:
    """A tensor's name in the network without adapters; None for an adapter's own."""
    return None if key.endswith(_OWN) else key.replace(".base.", ".")


def adapters_of(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """(layer, A, B, alpha/rank) of weights that have adapters."""
    for key, down in weights.items():
        stem = key.removesuffix(".down.weight")
        if stem != key and f"{stem}.up.weight" in weights:
            alpha = weights.get(stem + _ALPHA)
            yield stem, down, weights[f"{stem}.up.weight"], 1.0 if alpha is None else float(alpha) / len(down)


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a network with adapters as those of one without: W + (alpha/rank) B A, by the names of `base_name`."""
    found = {name: value for key, value in weights.items() if (name := base_name(key)) is not None}
    for stem, down, up, scale in adapters_of(weights):
        weight = weights[f"{stem}.base.weight"]
        found[f"{stem}.weight"] = weight + low_rank(down, up, weight, scale)
    return found
