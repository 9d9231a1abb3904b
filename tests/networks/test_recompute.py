"""Blocks that keep no activations give the same outputs, derivatives and gradients, with tangents and without."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import Linear
from fewstep.flow.preconditioning.jumps import LinearPreconditioning
from fewstep.networks.base import EmbeddingNetwork, NetworkConfig
from fewstep.networks.dit import DiTConfig
from fewstep.networks.layers import Conv1d, Conv2d, LinearLayer
from fewstep.networks.mlp import MLPConfig
from fewstep.networks.recompute import recomputed
from fewstep.networks.unet import UNetConfig
from fewstep.networks.unet1d import UNet1dConfig
from fewstep.objectives import EMD, ESD, ISD, LSD, Batch, Companions, DiagonalMatching, MeanFlow, Objective
from fewstep.utils.forward_ad import jvp
from fewstep.utils.random import Draws
from tests.support.objectives import made

NETWORKS: dict[str, tuple[NetworkConfig, tuple[int, ...]]] = {
    "MLP": (MLPConfig(width=16, depth=2, embedding_width=8), (6,)),
    "U-Net": (UNetConfig(width=8, multipliers=(1, 2), blocks=1, attention=(4,), head_width=4), (2, 8, 8)),
    "U-Net along time": (UNet1dConfig(width=8), (8, 2)),
    "DiT": (DiTConfig(width=16, depth=2, heads=2, patch=2), (2, 8, 8)),
}
OBJECTIVES: dict[str, Objective] = {
    "flow matching": DiagonalMatching(),
    "iSD, exact": ISD(),
    "iSD, differences": made(ISD, kind="finite-difference"),
    "MeanFlow": MeanFlow(),
    "ESD, through the tangent": ESD(),
    "LSD, through the tangent": LSD(),
    "EMD": EMD(),
}


def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[FlowMap, FlowMap, Batch]:
    """A flow map away from its zero initialisation, the same without activations, and a batch of two classes."""
    config, shape = NETWORKS[name]
    torch.manual_seed(0)
    network = config.build(shape, 2, False).to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    other = copy.deepcopy(network)
    other.checkpoint_blocks()
    draws = Draws(0, 0, torch.arange(6))
    batch = Batch(draws.normal(1, shape).to(dtype), torch.arange(6) % 2, draws)
    kept, anew = (FlowMap(Linear(), LinearPreconditioning(), each).to(dtype) for each in (network, other))
    return kept, anew, batch


def gradients(flow_map: FlowMap, objective: Objective, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    parameters = list(flow_map.parameters())
    loss = objective(flow_map, batch, Companions(teacher=copy.deepcopy(flow_map), ema_target=flow_map)).mean()
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_losses_and_gradients_are_the_same(name: str, objective: Objective) -> None:
    kept, anew, batch = pair(name)
    (loss, expected), (own, found) = (gradients(each, objective, batch) for each in (kept, anew))
    torch.testing.assert_close(own, loss, rtol=1e-12, atol=0.0)
    assert max(float(each.abs().max()) for each in expected) > 1e-3
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["iSD, exact", "ESD, through the tangent"])
def test_under_bf16_the_second_pass_is_rounded_as_the_first(name: str, kind: str) -> None:
    _, anew, batch = pair(name, torch.float32)
    seen: list[torch.dtype] = []
    blocks = [each for each in anew.network.modules() if type(each).__name__.endswith("Block")]
    for layer in {each for block in blocks for each in block.modules() if type(each) in (LinearLayer, Conv1d, Conv2d)}:
        layer.register_forward_hook(lambda _, inputs, out: seen.append(out.dtype))
    parameters = list(anew.parameters())
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        loss = OBJECTIVES[kind](anew, batch).mean()
    first = len(seen)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert len(seen) > first
    assert set(seen) == {torch.bfloat16}
    assert all(bool(each.isfinite().all()) and each.dtype == torch.float32 for each in found if each is not None)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_are_computed_twice_and_keep_nothing(name: str, attached: bool) -> None:
    """Of a block's own layers nothing is saved between the passes: only what comes into it."""
    _, anew, batch = pair(name)
    t, s = torch.full((6,), 0.7).double(), torch.full((6,), 0.2).double()

    def output(x: Tensor) -> Tensor:
        return anew.output(x, t, s)

    calls = []
    blocks = [each for each in anew.network.modules() if type(each).__name__.endswith("Block")]
    hooks = [each.register_forward_hook(lambda *_: calls.append(1)) for each in blocks]
    found, moved = jvp(output, (batch.x0,), (torch.ones_like(batch.x0),), attached)
    first = len(calls)
    (found.sum() + moved.sum() if attached else found.sum()).backward()
    assert len(calls) == 2 * first > 0
    for hook in hooks:
        hook.remove()


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """Of tensors that a pass saves for its backward one, each storage once."""
    sizes: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = run()
    assert out.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_less_is_kept(name: str) -> None:
    kept, anew, batch = pair(name)
    t, s = torch.full((6,), 0.7).double(), torch.full((6,), 0.2).double()
    one, other = (kept_bytes(lambda each=each: each.output(batch.x0, t, s)) for each in (kept, anew))  # type: ignore[misc]
    assert other < one


def test_dropout_is_the_same_in_both_passes() -> None:
    config = UNetConfig(width=8, multipliers=(1,), blocks=1, attention=(), dropout=0.5)
    network = config.build((2, 8, 8), 0, False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, t = torch.randn(4, 2, 8, 8), torch.full((4,), 0.5)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(torch.autograd.grad(network(x, t, t).square().sum(), list(network.parameters())[-4:]))
        network.checkpoint_blocks()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


class Halved(nn.Module):
    """No block of ours: two tensors and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, scale: Any, y: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) * scale + y**2


@pytest.mark.parametrize("attached", [False, True])
def test_tensors_and_other_arguments_keep_their_places(attached: bool) -> None:
    block, x, y = Halved(), torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    found = []
    for run in (lambda a, b: block(a, 0.5, b), lambda a, b: recomputed(block, a, 0.5, b)):
        out, moved = jvp(run, (x, y), (torch.ones(2, 3), torch.full((2, 3), 2.0)), attached)
        loss = out.square().sum() + (moved.square().sum() if attached else 0.0)
        found.append((out, moved, *torch.autograd.grad(loss, [x, y, *block.parameters()])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_network_that_computes_anew_is_still_vectorised_over() -> None:
    _, anew, batch = pair("MLP")
    assert isinstance(anew.network, EmbeddingNetwork)
    t = torch.full((1,), 0.5).double()
    found = torch.func.vmap(lambda x: anew.output(x[None], t, t)[0])(batch.x0)
    torch.testing.assert_close(found, anew.output(batch.x0, t.expand(6), t.expand(6)))


def test_settings_of_the_network_ask_for_it_too() -> None:
    config = replace(NETWORKS["DiT"][0], checkpoint=True)  # type: ignore[type-var]
    assert config.build((2, 8, 8), 0, False).recomputes  # type: ignore[attr-defined]
