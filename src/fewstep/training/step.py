"""One step's forward pass, and what the passes of a step add up to."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fewstep.flow.flow_map import AS_WRITTEN, FlowMap, Passes
from fewstep.objectives import ALONE, Batch, Companions, FakeSamples, Objective


class TrainStep(nn.Module):
    """An objective's mean loss as a module's forward, so that DDP sees one forward for one backward.

    passes: how it evaluates the flow map's network, which others evaluate as it is written.
    """

    def __init__(self, flow_map: FlowMap, objective: Objective, bf16: bool = False) -> None:
        super().__init__()
        self.flow_map, self.objective, self.bf16 = flow_map, objective, bf16
        self.passes: Passes = AS_WRITTEN

    def forward(
        self, batch: Batch, companions: Companions = ALONE
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor], FakeSamples | None]:
        """(mean loss, its terms, times (2, B), per-sample logs, generated samples)."""
        # No cache: a weight cast for a target without gradient must not serve the pass that needs one.
        autocast = torch.autocast(batch.x0.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)
        with autocast, self.flow_map.using(self.passes):
            losses = self.objective(self.flow_map, batch, companions)
        terms = {name: term.mean() for name, term in losses.terms.items()}
        return losses.mean(), terms, torch.stack([losses.t, losses.s]).detach(), losses.logs, losses.generated


def seed_layers(seed: int, device: torch.device) -> None:
    """Seed what layers draw by themselves, on the host and on the device.

    torch.manual_seed formats a stack for every kind of device that is not in use: a millisecond of a small step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@dataclass
class Gradients:
    """What the parts of a step's batch add up to, beside the gradients that lie with the parameters.

    loss (): the mean of this process's share. times: (2, B) of each part. discriminator: its own gradients, none where
    it does not learn.
    """

    loss: Tensor
    times: list[Tensor] = field(default_factory=list)
    discriminator: list[Tensor] = field(default_factory=list)
