"""The adversarial loss that CTM (2310.02279) adds to distillation: hinge losses of a critic and of what it judges."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import relu

CriticFunction = Callable[[Tensor, Tensor | None], Tensor]
"""Samples (B, ...) and labels (B,) or None to scores (B,): high for what looks real."""


def generator_loss(critic: CriticFunction, generated: Tensor, labels: Tensor | None) -> Tensor:
    """-critic(x), (B,): falls as the critic takes x for real."""
    return -critic(generated, labels)


def critic_loss(critic: CriticFunction, real: Tensor, generated: Tensor, labels: Tensor | None) -> Tensor:
    """relu(1 - critic(x0)) + relu(1 + critic(x)), (B,); x is taken without gradient (hinge loss, 1705.02894)."""
    return relu(1 - critic(real, labels)) + relu(1 + critic(generated.detach(), labels))
