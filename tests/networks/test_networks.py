"""Networks: shapes, conditions, exact derivatives in forward mode, and what holds at initialisation."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fewstep.networks.base import Network, NetworkConfig
from fewstep.networks.condition import NULL_LABEL, Condition
from fewstep.networks.dit import DiTConfig
from fewstep.networks.layers import ConditionEmbedding
from fewstep.networks.mlp import MLPConfig
from fewstep.networks.unet import UNetConfig
from fewstep.networks.unet1d import UNet1dConfig
from fewstep.utils.errors import ConfigError, ShapeError
from fewstep.utils.forward_ad import jvp

SMALL: dict[str, tuple[NetworkConfig, tuple[int, ...]]] = {
    "mlp": (MLPConfig(width=24, depth=2, embedding_width=16), (2, 3)),
    "unet": (
        UNetConfig(width=8, multipliers=(1, 2), blocks=1, attention=(4,), head_width=8, embedding_width=16),
        (2, 8, 8),
    ),
    "dit": (DiTConfig(width=16, depth=2, heads=2, patch=2), (2, 8, 8)),
    "unet1d": (UNet1dConfig(width=8, multipliers=(1, 2), blocks=1, kernel=3, embedding_width=16), (8, 3)),
    "dit-checkpoint": (DiTConfig(width=16, depth=2, heads=2, patch=2, checkpoint=True), (2, 8, 8)),
}
BATCH = 3


def build(
    name: str, num_classes: int = 4, guided: bool = True, dtype: torch.dtype = torch.float32, depth: int = 2
) -> Network:
    torch.manual_seed(0)
    config, shape = SMALL[name]
    config = replace(config, depth=depth) if isinstance(config, MLPConfig | DiTConfig) else config
    return config.build(shape, num_classes, guided).to(dtype)


def perturbed(network: Network, size: float = 0.1) -> Network:
    """The network with noise on every parameter, so that nothing is hidden behind a layer that starts at zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return network


def inputs(network: Network, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Condition]:
    torch.manual_seed(1)
    x = torch.randn(BATCH, *network.shape, dtype=dtype)
    t, s = torch.rand(BATCH, dtype=dtype), torch.rand(BATCH, dtype=dtype)
    labels = torch.arange(BATCH) if network.num_classes else None
    return x, t, s, Condition(labels, torch.rand(BATCH, 3, dtype=dtype) if network.guided else None)


def central_difference(
    function: Callable[[Tensor, Tensor], Tensor],
    primals: tuple[Tensor, Tensor],
    tangents: tuple[Tensor, Tensor],
    step: float,
) -> Tensor:
    """The derivative along the tangents by the four-point stencil, of error O(step^4)."""

    def at(k: int) -> Tensor:
        return function(primals[0] + k * step * tangents[0], primals[1] + k * step * tangents[1])

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).detach().norm() / reference.detach().norm())


each_network = pytest.mark.parametrize("name", SMALL)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MLPConfig(width=16, depth=2), ()),
        (MLPConfig(width=16, depth=1), (3, 1, 7)),
        (UNetConfig(width=8, blocks=1, attention=(7,), head_width=16), (1, 28, 28)),
        (UNetConfig(width=8, multipliers=(2, 1, 3), blocks=2, attention=(6, 3), head_width=8), (3, 12, 20)),
        (UNetConfig(width=5, multipliers=(1,), attention=()), (2, 3, 5)),
        (DiTConfig(width=24, depth=1, heads=3, patch=1), (2, 3, 5)),
        (DiTConfig(width=24, depth=1, heads=3, patch=4), (1, 28, 12)),
    ],
)
def test_output_has_the_shape_of_the_samples(config: NetworkConfig, shape: tuple[int, ...]) -> None:
    network = perturbed(config.build(shape, num_classes=0, guided=False))
    x, t, s, _ = inputs(network)
    out = network(x, t, s)
    assert out.shape == x.shape
    assert out.isfinite().all()


@each_network
def test_output_starts_at_zero(name: str) -> None:
    network = build(name)
    assert network(*inputs(network)).count_nonzero() == 0


@each_network
def test_later_time_matters_only_after_training(name: str) -> None:
    network = build(name)
    for key, parameter in network.named_parameters():
        if not key.startswith(("embedding.s_branch", "embedding.guidance")):
            nn.init.normal_(parameter, std=0.1)
    x, t, s, cond = inputs(network)

    def change() -> float:
        other = replace(cond, guidance=None)
        return float((network(x, t, s, cond) - network(x, t, 1 - s, other)).detach().abs().max())

    assert change() == 0
    network(x, t, s, cond).square().mean().backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.sub_(0.1 * parameter.grad)
    assert change() > 0


@each_network
def test_every_parameter_receives_a_gradient(name: str) -> None:
    network = perturbed(build(name))
    network(*inputs(network)).square().mean().backward()
    idle = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.count_nonzero()]
    assert idle == []


@each_network
def test_no_class_is_said_in_three_ways(name: str) -> None:
    network = perturbed(build(name))
    x, t, s, cond = inputs(network)
    missing = torch.full((BATCH,), NULL_LABEL)
    by_label = network(x, t, s, Condition(missing))
    assert torch.equal(by_label, network(x, t, s))
    assert torch.equal(by_label, network(x, t, s, Condition(None)))
    assert torch.equal(missing, torch.full((BATCH,), NULL_LABEL))
    assert not torch.allclose(by_label, network(x, t, s, Condition(cond.labels)))


def test_labels_and_null_labels_mix_in_a_batch() -> None:
    embedding = ConditionEmbedding(8, num_classes=4, guided=False)
    t = torch.rand(4)
    labels = torch.tensor([0, NULL_LABEL, 3, NULL_LABEL])
    mixed = embedding(t, t, Condition(labels))
    assert torch.equal(mixed[1::2], embedding(t, t)[1::2])
    assert torch.equal(mixed[::2], embedding(t, t, Condition(labels.clamp(min=0)))[::2])


def test_guidance_defaults_to_none_at_all() -> None:
    network = perturbed(build("mlp"))
    x, t, s, _ = inputs(network)
    neutral = torch.tensor([0.0, 0.0, 1.0]).expand(BATCH, 3)
    assert torch.equal(network(x, t, s), network(x, t, s, Condition(None, neutral)))
    assert not torch.allclose(network(x, t, s), network(x, t, s, Condition(None, neutral + 1)))


@each_network
def test_exact_derivative_in_double_precision(name: str) -> None:
    network = perturbed(build(name, dtype=torch.float64))
    x, t, s, cond = inputs(network, torch.float64)
    tangents = (torch.randn_like(x), torch.randn_like(t))

    def function(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t, s, cond)

    with torch.no_grad():
        out, derivative = torch.func.jvp(function, (x, t), tangents)
        torch.testing.assert_close(out, function(x, t), rtol=1e-10, atol=1e-12)
        assert relative_error(derivative, central_difference(function, (x, t), tangents, 1e-5)) < 1e-6


@each_network
def test_exact_derivative_in_single_precision(name: str) -> None:
    network = perturbed(build(name))
    x, t, s, cond = inputs(network)
    tangents = (torch.randn_like(x), torch.randn_like(t))

    def function(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t, s, cond)

    with torch.no_grad():
        derivative = torch.func.jvp(function, (x, t), tangents)[1]
        assert derivative.dtype == torch.float32
        assert relative_error(derivative, central_difference(function, (x, t), tangents, 2e-3)) < 1e-2


@each_network
def test_gradients_pass_through_the_primal_of_a_dual_number(name: str) -> None:
    network = perturbed(build(name, dtype=torch.float64))
    x, t, s, cond = inputs(network, torch.float64)
    tangents = (torch.randn_like(x), torch.randn_like(t))
    expected_out, expected = torch.func.jvp(lambda x, t: network(x, t, s, cond), (x, t), tangents)
    plain = torch.autograd.grad(network(x, t, s, cond).square().sum(), list(network.parameters()))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip((x, t), tangents, strict=True)]
        out, derivative = forward_ad.unpack_dual(network(duals[0], duals[1], s, cond))
        assert derivative is not None
        torch.testing.assert_close(derivative, expected)
        through = torch.autograd.grad(out.square().sum(), list(network.parameters()))
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(through, plain)


@each_network
def test_gradients_pass_through_torch_func_jvp(name: str) -> None:
    """The primal's gradient is the plain one, and the tangent's gradient is that of the derivative."""
    network = perturbed(build(name, dtype=torch.float64))
    x, t, s, cond = inputs(network, torch.float64)
    tangents = (torch.randn_like(x), torch.randn_like(t))
    parameters = list(network.parameters())

    def function(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t, s, cond)

    out, derivative = torch.func.jvp(function, (x, t), tangents)
    through = torch.autograd.grad(out.square().sum(), parameters, retain_graph=True)
    plain = torch.autograd.grad(function(x, t).square().sum(), parameters)
    torch.testing.assert_close(through, plain)
    mixed = torch.autograd.grad(derivative.square().sum(), parameters, materialize_grads=True)
    numeric = central_difference(function, (x, t), tangents, 1e-4).square().sum()
    for exact, approximate in zip(mixed, torch.autograd.grad(numeric, parameters), strict=True):
        torch.testing.assert_close(exact, approximate, rtol=1e-5, atol=1e-6)


@each_network
def test_a_derivative_that_nothing_passes_back_through_records_less(name: str) -> None:
    network = perturbed(build(name, dtype=torch.float64))
    x, t, s, cond = inputs(network, torch.float64)
    tangents = (torch.randn_like(x), torch.randn_like(t))
    parameters = list(network.parameters())

    def recorded(attached: bool) -> tuple[int, Tensor, tuple[Tensor, ...]]:
        """Numbers kept for the backward pass, the derivative, and the output's gradients."""
        kept: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda v: kept.update({v.data_ptr(): v.numel()}) or v, lambda v: v
        ):
            out, derivative = jvp(lambda x, t: network(x, t, s, cond), (x, t), tangents, attached)
        assert derivative.requires_grad == attached
        gradients = torch.autograd.grad(out.square().sum(), parameters, materialize_grads=True)
        return sum(kept.values()), derivative, gradients

    (less, alone, gradients), (more, other, expected) = recorded(False), recorded(True)
    assert less < 0.9 * more
    near = 1e-12 if name == "dit-checkpoint" else 0.0  # which computes its blocks once more with the tangent
    torch.testing.assert_close((alone, gradients), (other, expected), rtol=near, atol=near)


@pytest.mark.parametrize("name", [name for name in SMALL if name != "dit-checkpoint"])
def test_derivative_compiles_without_graph_breaks(name: str) -> None:
    """In one block of those that repeat them; without gradients no activations are computed anew."""
    network = perturbed(build(name, depth=1))
    x, t, s, cond = inputs(network)
    tangents = (torch.randn_like(x), torch.randn_like(t))

    def derivative(x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        out, tangent = torch.func.jvp(lambda x, t: network(x, t, s, cond), (x, t), (dx, dt))
        return out, tangent

    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(derivative, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, t, *tangents), derivative(x, t, *tangents))


def test_unet_takes_any_memory_layout() -> None:
    network = perturbed(build("unet", dtype=torch.float64))
    x, t, s, cond = inputs(network, torch.float64)
    tangents = (torch.randn_like(x), torch.randn_like(t))
    plain = torch.func.jvp(lambda x, t: network(x, t, s, cond), (x, t), tangents)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    for other in (x.to(memory_format=torch.channels_last), transposed):
        torch.testing.assert_close(torch.func.jvp(lambda x, t: network(x, t, s, cond), (other, t), tangents), plain)
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.func.jvp(lambda x, t: network(x, t, s, cond), (x, t), tangents), plain)


@each_network
def test_state_round_trip(name: str) -> None:
    network = perturbed(build(name))
    other = build(name)
    other.load_state_dict(network.state_dict())
    assert torch.equal(network(*inputs(network)), other(*inputs(other)))
    assert not any("frequencies" in key or "sine" in key for key in network.state_dict())


@each_network
def test_autocast_keeps_close_to_single_precision(name: str) -> None:
    network = perturbed(build(name))
    with torch.autocast("cpu", torch.bfloat16):
        low = network(*inputs(network)).float()
    assert relative_error(low, network(*inputs(network))) < 0.1


def test_dropout_acts_in_training_only() -> None:
    config, shape = SMALL["unet"]
    assert isinstance(config, UNetConfig)
    network = perturbed(replace(config, dropout=0.5).build(shape, 0, False))
    x, t, s, _ = inputs(network)
    assert not torch.equal(network(x, t, s), network(x, t, s))
    network.eval()
    assert torch.equal(network(x, t, s), network(x, t, s))


def test_recomputation_changes_no_gradient() -> None:
    plain, saving = perturbed(build("dit")), build("dit-checkpoint")
    saving.load_state_dict(plain.state_dict())
    for network in (plain, saving):
        network(*inputs(network)).square().sum().backward()
    for expected, parameter in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (UNetConfig(), (1, 30, 28)),
        (UNetConfig(), (28, 28)),
        (UNetConfig(multipliers=()), (1, 28, 28)),
        (UNetConfig(dropout=1.0), (1, 28, 28)),
        (UNetConfig(head_width=48), (1, 28, 28)),
        (DiTConfig(patch=4), (1, 30, 28)),
        (DiTConfig(patch=4), (16,)),
        (DiTConfig(patch=4, mlp_ratio=math.inf), (1, 28, 28)),
        (DiTConfig(patch=4, mlp_ratio=math.nan), (1, 28, 28)),
        (DiTConfig(width=36, heads=6), (1, 28, 28)),
        (MLPConfig(width=0), (4,)),
        (MLPConfig(depth=0), (4,)),
        (MLPConfig(expansion=math.inf), (4,)),
        (MLPConfig(expansion=math.nan), (4,)),
        (MLPConfig(max_frequency=0.1), (4,)),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: NetworkConfig, shape: tuple[int, ...]) -> None:
    with torch.device("meta"), pytest.raises(ConfigError):
        config.build(shape, 0, False)


@each_network
def test_inputs_that_do_not_fit_are_refused(name: str) -> None:
    network = build(name)
    x, t, s, cond = inputs(network)
    with pytest.raises(ShapeError, match="samples of shape"):
        network(x[:, :1], t, s)
    with pytest.raises(ShapeError, match="times of shape"):
        network(x, t[:1], s)
    with pytest.raises(ShapeError, match="labels of shape"):
        network(x, t, s, Condition(torch.zeros(BATCH, 1, dtype=torch.int64)))
    with pytest.raises(ShapeError, match="guidance of shape"):
        network(x, t, s, Condition(None, torch.zeros(BATCH, 2)))
    bare = build(name, num_classes=0, guided=False)
    with pytest.raises(ConfigError, match="num_classes=0"):
        bare(x, t, s, Condition(cond.labels))
    with pytest.raises(ConfigError, match="guided=False"):
        bare(x, t, s, Condition(None, cond.guidance))


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_published_sizes_have_the_published_parameter_counts(size: Literal["S", "B", "L", "XL"], millions: int) -> None:
    with torch.device("meta"):
        network = DiTConfig.of(size, 2).build((4, 32, 32), num_classes=1000, guided=False)
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.03)


def test_published_size_with_another_depth() -> None:
    assert DiTConfig.of("B", 4, depth=3) == DiTConfig(width=768, depth=3, heads=12, patch=4)


def test_default_mlp_is_small() -> None:
    count = sum(parameter.numel() for parameter in MLPConfig().build((1, 8, 8), 10, False).parameters())
    assert 0.9e6 < count < 1.5e6
