"""Perceptual distances: zero for equal images, differentiable, and what they say they are."""

import pytest
import torch

from fewstep.data.base import Dataset, Samples
from fewstep.evaluation.metrics.features import (
    ClassifierExtractor,
    IdentityExtractor,
    RandomConvExtractor,
    train_extractor,
)
from fewstep.utils.errors import ShapeError


def bright_halves(count: int, seed: int) -> Samples:
    """Noisy images that are bright above (class 0) or below (1)."""
    labels = torch.arange(count) % 2
    images = 0.3 * torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed)) - 0.5
    images[labels == 0, :, :3] += 1.0
    images[labels == 1, :, 3:] += 1.0
    return Samples(images, labels)


@pytest.fixture(scope="module")
def tiny() -> Dataset:
    return Dataset("tiny halves", bright_halves(40, 0), bright_halves(20, 1), 2, ("above", "below"))


@pytest.fixture(scope="module")
def tiny_extractor(tiny: Dataset) -> ClassifierExtractor:
    return train_extractor(tiny)


def extractors(tiny_extractor: ClassifierExtractor) -> list[ClassifierExtractor | RandomConvExtractor]:
    return [tiny_extractor, RandomConvExtractor((1, 6, 6), seed=1)]


def test_perception_is_zero_for_equal_images_and_lets_the_gradient_through(
    tiny: Dataset, tiny_extractor: ClassifierExtractor
) -> None:
    images, _ = tiny.heldout.fetch(torch.arange(8))
    for extractor in (*extractors(tiny_extractor), IdentityExtractor((1, 6, 6))):
        moved = (images + 0.1).requires_grad_(True)
        features = extractor.perceive(images)
        assert features.shape[0] == 8
        assert not features.requires_grad
        assert torch.equal(extractor.perceive(images.clone()), features)
        distance = (extractor.perceive(moved) - features).square().mean(1)
        assert float(distance.detach().min()) > 0
        (gradient,) = torch.autograd.grad(distance.sum(), moved)
        assert bool(gradient.isfinite().all())
        assert float(gradient.flatten(1).norm(dim=1).min()) > 0
        with pytest.raises(ShapeError):
            extractor.perceive(images[..., :5])


def test_perceived_distance_is_a_mean_over_places_summed_over_stages(
    tiny: Dataset, tiny_extractor: ClassifierExtractor
) -> None:
    """Against the activations, layer by layer."""
    pair, _ = tiny.heldout.fetch(torch.arange(2))
    for extractor in extractors(tiny_extractor):
        stages = []
        x = pair
        for layer in extractor._network.children():
            x = layer(x)
            stages += [x.double()] if isinstance(layer, torch.nn.ReLU) else []
        features = extractor.perceive(pair)
        expected = 0.0
        for stage in stages:
            unit = stage / (stage.square().sum(1, keepdim=True) + 1e-4).sqrt()
            expected += float((unit[0] - unit[1]).square().sum(0).mean())
        assert len(stages) == 2
        assert float((features[0] - features[1]).square().mean()) == pytest.approx(expected, rel=1e-5)


def test_perception_is_steady_where_no_channel_answers(tiny_extractor: ClassifierExtractor) -> None:
    flat = torch.zeros(2, 1, 6, 6, requires_grad=True)
    for extractor in extractors(tiny_extractor):
        (gradient,) = torch.autograd.grad(extractor.perceive(flat).square().sum(), flat)
        assert bool(gradient.isfinite().all())


def test_perceiving_leaves_the_features_as_they_were(tiny: Dataset, tiny_extractor: ClassifierExtractor) -> None:
    images, _ = tiny.heldout.fetch(torch.arange(4))
    before = tiny_extractor.features(images)
    tiny_extractor.perceive(images)
    assert torch.equal(tiny_extractor.features(images), before)
