"""Autoencoders between images and latents: loaded from a local folder, identified, and put to work both ways."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fewstep.data.latents.autoencoder_kinds import KINDS, KNOWN, Units
from fewstep.networks.base import MOST_TENSORS, at_most
from fewstep.utils.errors import CheckpointError, ConfigError, MissingExtraError, ShapeError
from fewstep.utils.extras import installing
from fewstep.utils.files import read_record
from fewstep.utils.tensors import nonzero
from fewstep.utils.weights import digest_of_settings, digest_of_tensors

CONFIG_FILE = "config.json"
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
        """z = mean + std x / scale: samples x (n, C, h, w), or (n, C, t, h, w), in the autoencoder's units."""
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
        if like.ndim not in (4, 5) or like.shape[1] != len(self.mean):
            raise ShapeError(f"latents have shape (n, {len(self.mean)}, h, w), got {tuple(like.shape)}")
        mean, std = (torch.tensor(values, dtype=torch.float64).to(like) for values in (self.mean, self.std))
        sides = (-1, *[1] * (like.ndim - 2))
        return mean.reshape(sides), std.reshape(sides)


class Autoencoder:
    """An autoencoder of diffusers in float32: images (n, C, H, W) in [-1, 1] to latents (n, c, h, w) and back.

    One of videos takes (n, C, T, H, W) to (n, c, t, h, w), and an image as a video of one frame. Latents are the
    model's own, without the scaling factor that diffusion pipelines multiply them by.
    """

    def __init__(self, model: Any, identity: AutoencoderIdentity, device: torch.device) -> None:
        self._model = model.to(device).eval().requires_grad_(False)
        self.identity, self.device, self._kind = identity, device, KINDS[identity.kind]
        self.image_channels = self._kind.image_channels(model.config)
        self.factor = self._kind.factor(model.config)
        """Pixels to a latent's side."""

    @property
    def units(self) -> Units:
        """Its pipeline's."""
        return self._kind.units(self._model.config)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, each (n, c, h, w), on the autoencoder's device.

        The deviation is 0 where the autoencoder has one latent for an image.
        """
        frames = images[:, :, None] if self._kind.of_video and images.ndim == 4 else images
        return self._kind.posterior(self._model.encode(frames.to(self.device)))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, about [-1, 1], on the autoencoder's device; a video of one frame is an image."""
        images: Tensor = self._model.decode(latents.to(self.device)).sample
        return images[:, :, 0] if images.ndim == 5 and images.shape[2] == 1 else images


@dataclass(frozen=True)
class Decoder:
    """What latents are, with their autoencoder."""

    spec: LatentSpec
    autoencoder: Autoencoder

    def images(self, samples: Tensor) -> Tensor:
        """Images (n, C, H, W) in [-1, 1] on the CPU, of samples (n, c, h, w); a few at a time pass the autoencoder.

        Of videos (n, C, T, H, W), where there is more than one frame.
        """
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
    """The autoencoder that diffusers' `save_pretrained` wrote to a folder; nothing is downloaded or unpickled.

    Raises CheckpointError when the folder is missing, damaged or holds another kind of model, MissingExtraError
    without the extra [diffusers].
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG_FILE}: give the folder of an {KNOWN}, such as the folder vae of a pipeline"
        )
    settings = read_record(file, "copy the model again")
    kind = str(settings.get("_class_name"))
    if kind not in KINDS:
        raise CheckpointError(f"{folder} holds a model of class {kind!r}: give the folder of an {KNOWN}")
    try:
        import diffusers

        model_class: Any = getattr(diffusers, kind)
    except (
        ImportError,
        AttributeError,
        RuntimeError,
    ) as error:  # RuntimeError: one of its own extras does not fit torch
        raise MissingExtraError(f"autoencoders need diffusers: {installing('diffusers')} ({error})") from error
    try:
        with at_most(MOST_TENSORS):
            model, info = model_class.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
            )
    except _UNREADABLE as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError(f"{folder} holds no {kind} that can be read from safetensors: {reason}") from error
    if info["missing_keys"]:
        raise CheckpointError(
            f"{folder} lacks {len(info['missing_keys'])} of its weights, such as {min(info['missing_keys'])}"
        )
    return Autoencoder(model, _identify(folder, settings, model), device)


def _identify(folder: Path, settings: dict[str, Any], model: Any) -> AutoencoderIdentity:
    digests = digest_of_settings(settings), digest_of_tensors(model.state_dict())
    return AutoencoderIdentity(str(settings["_class_name"]), *digests, str(folder.resolve()))
