"""The discriminator's side of an adversarial loss: its network, its optimiser, its state in checkpoints."""

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.objectives.losses import discriminator_loss
from fewstep.recipes.config import GANConfig
from fewstep.training.optimizers import FlatOptimizer
from fewstep.utils.random import seeded
from fewstep.utils.weights import check_finite, check_shapes, shapes

WEIGHTS, _STATE = "discriminator.", "optimizer."


class GAN:
    """A discriminator trained beside the flow map, one update a step, on the samples that the objective generated.

    average: the mean of a tensor over processes; gradients go through it, so several processes train one discriminator.
    """

    def __init__(
        self,
        config: GANConfig,
        shape: tuple[int, ...],
        num_classes: int,
        seed: int,
        device: torch.device,
        average: Callable[[Tensor], Tensor],
    ) -> None:
        self.config, self.average = config, average
        with seeded(seed + 1):
            self.discriminator = config.discriminator.build(shape, num_classes).to(device)
        parameters = self.discriminator.parameters()
        adamw = torch.optim.AdamW(parameters, config.lr, betas=(0.5, 0.99), weight_decay=0.0)
        self.optimizer = FlatOptimizer(adamw, config.lr)

    def score(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """The discriminator's scores (B,), for the flow map's loss."""
        scores: Tensor = self.discriminator(x, labels)
        return scores

    def learn(self, gradients: list[Tensor], real: Tensor, generated: Tensor, labels: Tensor | None) -> Tensor:
        """Add the gradients of the discriminator's loss on a part of the batch to `gradients`; returns the loss (B,).

        labels: what the generated samples were asked for (FakeSamples.labels); the real ones are judged under the same.
        They are kept apart from the parameters', where the flow map's own backward pass leaves what is not wanted.
        """
        loss = discriminator_loss(self.score, real, generated, labels)
        found = torch.autograd.grad(loss.mean(), list(self.discriminator.parameters()))
        gradients[:] = [a + b for a, b in zip(gradients, found, strict=True)] if gradients else list(found)
        return loss.detach()

    def averaged(self, gradients: list[Tensor], parts: int) -> list[Tensor]:
        """The batch's gradients from those that each process summed over `parts` equal parts of its share."""
        return [self.average(gradient / parts) for gradient in gradients]

    def step(self, gradients: list[Tensor]) -> None:
        """One update from the batch's gradients."""
        for parameter, gradient in zip(self.discriminator.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.optimizer.step()
        self.optimizer.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Weights and optimiser state, flat."""
        weights = {WEIGHTS + key: value for key, value in self.discriminator.state_dict().items()}
        return weights | {_STATE + key: value for key, value in self.optimizer.tensors().items()}

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Take over what `tensors` gave; raises CheckpointError when it belongs to another discriminator."""
        own = {WEIGHTS + key: tuple(value.shape) for key, value in self.discriminator.state_dict().items()}
        stepped = any(key.startswith(_STATE) for key in tensors)  # it has no state before its first update
        own |= {_STATE + key: shape for key, shape in self.optimizer.shapes().items() if stepped}
        check_shapes(own, shapes(tensors), source)
        check_finite(tensors, source)
        weights = {key: tensors[WEIGHTS + key] for key in self.discriminator.state_dict()}
        self.discriminator.load_state_dict(weights)
        if stepped:
            self.optimizer.load({key: tensors[_STATE + key] for key in self.optimizer.shapes()})
