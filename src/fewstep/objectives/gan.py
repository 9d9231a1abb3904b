"""The adversarial loss that CTM (2310.02279) adds to distillation: hinge losses, of a discriminator and its inputs."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import relu

DiscriminatorFunction = Callable[[Tensor, Tensor | None], Tensor]
"""Samples (B, ...) and labels (B,) or None to scores (B,): high for what looks real."""


def generator_loss(discriminator: DiscriminatorFunction, generated: Tensor, labels: Tensor | None) -> Tensor:
    """-discriminator(x), (B,): falls as the discriminator takes x for real."""
    return -discriminator(generated, labels)


def discriminator_loss(
    discriminator: DiscriminatorFunction, real: Tensor, generated: Tensor, labels: Tensor | None
) -> Tensor:
    """relu(1 - D(x0)) + relu(1 + D(x)), (B,), with D the discriminator; x without gradient (hinge loss, 1705.02894)."""
    return relu(1 - discriminator(real, labels)) + relu(1 + discriminator(generated.detach(), labels))
