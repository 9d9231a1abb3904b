"""Autoencoders between images and latents: loaded from a local folder, identified, and put to work both ways."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fewstep.networks.base import MOST_TENSORS, at_most
from fewstep.utils.errors import CheckpointError, ConfigError, MissingExtraError, ShapeError
from fewstep.utils.files import read_record
from fewstep.utils.tensors import nonzero
from fewstep.utils.weights import digest_of_settings, digest_of_tensors

CONFIG_FILE = "config.json"
_KIND = "AutoencoderKL"
_AT_ONCE, _AT_ONCE_ON_CPU = 16, 4  # larger batches spend more of a CPU's time on memory than they save
# What diffusers raises on folders that hold no such model, or another.
_UNREADABLE = (ConfigError, OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class AutoencoderIdentity:
    """Which autoencoder: its class, sixteen hex digits each of its configuration and its weights, and where it lay.

    The path is a hint: an autoencoder that was moved is the same.
    """

    kind: str
    config: str
    weights: str
    path: str

    def same_as(self, other: "AutoencoderIdentity") -> bool:
        """Whether both are one autoencoder, wherever it lies."""
        return self == replace(other, path=self.path)


@dataclass(frozen=True)
class LatentSpec:
    """How samples of latents become images: decode(mean + std x / scale), channel by channel.

    mean, std: of the autoencoder's latents, (C,); a channel of std 0 never varies and takes no part: x = 0 there, and
    z = mean whatever x is. scale: of the samples x. image_shape: of an image, (C, H, W).
    Raises ConfigError for negative standard deviations, where no channel varies, or numbers that are not finite.
    """

    autoencoder: AutoencoderIdentity
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    image_shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, (*self.mean, *self.std, self.scale)))
        varies = min(self.std, default=-1) >= 0 < max(self.std, default=0)
        if not (finite and varies) or min(self.scale, *self.image_shape) <= 0 or len(self.mean) != len(self.std):
            raise ConfigError(
                f"latents of mean {self.mean}, std {self.std} and scale {self.scale}, images of {self.image_shape}: "
                "the same number of means and deviations, all finite, none negative, one positive, and a positive "
                "scale and sizes"
            )

    def latents(self, samples: Tensor) -> Tensor:
        """z = mean + std x / scale: samples x (n, C, h, w) in the autoencoder's own units."""
        mean, std = self._channels(samples)
        return mean + std / self.scale * samples

    def samples(self, latents: Tensor) -> Tensor:
        """x = scale (z - mean) / std: the inverse of `latents`; 0 where std is."""
        mean, std = self._channels(latents)
        return self.scale / nonzero(std) * (latents - mean)

    @property
    def constant(self) -> tuple[int, ...]:
        """Which channels never vary."""
        return tuple(i for i, std in enumerate(self.std) if std == 0)

    def _channels(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if like.ndim != 4 or like.shape[1] != len(self.mean):
            raise ShapeError(f"latents have shape (n, {len(self.mean)}, h, w), got {tuple(like.shape)}")
        mean, std = (torch.tensor(values, dtype=torch.float64).to(like) for values in (self.mean, self.std))
        return mean[:, None, None], std[:, None, None]


@dataclass(frozen=True)
class Units:
    """How a diffusion pipeline reads its autoencoder's latents z: as (z - shift) factor, channel by channel."""

    shift: tuple[float, ...]
    factor: tuple[float, ...]


class Autoencoder:
    """A diffusers AutoencoderKL in float32: images (n, C, H, W) in [-1, 1] to latents (n, c, h, w) and back.

    Latents are the model's own, without the scaling factor that diffusion pipelines multiply them by.
    """

    def __init__(self, model: Any, identity: AutoencoderIdentity, device: torch.device) -> None:
        self._model = model.to(device).eval().requires_grad_(False)
        self.identity, self.device = identity, device
        self.image_channels = int(model.config.in_channels)
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)
        """Pixels to a latent's side."""

    @property
    def units(self) -> Units:
        """Its pipeline's: by its scaling and shift factors, and its latents' mean and deviation where it has these."""
        settings = self._model.config
        channels = int(settings.latent_channels)
        mean = getattr(settings, "latents_mean", None) or [getattr(settings, "shift_factor", None) or 0.0] * channels
        std = getattr(settings, "latents_std", None) or [1.0] * channels
        return Units(tuple(map(float, mean)), tuple(float(settings.scaling_factor) / float(each) for each in std))

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, each (n, c, h, w), on the autoencoder's device."""
        posterior = self._model.encode(images.to(self.device)).latent_dist
        return posterior.mean, posterior.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, about [-1, 1], on the autoencoder's device."""
        images: Tensor = self._model.decode(latents.to(self.device)).sample
        return images


@dataclass(frozen=True)
class Decoder:
    """What latents are, with their autoencoder."""

    spec: LatentSpec
    autoencoder: Autoencoder

    def images(self, samples: Tensor) -> Tensor:
        """Images (n, C, H, W) in [-1, 1] on the CPU, of samples (n, c, h, w); a few at a time pass the autoencoder."""
        count = _AT_ONCE_ON_CPU if self.autoencoder.device.type == "cpu" else _AT_ONCE
        parts = (self.spec.latents(part.float().to(self.autoencoder.device)) for part in torch.split(samples, count))
        return torch.cat([self.autoencoder.decode(latents).clamp(-1.0, 1.0).cpu() for latents in parts])


def load_decoder(spec: LatentSpec, path: Path | None, device: torch.device) -> Decoder:
    """The decoder of some latents, its autoencoder taken from `path`, or from where it lay when they were encoded.

    Raises CheckpointError when it is missing, damaged, or another autoencoder; MissingExtraError without diffusers.
    """
    place = Path(spec.autoencoder.path) if path is None else path
    try:
        found = load_autoencoder(place, device)
    except CheckpointError as error:
        raise CheckpointError(
            f"the autoencoder that makes images of these latents cannot be read: {error}; give where it lies now with "
            "--autoencoder"
        ) from error
    if not found.identity.same_as(spec.autoencoder):
        raise CheckpointError(
            f"{place} holds another autoencoder (weights {found.identity.weights}) than the latents were encoded with "
            f"(weights {spec.autoencoder.weights}): give that one with --autoencoder"
        )
    return Decoder(spec, found)


def load_autoencoder(folder: Path, device: torch.device) -> Autoencoder:
    """The AutoencoderKL that diffusers' `save_pretrained` wrote to a folder; nothing is downloaded or unpickled.

    Raises CheckpointError when the folder is missing, damaged or holds another kind of model, MissingExtraError
    without the extra [diffusers].
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG_FILE}: give the folder of an {_KIND}, such as the folder vae of a pipeline"
        )
    settings = read_record(file, "copy the model again")
    if settings.get("_class_name") != _KIND:
        found = settings.get("_class_name")
        raise CheckpointError(f"{folder} holds a model of class {found!r}: give the folder of an {_KIND}")
    try:
        import diffusers

        model_class: Any = diffusers.AutoencoderKL
    except (ImportError, RuntimeError) as error:  # RuntimeError: one of its own extras does not fit torch
        raise MissingExtraError(f"autoencoders need diffusers: pip install 'fewstep[diffusers]' ({error})") from error
    try:
        with at_most(MOST_TENSORS):
            model, info = model_class.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
            )
    except _UNREADABLE as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError(f"{folder} holds no {_KIND} that can be read from safetensors: {reason}") from error
    if info["missing_keys"]:
        raise CheckpointError(
            f"{folder} lacks {len(info['missing_keys'])} of its weights, such as {min(info['missing_keys'])}"
        )
    return Autoencoder(model, _identify(folder, settings, model), device)


def _identify(folder: Path, settings: dict[str, Any], model: Any) -> AutoencoderIdentity:
    digests = digest_of_settings(settings), digest_of_tensors(model.state_dict())
    return AutoencoderIdentity(_KIND, *digests, str(folder.resolve()))
