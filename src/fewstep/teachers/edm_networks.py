"""The networks of EDM (2206.00364) with a second time: DDPM++, NCSN++ (2011.13456) and ADM (2105.05233).

Parameters are named so that a network pickle's tensors fit, `scale` and `shift` of the norms standing for its `weight`
and `bias`. Dropout, and the branch of augmentation labels, which sees zeros when sampling, are left out.
"""

import math
import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from fewstep.networks.base import Shape
from fewstep.networks.condition import Condition
from fewstep.networks.layers import Conv2d, LinearLayer, check_inputs, silu
from fewstep.networks.pyramid import same_size
from fewstep.teachers.edm_blocks import (
    Block,
    BlockSettings,
    CheckpointableBlocks,
    FourierFeatures,
    Resample,
    ResamplingConv2d,
    check_taps,
    sinusoids,
)
from fewstep.teachers.lora import add_adapters, base_name, last_adapter
from fewstep.teachers.second_time import TwoTimes, TwoTimesConfig, TwoTimesNetwork, without_second_time
from fewstep.utils.errors import ConfigError, ShapeError
from fewstep.utils.tensors import check_choice, check_positive

_HALF = math.sqrt(0.5)


@dataclass(frozen=True)
class EDMNetworkConfig(TwoTimesConfig):
    """What the networks of EDM and EDM2 share.

    model_channels: at full resolution, times channel_mult at each level. attn_resolutions: heights with self-attention.
    log_half: whether the time given is sigma, of which the network embeds log(sigma/2), as VE does. time_factor: brings
    what it embeds to a range of some hundreds for the second time.
    """

    of_files: ClassVar[bool] = True
    attention: ClassVar[tuple[str, ...]] = ("qkv", "proj")
    model_channels: int
    channel_mult: tuple[int, ...]
    num_blocks: int
    attn_resolutions: tuple[int, ...]
    log_half: bool = False
    time_factor: float = 1.0

    def __post_init__(self) -> None:
        check_positive(
            model_channels=self.model_channels, num_blocks=self.num_blocks, time_factor=self.time_factor,
            channel_mult=min(self.channel_mult, default=0),
        )  # fmt: skip

    @property
    @abstractmethod
    def time_layer(self) -> str:
        """The name of the layer to whose output the second time is added."""

    @abstractmethod
    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        """(x, t, one-hot labels) -> raw outputs, of one time; x's channels come first."""

    @abstractmethod
    def output_name(self, height: int) -> str:
        """The name of its last layer, for samples of that height."""

    def build(self, shape: Shape, num_classes: int, guided: bool, observation: Shape = ()) -> "EDMNetwork":
        levels = len(self.channel_mult)
        if observation:
            raise ConfigError("networks of EDM take no observations as inputs")
        if len(shape) != 3 or any(side % 2 ** (levels - 1) for side in shape[1:]):
            raise ConfigError(
                f"a network of EDM with {levels} levels takes images (channels, height, width) whose sides can be "
                f"halved {levels - 1} times, not samples of shape {shape}"
            )
        return EDMNetwork(self, shape, num_classes, guided)


class EDMNetwork(TwoTimesNetwork):
    """A network of EDM or EDM2 as F(x, t, s, cond), t and s as its preconditioner gives c_noise.

    s counts for nothing at first. A sample without a label has zeros for its one-hot label. guided: the guidance enters
    beside s, and counts for nothing at first.
    """

    def __init__(self, config: EDMNetworkConfig, shape: Shape, num_classes: int, guided: bool = False) -> None:
        super().__init__(shape, num_classes, guided)
        self.config = config
        network = config.network(shape, num_classes)
        if config.adapters is not None:
            add_adapters(network, config.adapters, config.attention, config.time_layer)
        self.adapters = config.adapters
        self.two_times = TwoTimes(network, config.time_layer, config.time_factor, guided)
        if config.sees_skip:
            self.sees_skip = True
            self.two_times.see_skip(f"enc.{shape[1]}x{shape[1]}_conv", shape[0])
        self.eval()

    @property
    def last_layer(self) -> Tensor:
        if self.adapters is not None:
            return last_adapter(self.two_times.network)
        output = self.two_times.network.get_submodule(self.config.output_name(self.shape[1]))
        return output.weight  # type: ignore[return-value]

    def foreign_name(self, key: str) -> str | None:
        name = without_second_time(key.removeprefix("two_times."))
        name = None if name is None else base_name(name)
        if name is None:
            return None
        name = name.replace(f"{self.config.time_layer}.embedding.", f"{self.config.time_layer}.")
        return re.sub(r"\.scale$", ".weight", re.sub(r"\.shift$", ".bias", name))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        check_inputs(x, t, s, self.shape)
        if self.config.log_half:
            t, s = torch.log(0.5 * t), torch.log(0.5 * s)
        guidance, seen = (None, None) if cond is None else (cond.guidance, cond.seen)
        with self.two_times.at(s.to(x.dtype), guidance), self.two_times.seeing(seen):
            found: Tensor = self.two_times.network(x, t.to(x.dtype), self._one_hot(x, cond))
        return self.two_times.gated(found[:, : x.shape[1]], seen, t, s)

    def _one_hot(self, x: Tensor, cond: Condition | None) -> Tensor:
        """(B, num_classes), zero where there is no label."""
        labels = None if cond is None else cond.labels
        if labels is None:
            return x.new_zeros(len(x), self.num_classes)
        if not self.num_classes:
            raise ConfigError("labels were given to a network that was built with num_classes=0")
        if labels.shape != x.shape[:1]:
            raise ShapeError(f"labels of shape {tuple(labels.shape)} for {len(x)} samples: pass (B,)")
        return (labels[:, None] == torch.arange(self.num_classes, device=x.device)).to(x.dtype)


class _UNet(CheckpointableBlocks):
    """Levels of blocks down and up by the names of the files, with skips across."""

    def __init__(self, config: EDMNetworkConfig, height: int, settings: BlockSettings, wide: int, last: bool) -> None:
        """wide: channels at first. last: attention on the way up is the last block's of a level alone."""
        super().__init__()
        self.blocks = config.num_blocks
        self.names = [f"{height >> level}x{height >> level}" for level in range(len(config.channel_mult))]
        widths = [config.model_channels * factor for factor in config.channel_mult]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        attends = [height >> level in config.attn_resolutions for level in range(len(widths))]
        skips = [wide]
        for level, (name, own) in enumerate(zip(self.names, widths, strict=True)):
            if level:
                self.enc[f"{name}_down"] = Block(wide, wide, settings, "down")
                skips.append(wide)
            for index in range(self.blocks):
                self.enc[f"{name}_block{index}"] = Block(wide, own, settings, attend=attends[level])
                wide = own
                skips.append(wide)
        self.dec[f"{self.names[-1]}_in0"] = Block(wide, wide, settings, attend=True)
        self.dec[f"{self.names[-1]}_in1"] = Block(wide, wide, settings)
        for level, (name, own) in reversed(list(enumerate(zip(self.names, widths, strict=True)))):
            if level < len(widths) - 1:
                self.dec[f"{name}_up"] = Block(wide, wide, settings, "up")
            for index in range(self.blocks + 1):
                attend = attends[level] and (index == self.blocks or not last)
                self.dec[f"{name}_block{index}"] = Block(wide + skips.pop(), own, settings, attend=attend)
                wide = own

    def descend(self, x: Tensor, h: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        """h at the lowest level and the skips; x is what the network was given."""
        skips = [h]
        for level, name in enumerate(self.names):
            if level:
                h, x = self.join(self.apply_block(self.enc[f"{name}_down"], h, embedding), x, name)
                skips.append(h)
            for index in range(self.blocks):
                h = self.apply_block(self.enc[f"{name}_block{index}"], h, embedding)
                skips.append(h)
        h = self.apply_block(self.dec[f"{self.names[-1]}_in0"], h, embedding)
        return self.apply_block(self.dec[f"{self.names[-1]}_in1"], h, embedding), skips

    def join(self, h: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """h after a level's step down, and the side input for the next; here there is none."""
        return h, x

    def climb(self, h: Tensor, skips: list[Tensor], embedding: Tensor, level: int) -> Tensor:
        """h after one level up, which takes the level's skips off."""
        name = self.names[level]
        if level < len(self.names) - 1:
            h = self.apply_block(self.dec[f"{name}_up"], h, embedding)
        for index in range(self.blocks + 1):
            h = self.apply_block(self.dec[f"{name}_block{index}"], torch.cat([h, skips.pop()], 1), embedding)
        return h


class SongUNet(_UNet):
    """DDPM++ and NCSN++: (x, t, one-hot labels) -> raw outputs.

    The input may join every level, halved (`skip`), or halved with what joined before (`residual`). Outputs may be a
    sum over levels, each doubled to the next (`skip`).
    """

    def __init__(self, config: "SongUNetConfig", shape: Shape, num_classes: int) -> None:
        wide, taps = config.model_channels, config.resample_filter
        width = wide * config.channel_mult_emb
        settings = BlockSettings(width, taps, False, _HALF, 0, True, 1e-6)
        super().__init__(config, shape[1], settings, wide, last=True)
        self.config = config
        self.noise_channels = wide * config.channel_mult_noise
        if config.embedding_type == "fourier":
            self.map_noise = FourierFeatures(self.noise_channels)
        self.map_label = LinearLayer(num_classes, self.noise_channels) if num_classes else None
        self.map_layer0, self.map_layer1 = LinearLayer(self.noise_channels, width), LinearLayer(width, width)
        self.enc[f"{self.names[0]}_conv"] = same_size(Conv2d, shape[0], wide, 3)
        outputs = shape[0] * (2 if config.learned_variance else 1)
        wides = [wide, *(wide * factor for factor in config.channel_mult)]
        aux = shape[0]
        for level, name in enumerate(self.names):
            if level and config.encoder_type == "skip":
                self.enc[f"{name}_aux_down"] = Resample(taps, "down")
                self.enc[f"{name}_aux_skip"] = Conv2d(aux, wides[level], 1)
            if level and config.encoder_type == "residual":
                self.enc[f"{name}_aux_residual"] = ResamplingConv2d(aux, wides[level], 3, taps, "down", after=True)
                aux = wides[level]
            if config.decoder_type == "skip" and level < len(self.names) - 1:
                self.dec[f"{name}_aux_up"] = Resample(taps, "up")
            if config.decoder_type == "skip" or level == 0:
                self.dec[f"{name}_aux_norm"] = settings.norm(wides[level + 1])
                self.dec[f"{name}_aux_conv"] = same_size(Conv2d, wides[level + 1], outputs, 3)

    def embed(self, t: Tensor, labels: Tensor) -> Tensor:
        """Of the time and the labels."""
        if self.config.embedding_type == "fourier":
            embedded = self.map_noise(t)
        else:
            embedded = torch.cat(sinusoids(t, self.noise_channels, endpoint=True)[::-1], 1)
        if self.map_label is not None:
            embedded = embedded + self.map_label(labels * math.sqrt(labels.shape[1]))
        return silu(self.map_layer1(silu(self.map_layer0(embedded))))

    def join(self, h: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        if self.config.encoder_type == "skip":
            x = self.enc[f"{name}_aux_down"](x)
            return h + self.enc[f"{name}_aux_skip"](x), x
        if self.config.encoder_type == "residual":
            h = (h + self.enc[f"{name}_aux_residual"](x)) * _HALF
            return h, h
        return h, x

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        embedding = self.embed(t, labels)
        h, skips = self.descend(x, self.enc[f"{self.names[0]}_conv"](x), embedding)
        outputs: Tensor | None = None
        for level, name in reversed(list(enumerate(self.names))):
            h = self.climb(h, skips, embedding, level)
            if outputs is not None and f"{name}_aux_up" in self.dec:
                outputs = self.dec[f"{name}_aux_up"](outputs)
            if f"{name}_aux_norm" in self.dec:
                own = self.dec[f"{name}_aux_conv"](silu(self.dec[f"{name}_aux_norm"](h)))
                outputs = own if outputs is None else outputs + own
        assert outputs is not None
        return outputs


class DhariwalUNet(_UNet):
    """ADM: (x, t, one-hot labels) -> raw outputs."""

    def __init__(self, config: "DhariwalUNetConfig", shape: Shape, num_classes: int) -> None:
        width, wide = config.model_channels * config.channel_mult_emb, config.model_channels * config.channel_mult[0]
        settings = BlockSettings(width)
        super().__init__(config, shape[1], settings, wide, last=False)
        self.model_channels = config.model_channels
        self.map_layer0, self.map_layer1 = LinearLayer(config.model_channels, width), LinearLayer(width, width)
        self.map_label = LinearLayer(num_classes, width, bias=False) if num_classes else None
        self.enc[f"{self.names[0]}_conv"] = same_size(Conv2d, shape[0], wide, 3)
        self.out_norm = settings.norm(wide)
        self.out_conv = same_size(Conv2d, wide, shape[0] * (2 if config.learned_variance else 1), 3)

    def embed(self, t: Tensor, labels: Tensor) -> Tensor:
        """Of the time and the labels."""
        embedded = self.map_layer0(torch.cat(sinusoids(t, self.model_channels, endpoint=False), 1))
        embedded = self.map_layer1(silu(embedded))
        if self.map_label is not None:
            embedded = embedded + self.map_label(labels)
        return silu(embedded)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        embedding = self.embed(t, labels)
        h, skips = self.descend(x, self.enc[f"{self.names[0]}_conv"](x), embedding)
        for level in reversed(range(len(self.names))):
            h = self.climb(h, skips, embedding, level)
        outputs: Tensor = self.out_conv(silu(self.out_norm(h)))
        return outputs


@final
@dataclass(frozen=True)
class SongUNetConfig(EDMNetworkConfig):
    """DDPM++ (positional, standard) and NCSN++ (fourier, residual)."""

    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    channel_mult_emb: int = 4
    embedding_type: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: int = 1
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    decoder_type: Literal["standard", "skip"] = "standard"
    resample_filter: tuple[float, ...] = (1.0, 1.0)
    learned_variance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("embedding_type", self.embedding_type, ("positional", "fourier"))
        check_choice("encoder_type", self.encoder_type, ("standard", "skip", "residual"))
        check_choice("decoder_type", self.decoder_type, ("standard", "skip"))
        check_positive(channel_mult_emb=self.channel_mult_emb, channel_mult_noise=self.channel_mult_noise)
        check_taps(self.resample_filter)

    @property
    def time_layer(self) -> str:
        return "map_layer1"

    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        return SongUNet(self, shape, num_classes)

    def output_name(self, height: int) -> str:
        return f"dec.{height}x{height}_aux_conv"


@final
@dataclass(frozen=True)
class DhariwalUNetConfig(EDMNetworkConfig):
    """ADM."""

    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    channel_mult_emb: int = 4
    learned_variance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(channel_mult_emb=self.channel_mult_emb)

    @property
    def time_layer(self) -> str:
        return "map_layer1"

    def network(self, shape: Shape, num_classes: int) -> nn.Module:
        return DhariwalUNet(self, shape, num_classes)

    def output_name(self, height: int) -> str:
        return "out_conv"
