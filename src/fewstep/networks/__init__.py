"""Networks F(x, t, s, cond), and the settings that build them."""

from fewstep.networks.base import Network, NetworkConfig
from fewstep.networks.discriminator import Discriminator, DiscriminatorConfig
from fewstep.networks.dit import DiT, DiTConfig
from fewstep.networks.mlp import MLP, MLPConfig
from fewstep.networks.unet import UNet, UNetConfig
from fewstep.networks.unet1d import UNet1d, UNet1dConfig

__all__ = [
    "MLP",
    "DiT",
    "DiTConfig",
    "Discriminator",
    "DiscriminatorConfig",
    "MLPConfig",
    "Network",
    "NetworkConfig",
    "UNet",
    "UNet1d",
    "UNet1dConfig",
    "UNetConfig",
]
