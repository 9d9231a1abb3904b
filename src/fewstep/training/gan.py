"""The discriminator's side of an adversarial loss: its network, its optimiser, its state in checkpoints."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.objectives.losses import discriminator_loss
from fewstep.recipes.config import GANConfig
from fewstep.training.optimizers import State, load_state
from fewstep.utils.errors import CheckpointError
from fewstep.utils.weights import fit_weights

_PREFIX = "discriminator."
_NAME = re.compile(r"optimizer\.(?P<parameter>[0-9]{1,9})\.(?P<key>\w+)")


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
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            self.discriminator = config.discriminator.build(shape, num_classes).to(device)
        parameters = self.discriminator.parameters()
        self.optimizer = torch.optim.AdamW(parameters, config.lr, betas=(0.5, 0.99), weight_decay=0.0)

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
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Weights and optimiser state, flat."""
        state = self.optimizer.state_dict()["state"]
        moments = {f"optimizer.{i}.{key}": torch.as_tensor(v) for i, each in state.items() for key, v in each.items()}
        return {_PREFIX + key: value for key, value in self.discriminator.state_dict().items()} | moments

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Take over what `tensors` gave; raises CheckpointError when it belongs to another discriminator."""
        weights = {key.removeprefix(_PREFIX): value for key, value in tensors.items() if key.startswith(_PREFIX)}
        fit_weights(self.discriminator, weights, source)
        state: dict[int, State] = {}
        for name in tensors.keys() - {_PREFIX + key for key in weights}:
            match = _NAME.fullmatch(name)
            if match is None:
                raise CheckpointError(f"{source} is no discriminator's state: it holds {name!r}")
            state.setdefault(int(match["parameter"]), {})[match["key"]] = tensors[name]
        if state:  # none before its first update
            load_state(self.optimizer, state, source)
