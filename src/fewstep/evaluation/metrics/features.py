"""Features that images are compared by, and the classes they are recognised as.

A distance between sets of images is a distance between sets of features, so each figure carries the name of the
extractor behind it. Labelled data trains a small classifier of its own; unlabelled data falls back on its values
where they are few and on random convolutions elsewhere; published figures need the Inception network of the
literature.
"""

import hashlib
import json
import math
import pickle
import re
import struct
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.data.base import Dataset, SampleSet
from fewstep.data.latents.autoencoders import Decoder
from fewstep.data.order import batch_indices
from fewstep.evaluation.metrics.perception import activations
from fewstep.utils.errors import (
    CheckpointError,
    DataError,
    FewstepWarning,
    MissingExtraError,
    ShapeError,
    UnsupportedError,
)
from fewstep.utils.extras import installing
from fewstep.utils.files import parse_json, write_atomically
from fewstep.utils.random import Draws

_DIMENSION = 64
_FEW_VALUES = 64  # up to here a sample's own numbers are its features
_RECIPE = 1  # raise with any change to the network or its training: names of extractors must not outlive them
_HEADER = "fewstep_extractor"
_BATCH = 256
_INCEPTION_BATCH = 32
_DECODED_AT_ONCE = 64
# What torch's restricted unpickler is seen to raise on bytes that are no checkpoint.
_UNREADABLE = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, struct.error,
    pickle.UnpicklingError,
)  # fmt: skip


class Extractor(ABC):
    """Images to features. `name` identifies the features: equal names mean comparable figures."""

    name: str

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Images (n, C, H, W), float about [-1, 1] -> (n, d) float64 on the CPU. Raises ShapeError on unfit images."""

    def classify(self, images: Tensor) -> Tensor:
        """Images (n, C, H, W) -> their classes (n,) int64 on the CPU; raises UnsupportedError without any."""
        raise UnsupportedError(f"{self.name} knows no classes of the data: measure accuracy by a classifier")

    def perceive(self, images: Tensor) -> Tensor:
        """Images (n, C, H, W) -> (n, d) on their own device, differentiable: the mean square of a difference is a
        perceptual distance. Raises ShapeError on unfit images, UnsupportedError where there is no gradient.
        """
        raise UnsupportedError(f"{self.name} passes no gradient: compare by a classifier, or latents as they are")


class _Convolutions(Extractor):
    """The features before a network's head, and its convolutions' activations."""

    def __init__(self, name: str, network: nn.Sequential, shape: tuple[int, int, int]) -> None:
        self.name, self._shape, self._network = name, shape, network.eval().requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        _check_images(images, self._shape)
        return _apply(self._network[:-1], images, _BATCH).double()

    def perceive(self, images: Tensor) -> Tensor:
        """The activations after every convolution; the network moves to the device of the images and stays there."""
        _check_images(images, self._shape)
        return activations(self._network.to(images.device)[:-1], images.float())


class ClassifierExtractor(_Convolutions):
    """The 64 penultimate features of a small classifier that `train_extractor` trained on the data set itself.

    heldout_accuracy: share of held-out samples that it recognises. Figures compare across machines only through
    the same saved file: training elsewhere, or on another number of threads, rounds differently.
    """

    def __init__(self, name: str, network: nn.Sequential, shape: tuple[int, int, int], heldout_accuracy: float) -> None:
        super().__init__(name, network, shape)
        self.heldout_accuracy = heldout_accuracy

    def classify(self, images: Tensor) -> Tensor:
        _check_images(images, self._shape)
        return _apply(self._network, images, _BATCH).argmax(1)


class RandomConvExtractor(_Convolutions):
    """64 features of the same convolutions at their random initial values, for data without labels.

    They see texture and layout but no meaning: fit to compare runs on one data set, and nothing beyond (Naeem et al.
    2020 use random embeddings so). Values depend on the shape (C, H, W) and the seed alone.
    """

    def __init__(self, shape: tuple[int, int, int], seed: int = 0) -> None:
        channels, height, width = shape
        name = f"random-conv-{channels}x{height}x{width}-v{_RECIPE}-seed{seed}"
        super().__init__(name, _build(shape, 1, seed), shape)


class IdentityExtractor(Extractor):
    """A sample's own numbers, for unlabelled data of few dimensions such as toys: distances without a network's eye."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.name = "values-" + "x".join(str(size) for size in shape)
        self._shape = shape

    def features(self, images: Tensor) -> Tensor:
        return self.perceive(images.detach()).double().cpu()

    def perceive(self, images: Tensor) -> Tensor:
        """The numbers themselves: plain L2."""
        _check_images(images, self._shape)
        return images.flatten(1)


class InceptionExtractor(Extractor):
    """The 2048 pooled features of the Inception-v3 network behind published FID figures, through torch-fidelity.

    weights: a local copy of torch-fidelity's weights-inception-2015-12-05-6726825d.pth; nothing is downloaded. The
    name ends in the file's SHA-256, which for that file begins 6726825d. Images of 1 or 3 channels are rounded to
    8 bits first, as the literature's are. Raises DataError for a missing or unusable file, MissingExtraError without
    the extra [eval] or where its torchvision does not fit torch.
    """

    def __init__(self, weights: Path) -> None:
        if not weights.is_file():
            raise DataError(
                f"no Inception weights at {weights}: fetch weights-inception-2015-12-05-6726825d.pth from the "
                f"v0.2.0 release of github.com/toshas/torch-fidelity and give its path"
            )
        self._network = _load_inception(weights)
        self.name = f"inception-v3-{hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}"

    def features(self, images: Tensor) -> Tensor:
        _check_images(images, None)
        if images.shape[1] not in (1, 3):
            raise ShapeError(f"Inception takes images of 1 or 3 channels, not {images.shape[1]}")
        if not bool(torch.isfinite(images).all()):
            raise ShapeError("the images hold NaN or infinity, which rounding to 8 bits would hide")
        pixels = (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
        return _apply(lambda part: self._network(part)[0], pixels, _INCEPTION_BATCH).double()


def _load_inception(weights: Path) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise MissingExtraError(
            f"Inception features need torch-fidelity and a torchvision that fits torch: {installing('eval')} ({error})"
        ) from error
    try:
        # torch-fidelity unpickles without restraint; a file that holds only tensors passes here first.
        torch.load(weights, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(weights))
    except _UNREADABLE as error:
        raise DataError(f"{weights} does not hold torch-fidelity's Inception weights: {error}") from error
    found: nn.Module = network.eval()
    return found


class DecodedExtractor(Extractor):
    """Latents, decoded, as another extractor sees images; it keeps that one's name, for the features are its own.

    Where an Extractor speaks of images, this one takes samples (n, c, h, w) of latents. They are decoded a few at a
    time, so that the images never lie in memory together.
    """

    def __init__(self, extractor: Extractor, decoder: Decoder) -> None:
        self.name, self._extractor, self._decoder = extractor.name, extractor, decoder

    def features(self, images: Tensor) -> Tensor:
        parts = torch.split(images, _DECODED_AT_ONCE)
        return torch.cat([self._extractor.features(self._decoder.images(part)) for part in parts])


def default_extractor(
    dataset: Dataset, seed: int = 0, cache: Path | None = None
) -> ClassifierExtractor | IdentityExtractor | RandomConvExtractor:
    """A classifier trained on the data where it has at least two classes.

    Without labels the values themselves, where a sample has at most 64 of them; random convolutions otherwise.
    """
    if dataset.num_classes == 0 and math.prod(dataset.image_shape) <= _FEW_VALUES:
        return IdentityExtractor(dataset.image_shape)
    if dataset.num_classes < 2:
        return RandomConvExtractor(dataset.image_shape, seed)
    return train_extractor(dataset, seed, cache)


def train_extractor(dataset: Dataset, seed: int = 0, cache: Path | None = None) -> ClassifierExtractor:
    """Train the data set's own classifier on its training split, or load it from the folder `cache`.

    Training runs on the CPU and is a function of (data, seed): it neither reads nor moves torch's global random state.
    360,000 images seen at most. A file in the cache that cannot be used is replaced, with a FewstepWarning. Raises
    DataError for data with fewer than two classes.
    """
    if dataset.num_classes < 2:
        raise DataError(
            f"'{dataset.name}' has {dataset.num_classes} classes, and a classifier needs two: measure with "
            f"InceptionExtractor and its weights, or with RandomConvExtractor"
        )
    identity, shape = _identity(dataset, seed), dataset.image_shape
    name = str(identity["name"])
    path = None if cache is None else cache / f"{name}.safetensors"
    if path is not None and path.exists():
        network = _build(shape, dataset.num_classes, seed)
        try:
            return ClassifierExtractor(name, network, shape, _load(path, network, identity))
        except DataError as error:
            warnings.warn(f"{error}; training it again", FewstepWarning, stacklevel=2)
    network = _build(shape, dataset.num_classes, seed)
    _train(network, dataset.train, seed)
    accuracy = _accuracy(network, dataset.heldout)
    if path is not None:
        _save(path, network, {**identity, "heldout_accuracy": accuracy})
    return ClassifierExtractor(name, network, shape, accuracy)


def _identity(dataset: Dataset, seed: int) -> dict[str, object]:
    """What a saved extractor must state to be this one."""
    title = re.sub(r"[^A-Za-z0-9_.]+", "-", dataset.name).strip("-.") or "data"
    return {
        "name": f"{title}-classifier-{dataset.fingerprint}-v{_RECIPE}-seed{seed}",
        "shape": list(dataset.image_shape),
        "num_classes": dataset.num_classes,
    }


def _plan(height: int, width: int) -> list[tuple[int, int]]:
    """Filters and stride of each convolution: one halving for images up to 256 pixels, else down to at most 8x8."""
    if height * width <= 256:
        return [(32, 1), (64, 2)]
    plan, size = [(32, 2), (64, 2)], math.ceil(max(height, width) / 4)
    while size > 8:
        plan.append((64, 2))
        size = math.ceil(size / 2)
    return [*plan, (64, 1)]


def _build(shape: tuple[int, int, int], num_classes: int, seed: int) -> nn.Sequential:
    """Convolutions, 64 features, a linear head; He initialisation drawn from `seed`."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    with torch.device("meta"):  # modules built in memory would draw from the global random state
        for filters, stride in _plan(height, width):
            layers += [nn.Conv2d(channels, filters, 3, stride, 1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
            channels, height, width = filters, math.ceil(height / stride), math.ceil(width / stride)
        layers += [nn.Flatten(), nn.Linear(channels * height * width, _DIMENSION), nn.GELU()]
        network = nn.Sequential(*layers, nn.Linear(_DIMENSION, num_classes))
    network = network.to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(seed)
    for module in network:
        _initialise(module, generator)
    return network


def _initialise(module: nn.Module, generator: torch.Generator) -> None:
    if isinstance(module, nn.BatchNorm2d):
        module.reset_parameters()
    elif isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.enable_grad()
def _train(network: nn.Sequential, samples: SampleSet, seed: int) -> None:
    """AdamW on cross-entropy over randomly shifted images, the rate rising over 5 % of the steps and falling to 0."""
    _, height, width = samples.shape
    batch = min(64 if height * width <= 256 else 128, len(samples))
    steps = min(max(30 * len(samples), 6_400), 360_000) // batch
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, 20 * (i + 1) / steps) * (1 - i / steps))
    network.train()
    for step in range(steps):
        indices = batch_indices(len(samples), seed, step * batch, batch)
        images, labels = _fetch(samples, indices)
        # Position in the run, not in the data: a batch that crosses epochs may hold one image twice.
        images = _shift(images, Draws(seed, step, torch.arange(batch)))
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    network.eval()


def _fetch(samples: SampleSet, indices: Tensor) -> tuple[Tensor, Tensor]:
    images, labels = samples.fetch(indices)
    if labels is None:
        raise DataError("a classifier needs labels")
    return images.cpu(), labels.cpu()


def _shift(images: Tensor, draws: Draws) -> Tensor:
    """Each image moved by -1, 0 or 1 pixels either way, its border repeated."""
    _, _, height, width = images.shape
    rows = (torch.arange(height) + draws.integers(0, 3)[:, None] - 1).clamp(0, height - 1)
    columns = (torch.arange(width) + draws.integers(1, 3)[:, None] - 1).clamp(0, width - 1)
    batch = torch.arange(len(images))[:, None, None]
    return images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _accuracy(network: nn.Sequential, samples: SampleSet) -> float:
    correct = 0
    for indices in torch.split(torch.arange(len(samples)), _BATCH):
        images, labels = _fetch(samples, indices)
        correct += int((_apply(network, images, _BATCH).argmax(1) == labels).sum())
    return correct / len(samples)


@torch.no_grad()
def _apply(network: Callable[[Tensor], Tensor], images: Tensor, batch: int) -> Tensor:
    """The network's outputs (n, ...) in batches, on the CPU."""
    device = next(network.parameters()).device if isinstance(network, nn.Module) else images.device
    images = images.float() if images.is_floating_point() else images
    return torch.cat([network(part.to(device)).cpu() for part in torch.split(images, batch)])


def _check_images(images: Tensor, shape: tuple[int, int, int] | None) -> None:
    if images.ndim != 4 or len(images) == 0 or not images.is_floating_point():
        raise ShapeError(
            f"images are {images.dtype} of shape {tuple(images.shape)}: give floats about [-1, 1], (n, C, H, W), n >= 1"
        )
    if shape is not None and tuple(images.shape[1:]) != tuple(shape):
        raise ShapeError(f"images of shape {tuple(images.shape[1:])} do not fit an extractor for {tuple(shape)}")


def _save(path: Path, network: nn.Sequential, header: dict[str, object]) -> None:
    """Tensors, with the header as JSON in the file's own metadata; the file is whole or absent, never half written."""
    content = safetensors.torch.save(network.state_dict(), {_HEADER: json.dumps(header)})
    try:
        write_atomically(path, content)
    except CheckpointError as error:
        reason = f"the trained extractor could not be saved to {path}: {error.__cause__}"
        warnings.warn(reason, FewstepWarning, stacklevel=3)


def _load(path: Path, network: nn.Sequential, identity: dict[str, object]) -> float:
    """Fill the network from a saved extractor; its held-out accuracy. Raises DataError where it cannot be this one."""
    try:
        with safe_open(path, framework="pt") as file:
            header = parse_json(file.metadata()[_HEADER])
            accuracy = float(header.pop("heldout_accuracy"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        network.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no saved extractor: {error}") from error
    if header != identity:
        raise DataError(f"{path} holds another extractor, {header}")
    return accuracy
