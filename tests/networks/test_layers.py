"""What networks are built of: norms, attention, rotations and the embedding of times, against the usual ones."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from fewstep.networks.layers import (
    ConditionEmbedding,
    Conv1d,
    Conv2d,
    GroupNorm,
    LinearLayer,
    RMSNorm,
    RotaryEmbedding2d,
    default_groups,
    layer_norm,
)
from fewstep.utils.forward_ad import jvp


@pytest.mark.parametrize("shape", [(4, 12, 5, 7), (2, 12, 9), (2, 12, 1, 1)])
def test_group_norm_is_the_usual_one(shape: tuple[int, ...]) -> None:
    norm = GroupNorm(12).double()
    nn.init.normal_(norm.scale)
    nn.init.normal_(norm.shift)
    x = 5 + torch.randn(shape, dtype=torch.float64)
    usual = functional.group_norm(x, 3, norm.scale, norm.shift, norm.eps)
    torch.testing.assert_close(norm(x), usual)
    scale, shift = torch.randn(2, shape[0], 12, dtype=torch.float64)
    ones = (1,) * (len(shape) - 2)
    modulated = usual * (1 + scale.reshape(-1, 12, *ones)) + shift.reshape(-1, 12, *ones)
    torch.testing.assert_close(norm(x, scale, shift), modulated)


def test_token_norms_are_the_usual_ones() -> None:
    x = 3 + torch.randn(4, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer_norm(x), functional.layer_norm(x, (8,), eps=1e-6))
    torch.testing.assert_close(RMSNorm(8).double()(x), functional.rms_norm(x, (8,), eps=1e-6))


PRODUCTS = {
    "linear": (lambda: LinearLayer(6, 5), lambda: nn.Linear(6, 5), (4, 3, 6)),
    "linear without bias": (lambda: LinearLayer(6, 5, bias=False), lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "conv1d": (lambda: Conv1d(6, 5, 3, padding=1), lambda: nn.Conv1d(6, 5, 3, padding=1), (4, 6, 7)),
    "conv2d": (lambda: Conv2d(6, 5, 3, padding=1), lambda: nn.Conv2d(6, 5, 3, padding=1), (4, 6, 7, 5)),
}
products = pytest.mark.parametrize(("own", "usual", "shape"), PRODUCTS.values(), ids=PRODUCTS)


@products
def test_products_are_the_usual_ones_with_and_without_tangents(
    own: Callable[[], nn.Module], usual: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    layer, other = own().double(), usual().double()
    other.load_state_dict(layer.state_dict())
    x, dx = torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), other(x))

    def gradients(module: nn.Module) -> tuple[Tensor, ...]:
        """Of the output and of its derivative, in reverse mode over forward mode."""
        parts = torch.func.jvp(module, (x,), (dx,))
        return *parts, *torch.autograd.grad(parts[0].square().sum() + parts[1].pow(4).sum(), module.parameters())

    torch.testing.assert_close(gradients(layer), gradients(other))


@pytest.mark.parametrize(
    ("own", "usual", "shape", "moved"),
    [(*case, moved) for name, case in PRODUCTS.items() for moved in ("weight", "bias")[: 1 + ("without" not in name)]],
)
def test_products_follow_weights_that_carry_tangents(
    own: Callable[[], nn.Module], usual: Callable[[], nn.Module], shape: tuple[int, ...], moved: str
) -> None:
    layer, other = own().double(), usual().double()
    other.load_state_dict(layer.state_dict())
    weights = {name: value.detach() for name, value in layer.named_parameters()}
    x, dx = torch.randn(2, *shape, dtype=torch.float64)

    def output(module: nn.Module, x: Tensor, value: Tensor) -> Tensor:
        return torch.func.functional_call(module, {**weights, moved: value}, (x,))

    primals, tangents = (x, weights[moved]), (dx, torch.randn_like(weights[moved]))
    found = torch.func.jvp(partial(output, layer), primals, tangents)
    torch.testing.assert_close(found, torch.func.jvp(partial(output, other), primals, tangents))


@pytest.mark.parametrize("twice", [torch.func.jacfwd, torch.func.jacrev])
def test_products_nest_in_transforms_of_transforms(twice: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    """Vectorised forward mode, and either mode over it: each level finds its own tangent."""
    own, usual = (nn.Sequential(kind(3, 4), nn.Tanh(), kind(4, 2)).double() for kind in (LinearLayer, nn.Linear))
    usual.load_state_dict(own.state_dict())
    x = torch.randn(3, dtype=torch.float64)
    found, expected = (twice(torch.func.jacfwd(network))(x) for network in (own, usual))
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(found, expected)


def test_products_take_vectorisation_within_forward_mode() -> None:
    """Tangents are out of sight there: PyTorch's formula is what there is."""
    layer, usual = LinearLayer(3, 4).double(), nn.Linear(3, 4).double()
    usual.load_state_dict(layer.state_dict())
    x, dx = torch.randn(2, 5, 3, dtype=torch.float64)
    for inner in (torch.func.vmap(layer), torch.func.vmap(lambda row: layer(row).square())):
        expected = torch.func.jvp(usual if inner(x).equal(layer(x)) else lambda x: usual(x).square(), (x,), (dx,))
        torch.testing.assert_close(torch.func.jvp(inner, (x,), (dx,)), expected)
    weights = torch.randn(6, 4, 3, dtype=torch.float64)

    def each(weight: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    found = torch.func.jvp(lambda x: torch.func.vmap(each, (0, None))(weights, x), (x,), (dx,))
    products = torch.einsum("noi,bi->nbo", weights, x), torch.einsum("noi,bi->nbo", weights, dx)
    torch.testing.assert_close(found, (products[0] + layer.bias, products[1]))


def test_a_derivative_within_a_detached_one_keeps_its_graph() -> None:
    """The inner derivative is part of the outer one's value, which the gradient passes through."""
    layer, usual = LinearLayer(3, 3).double(), nn.Linear(3, 3).double()
    usual.load_state_dict(layer.state_dict())
    x, dx = torch.randn(2, 5, 3, dtype=torch.float64)

    def gradient(network: nn.Module, inner: bool, outer: bool) -> Tensor:
        def residual(x: Tensor) -> Tensor:
            value, change = jvp(lambda x: network(x).tanh(), (x,), (dx,), inner)
            return value + change

        value, change = jvp(residual, (x,), (dx,), outer)
        loss = value.square().sum() + change.square().sum()
        return torch.autograd.grad(loss, network.get_parameter("weight"))[0]

    for inner, outer in itertools.product((False, True), repeat=2):
        torch.testing.assert_close(gradient(layer, inner, outer), gradient(usual, inner, outer))


@products
def test_a_tangent_costs_one_product(
    own: Callable[[], nn.Module], usual: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """PyTorch's layers take one more, with the zeros that stand for the weight's tangent."""

    def operations(module: nn.Module, tangent: bool) -> int:
        x = torch.randn(shape)
        with FlopCounterMode(display=False) as counter:
            torch.func.jvp(module, (x,), (x,)) if tangent else module(x)
        return int(counter.get_total_flops())

    assert operations(own(), True) == 2 * operations(own(), False)
    assert operations(usual(), True) > 2 * operations(usual(), False)


@pytest.mark.parametrize(("channels", "groups"), [(32, 8), (128, 32), (100, 25), (256, 32), (132, 22), (3, 1), (7, 1)])
def test_groups_divide_the_channels(channels: int, groups: int) -> None:
    assert default_groups(channels) == groups


def test_rotated_products_depend_on_displacement_only() -> None:
    rotary = RotaryEmbedding2d(8, (4, 5)).double()
    q, k = torch.randn(2, 8, dtype=torch.float64)  # the rotation's table is float32
    turned_q, turned_k = (rotary(value.expand(20, 8)).reshape(4, 5, 8) for value in (q, k))
    products = torch.einsum("ijd,kld->ijkl", turned_q, turned_k)
    torch.testing.assert_close(products[1:, 1:, 1:, 1:], products[:-1, :-1, :-1, :-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(products[0, 0, 0, 0], q @ k, rtol=1e-5, atol=1e-5)
    assert not torch.isclose(products[0, 0, 0, 1], products[0, 0, 1, 0])


def test_time_embedding_spans_its_frequencies() -> None:
    frequencies = ConditionEmbedding(4, 0, False, max_frequency=4.0).frequencies
    torch.testing.assert_close(frequencies, 0.5 * 8 ** (torch.arange(32) / 31))
