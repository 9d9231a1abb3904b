"""Networks with a layer of elsewhere: one without a formula for forward mode, one that lets the tangent fall."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.networks.base import Network
from fewstep.networks.condition import Condition
from fewstep.networks.mlp import MLP, MLPConfig

Layer = Literal["no-formula", "falling", "sound"]


class Sine(torch.autograd.Function):
    """sin x for reverse mode alone, as compiled layers often are."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * x.cos()


class Falling(Sine):
    """The same with a tangent of zero."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return torch.zeros_like(ctx.saved_tensors[0])


def sine(x: Tensor, layer: Layer) -> Tensor:
    """sin x, by one of these layers."""
    found: Tensor = {"no-formula": Sine.apply, "falling": Falling.apply, "sound": torch.sin}[layer](x)
    return found


class WithLayer(MLP):
    """An MLP whose output passes the layer."""

    layer: Layer = "no-formula"

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        return sine(super().forward(x, t, s, cond) + x * t.reshape(-1, *(1,) * (x.ndim - 1)), self.layer)


@dataclass(frozen=True)
class WithLayerConfig(MLPConfig):
    """Settings of WithLayer."""

    layer: Layer = "no-formula"

    def build(
        self, shape: tuple[int, ...], num_classes: int, guided: bool, observation: tuple[int, ...] = ()
    ) -> Network:
        network = WithLayer(self, shape, num_classes, guided, observation)
        network.layer = self.layer
        return network
