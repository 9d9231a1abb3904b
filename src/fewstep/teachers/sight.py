"""What a skip lets through, shown to networks that were made without it (math.md §3.8)."""

from typing import Any

from torch import Tensor, nn

from fewstep.networks.layers import Conv2d, LinearLayer, zeroed
from fewstep.utils.errors import ConfigError
from fewstep.utils.tensors import expand


class SkipSight(nn.Module):
    """beside(E), added to what the first layer of a network gives, and a(t, s) E, to what the network gives.

    E (B, *shape) is what the skip lets through; both are zero at first, so that the network then equals the one that it
    was made from. `beside` is a layer as the first one is, without bias: where s = t there is nothing to see. a is
    linear in features of both times.
    """

    def __init__(self, first: nn.Module, channels: int, features: int) -> None:
        """first: a linear layer or a convolution, within an adapter or not. channels: of what it is shown, as the first
        layer is given it. features: of the times.
        """
        super().__init__()
        self.beside = zeroed(_like(first, channels))
        self.gate = zeroed(LinearLayer(features, 1))
        self.shown: Tensor | None = None
        first.register_forward_hook(self._added)

    def _added(self, layer: nn.Module, given: Any, output: Tensor) -> Tensor:
        """The first layer's output, with that of `beside`."""
        if self.shown is None:
            return output
        beside: Tensor = self.beside(self.shown)
        return output + beside.to(output.dtype)

    def gated(self, output: Tensor, seen: Tensor, features: Tensor) -> Tensor:
        """The network's output (B, *shape) with the gate's share of what it is shown; features (B, F) of the times."""
        gate: Tensor = self.gate(features)
        return output + expand(gate[:, 0], seen).to(seen.dtype) * seen


def _like(first: nn.Module, channels: int) -> nn.Module:
    """A layer without bias from `channels` to what the first one gives, which takes the same pixels to its own."""
    first = getattr(first, "base", first)
    weight: Tensor = first.weight  # type: ignore[assignment]
    if isinstance(first, nn.Linear):
        return LinearLayer(channels, len(weight), bias=False)
    kernel = tuple(weight.shape[2:])
    if len(kernel) not in (2, 3):
        raise ConfigError(f"a first layer of class {type(first).__name__} takes no skip: leave sees_skip out")
    stride = getattr(first, "stride", 1)
    padding = getattr(first, "padding", tuple(side // 2 for side in kernel))
    places = {"dilation": getattr(first, "dilation", 1), "padding_mode": getattr(first, "padding_mode", "zeros")}
    convolution = Conv2d if len(kernel) == 2 else nn.Conv3d
    return convolution(channels, len(weight), kernel, stride, padding, bias=False, **places)  # type: ignore[arg-type]
