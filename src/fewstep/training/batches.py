"""The batch of a step: its samples, their mirrors and the keys of their draws."""

import torch

from fewstep.data.augment import random_flips
from fewstep.data.base import SampleSet
from fewstep.data.order import batch_indices
from fewstep.objectives import Batch
from fewstep.recipes.config import TrainingConfig
from fewstep.utils.random import Draws

STREAM_FLIP = 30


def draw_batch(
    train: SampleSet, settings: TrainingConfig, step: int, part: tuple[int, int], device: torch.device
) -> Batch:
    """Samples first .. first + count - 1 of the global batch after so many steps; part: first and count.

    Seed, step and index decide which they are and all that is drawn for them.
    """
    (first, count), images = part, step * settings.batch_size
    places = torch.arange(first, first + count)
    own = Draws(settings.seed, step, places)
    mirror = random_flips(own, STREAM_FLIP) if settings.flip else None
    rows = batch_indices(len(train), settings.seed, images + first, count)
    x0, labels = train.fetch(rows, mirror)
    context = train.context(rows)
    known = None if labels is None else labels.cpu()
    labels, observation, loss_mask = (
        None if each is None else each.to(device, non_blocking=True)
        for each in (labels, context.observation, context.loss_mask)
    )
    indices, x0 = places.to(device, non_blocking=True), x0.to(device, non_blocking=True)
    prompts = None if context.prompts is None else context.prompts.to(device)
    draws = Draws(settings.seed, step, indices)
    return Batch(x0, labels, draws, images, observation, loss_mask, places, prompts, known)
