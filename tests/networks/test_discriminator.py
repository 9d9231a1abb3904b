"""The discriminator of the adversarial loss: any shape of sample, each scored by itself and by its class."""

import pytest
import torch

from fewstep.networks.condition import NULL_LABEL
from fewstep.networks.discriminator import DiscriminatorConfig
from fewstep.utils.errors import ConfigError

BATCH = 3


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 5, 9), (1, 1, 1)])
@pytest.mark.parametrize("num_classes", [0, 4])
def test_a_discriminator_scores_samples_of_any_shape(shape: tuple[int, ...], num_classes: int) -> None:
    torch.manual_seed(0)
    discriminator = DiscriminatorConfig(width=4).build(shape, num_classes)
    x = torch.randn(BATCH, *shape, requires_grad=True)
    scores = discriminator(x, torch.arange(BATCH) if num_classes else None)
    assert scores.shape == (BATCH,)
    scores.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.flatten(1).any(1).all())
    idle = [key for key, p in discriminator.named_parameters() if p.grad is None or not p.grad.count_nonzero()]
    assert idle == []


def test_a_discriminator_scores_each_sample_by_itself_and_by_its_class() -> None:
    torch.manual_seed(0)
    discriminator = DiscriminatorConfig(width=4).build((1, 8, 8), 4)
    x, labels = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, NULL_LABEL, 0])
    scores = discriminator(x, labels)
    alone = torch.cat([discriminator(x[i : i + 1], labels[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(alone, scores)
    changed = discriminator(x, (labels + 1) % 4)
    assert float((changed - scores).detach().abs().min()) > 0


def test_a_discriminator_keeps_a_row_for_no_class() -> None:
    torch.manual_seed(0)
    discriminator = DiscriminatorConfig(width=4).build((1, 8, 8), 4)
    x, missing = torch.randn(BATCH, 1, 8, 8), torch.full((BATCH,), NULL_LABEL)
    assert torch.equal(discriminator(x, missing), discriminator(x, None))
    assert torch.equal(missing, torch.full((BATCH,), NULL_LABEL))
    discriminator(x, missing).sum().backward()
    assert discriminator.labels is not None
    assert discriminator.labels.weight.grad is not None
    assert discriminator.labels.weight.grad.any(1).tolist() == [False] * 4 + [True]


@pytest.mark.parametrize(("width", "shape"), [(0, (1, 8, 8)), (4, (8, 8)), (4, ())])
def test_a_discriminator_refuses_what_it_cannot_read(width: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="a discriminator"):
        DiscriminatorConfig(width=width).build(shape, 0)
