"""Networks that see observations: each takes them in, exact derivatives pass, shapes that do not fit are refused."""

import pytest
import torch

from fewstep.networks.base import Network, NetworkConfig
from fewstep.networks.condition import Condition
from fewstep.networks.mlp import MLPConfig
from fewstep.networks.unet1d import UNet1dConfig
from fewstep.utils.errors import ConfigError, ShapeError
from fewstep.utils.forward_ad import jvp

CONFIGS: dict[str, NetworkConfig] = {
    "mlp": MLPConfig(width=16, depth=1, embedding_width=8),
    "unet1d": UNet1dConfig(width=8, multipliers=(1, 2), blocks=2, kernel=3, embedding_width=8),
}


def made(name: str) -> Network:
    torch.manual_seed(0)
    network = CONFIGS[name].build((8, 3), 0, False, (2, 5)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("name", CONFIGS)
def test_derivatives_pass_while_the_observation_stays(name: str) -> None:
    network, x = made(name), torch.randn(4, 8, 3, dtype=torch.float64)
    t, s = torch.rand(2, 4, dtype=torch.float64)
    cond, v, h = Condition(observation=torch.randn(4, 2, 5)), torch.randn_like(x), 1e-6

    def output(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return network(x, t, s, cond)

    _, tangent = jvp(output, (x, t), (v, torch.ones_like(t)))
    difference = (output(x + h * v, t + h) - output(x - h * v, t - h)) / (2 * h)
    torch.testing.assert_close(tangent, difference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_observed_number_matters(name: str) -> None:
    network, x, t = made(name), torch.randn(1, 8, 3, dtype=torch.float64), torch.rand(1, dtype=torch.float64)
    seen = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x, t, t, Condition(observation=seen)).square().sum(), seen)
    assert (gradient.abs() > 1e-9).all()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(1, 5), (2, 4), (10,)])
def test_observations_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    network, t = made(name), torch.rand(3, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"\(B, 2, 5\)"):
        network(torch.zeros(3, 8, 3, dtype=torch.float64), t, t, Condition(observation=torch.zeros(3, *shape)))


@pytest.mark.parametrize(
    ("config", "shape", "said"),
    [
        (UNet1dConfig(), (3, 8, 8), r"not samples of shape \(3, 8, 8\)"),
        (UNet1dConfig(multipliers=(1, 2, 2)), (6, 2), "divisible by 4"),
        (UNet1dConfig(kernel=4), (8, 2), "odd kernel"),
        (UNet1dConfig(kernel=-3), (8, 2), "odd kernel"),
        (UNet1dConfig(multipliers=()), (8, 2), "multipliers"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(config: UNet1dConfig, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.build(shape, 0, False, (2, 5))
