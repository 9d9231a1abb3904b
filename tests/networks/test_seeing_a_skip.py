"""Networks that are shown what a skip lets through: the same at first, at s = t always, and trained through it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.flow.derivatives import Derivative
from fewstep.flow.flow_map import FlowMap, at
from fewstep.flow.paths import EDM
from fewstep.flow.preconditioning.covariance import CosineVariances, PrincipalComponents
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.flow.preconditioning.network_scaling import EDMScaling
from fewstep.flow.preconditioning.skip import SkipPreconditioning
from fewstep.networks.base import EmbeddingNetwork, Network
from fewstep.networks.condition import Condition
from fewstep.networks.dit import DiTConfig
from fewstep.networks.mlp import MLPConfig
from fewstep.networks.unet import UNetConfig
from fewstep.networks.unet1d import UNet1dConfig
from tests.support.cases import F64, close, noise

NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (MLPConfig(width=16, depth=1, embedding_width=8, max_frequency=4.0), (1, 4, 4)),
    "unet": (UNetConfig(width=8, multipliers=(1, 2), blocks=1, attention=(), embedding_width=8), (1, 4, 4)),
    "unet-patch": (UNetConfig(width=8, multipliers=(1,), blocks=1, attention=(), patch=2), (1, 4, 4)),
    "unet1d": (UNet1dConfig(width=8, embedding_width=8), (4, 4)),
    "dit": (DiTConfig(width=16, depth=1, heads=2, patch=2), (1, 4, 4)),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def skip(shape: tuple[int, ...]) -> SkipPreconditioning:
    vectors = torch.linalg.qr(noise(16, 16))[0]
    covariance = PrincipalComponents(0.3 * noise(*shape), vectors, torch.logspace(-2, 0.3, 16, dtype=F64), 0.0)
    return SkipPreconditioning(EulerPreconditioning(), covariance)


def shaken(network: Network) -> Network:
    """With noise on every weight, so that nothing in it is zero."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def maps(name: str) -> tuple[FlowMap, FlowMap, EmbeddingNetwork, Tensor]:
    """A flow map whose network sees nothing, one that took its weights and sees, that network, and samples."""
    config, shape = NETWORKS[name]
    plain = shaken(config.build(shape, 0, False).double())
    seeing = replace(config, sees_skip=True).build(shape, 0, False).double()
    seeing.take(plain, "the plain network")
    made = [FlowMap(EDM(), skip(shape), network, EDMScaling(0.7)) for network in (plain, seeing)]
    return made[0], made[1], seeing, noise(3, *shape, seed=4)


@every_network
def test_it_takes_the_weights_of_one_that_sees_nothing_and_starts_the_same(name: str) -> None:
    plain, seeing, _, x = maps(name)
    t, s = at(3.0, x), at(0.4, x)
    close(seeing.jump(x, t, s), plain.jump(x, t, s), rtol=1e-12, atol=1e-12)


@every_network
def test_at_s_equal_to_t_there_is_nothing_to_see(name: str) -> None:
    """Whatever its weights: the denoiser is that of the weights that it shares."""
    plain, seeing, network, x = maps(name)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if key.startswith(("seen.", "gate.")):
                parameter.add_(0.5)
    t = at(3.0, x)
    close(seeing.denoise(x, t), plain.denoise(x, t), rtol=1e-9, atol=1e-9)
    assert float((seeing.jump(x, t, at(0.4, x)) - plain.jump(x, t, at(0.4, x))).detach().abs().max()) > 1e-3


@every_network
def test_its_derivative_and_its_gradients_pass_through_what_it_sees(name: str) -> None:
    _, seeing, network, x = maps(name)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if key.startswith(("seen.", "gate.")):
                parameter.add_(0.3)
    t, s, v = at(2.0, x), at(0.5, x), noise(*x.shape, seed=9)
    output, slope = Derivative().along(seeing, x, v, t, s, Condition())
    h = 1e-5
    sides = [seeing.output(x + sign * h * v, t + sign * h, s) for sign in (1, -1)]
    close(slope, ((sides[0] - sides[1]) / (2 * h)).detach(), rtol=1e-5, atol=1e-6)
    output.square().mean().backward()
    for key, parameter in network.named_parameters():
        if key.startswith(("seen.", "gate.")):
            assert parameter.grad is not None
            assert float(parameter.grad.abs().max()) > 0


@pytest.mark.parametrize("basis", ["components", "cosine"])
def test_bf16_does_not_round_what_is_let_through(basis: str) -> None:
    """X = x at s = t, and nothing is seen there, whatever autocast is on."""
    shape, x = (1, 4, 4), noise(3, 1, 4, 4, seed=4).float()
    given = skip(shape)
    if basis == "cosine":
        variances = torch.logspace(-2, 0.3, 16, dtype=F64).reshape(shape)
        given = replace(given, covariance=CosineVariances(0.3 * noise(*shape), torch.eye(1, dtype=F64), variances))
    t, s = at(80.0, x), at(3.0, x)
    plain = given.linear(80 * x, t, s)
    with torch.autocast("cpu", torch.bfloat16):
        close(given.linear(80 * x, t, t), 80 * x, rtol=1e-5, atol=1e-4)
        close(given.shown(EDM(), 80 * x, t, t), torch.zeros_like(x), rtol=0, atol=1e-4)
        close(given.linear(80 * x, t, s), plain, rtol=1e-6, atol=1e-6)
