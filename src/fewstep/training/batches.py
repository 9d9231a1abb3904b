"""The batch of a step: its samples, their mirrors and the keys of their draws."""

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.data.augment import random_flips
from fewstep.data.base import SampleSet
from fewstep.data.order import batch_indices
from fewstep.networks.condition import Prompts
from fewstep.objectives import Batch
from fewstep.recipes.config import TrainingConfig
from fewstep.utils.random import Draws

STREAM_FLIP = 30


class HostPart(NamedTuple):
    """What a part of a batch is made of, before it goes to the device; as of Batch."""

    x0: Tensor
    labels: Tensor | None
    observation: Tensor | None
    loss_mask: Tensor | None
    prompts: Prompts | None


def fetch_part(train: SampleSet, settings: TrainingConfig, step: int, part: tuple[int, int]) -> HostPart:
    """Samples first .. first + count - 1 of the global batch after so many steps, mirrored; part: first and count.

    Seed, step and index decide which they are, and which of them are mirrored.
    """
    first, count = part
    own = Draws(settings.seed, step, torch.arange(first, first + count))
    mirror = random_flips(own, STREAM_FLIP) if settings.flip else None
    rows = batch_indices(len(train), settings.seed, step * settings.batch_size + first, count)
    x0, labels = train.fetch(rows, mirror)
    context = train.context(rows)
    return HostPart(x0, labels, context.observation, context.loss_mask, context.prompts)


def on_device(
    found: HostPart, settings: TrainingConfig, step: int, part: tuple[int, int], device: torch.device
) -> Batch:
    """The batch of `fetch_part`, with all that is drawn for its samples."""
    first, count = part
    places = torch.arange(first, first + count)
    labels, observation, loss_mask = (
        None if each is None else each.to(device, non_blocking=True)
        for each in (found.labels, found.observation, found.loss_mask)
    )
    prompts = None if found.prompts is None else found.prompts.to(device, non_blocking=True)
    draws = Draws(settings.seed, step, places.to(device, non_blocking=True))
    x0, images = found.x0.to(device, non_blocking=True), step * settings.batch_size
    known = None if found.labels is None else found.labels.cpu()
    return Batch(x0, labels, draws, images, observation, loss_mask, places, prompts, known)
