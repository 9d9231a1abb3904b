"""The study's teachers on digits with classes: one made by diffusers, one in the layout of EDM's network pickles."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.sources import DataConfig, DigitsSource, load_dataset
from fewstep.flow.flow_map import FlowMapConfig
from fewstep.flow.paths import EDM
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.flow.preconditioning.network_scaling import EDMScaling
from fewstep.networks.condition import Condition
from fewstep.teachers.edm_networks import EDMNetwork, SongUNetConfig
from tests.support.edm_files import EasyDict, module, write

NETWORK: dict[str, Any] = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (32, 64),
    "norm_num_groups": 8, "num_class_embeds": 10, "attention_head_dim": 32,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
EDM_NETWORK: dict[str, Any] = {
    "model_channels": 24, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "channel_mult_emb": 2,
    "embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard",
}  # fmt: skip
NOISE_MEAN, NOISE_STD = -0.5, 1.8
"""Of log sigma, wider than EDM's, so that the teacher is true at the noise end too."""


def diffusers_teacher(folder: Path, steps: int = 2000, batch: int = 128) -> None:
    """A `UNet2DModel` trained by diffusers' `DDPMScheduler`, saved as a pipeline."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    x0, labels, _ = digits()
    model = UNet2DModel(**NETWORK)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")

    def loss() -> Tensor:
        rows, t = torch.randint(len(x0), (batch,)), torch.randint(1000, (batch,))
        eps = torch.randn(batch, 1, 8, 8)
        predicted = model(scheduler.add_noise(x0[rows], eps, t), t, class_labels=labels[rows]).sample
        return (predicted - scheduler.get_velocity(x0[rows], eps, t)).square().mean()

    DDPMPipeline(trained(model, loss, steps), scheduler).save_pretrained(folder)


def edm_teacher(file: Path, steps: int = 2000, batch: int = 128) -> None:
    """A small DDPM++ trained with EDM's loss, w(sigma) |D(x0 + sigma eps) - x0|^2, written as EDM's pickles are."""
    torch.manual_seed(0)
    x0, labels, sigma_data = digits()
    path = EDM()
    config = SongUNetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in EDM_NETWORK.items()})
    scaling = EDMScaling(sigma_data, path)
    flow_map = FlowMapConfig(path, EulerPreconditioning(path), scaling, config, (1, 8, 8), 10, sigma_data=sigma_data)
    built = flow_map.build()
    assert isinstance(built.network, EDMNetwork)
    built.network.freeze_second_time()

    def loss() -> Tensor:
        rows = torch.randint(len(x0), (batch,))
        sigma = torch.exp(NOISE_MEAN + NOISE_STD * torch.randn(batch)).clamp(path.t_min, path.t_max)
        x = x0[rows] + sigma[:, None, None, None] * torch.randn(batch, 1, 8, 8)
        error = (built.denoise(x, sigma, Condition(labels[rows])) - x0[rows]).square().mean((1, 2, 3))
        return ((sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2 * error).mean()

    network = trained(built.network, loss, steps)
    arguments = {"img_channels": 1, "label_dim": 10, "model_type": "SongUNet", "sigma_data": sigma_data, **EDM_NETWORK}
    weights = {f"model.{name}": value for name, value in foreign_weights(network)}
    stored = module(weights, "EDMPrecond", "Conv2d", _init_args=(8,), _init_kwargs=EasyDict(arguments))
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, EasyDict(ema=stored))


def trained(model: nn.Module, loss: Callable[[], Tensor], steps: int) -> nn.Module:
    """An average of its weights over AdamW's steps, with a rate that falls to a hundredth."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.997))
    for _ in range(steps):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update_parameters(model)
    found: nn.Module = average.module
    return found


def foreign_weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors by the names that EDM's files have; the second time is not among them."""
    assert isinstance(network, EDMNetwork)
    for key, value in network.state_dict().items():
        name = network.foreign_name(key)
        if name is not None:
            yield name, value.detach().clone()


def digits() -> tuple[Tensor, Tensor, float]:
    """Images (n, 1, 8, 8), classes (n,) and the standard deviation of the training part."""
    data = load_dataset(DataConfig(DigitsSource()))
    x0, labels = data.train.fetch(torch.arange(len(data.train)))
    assert labels is not None
    return x0, labels, data.sigma_data
