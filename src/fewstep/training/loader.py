"""Batches on the training device: which samples a step takes is decided by the seed, the step and their index."""

import torch

from fewstep.data.augment import random_flips
from fewstep.data.base import Dataset
from fewstep.data.order import batch_indices
from fewstep.objectives import Batch
from fewstep.recipes.config import TrainingConfig
from fewstep.utils.random import Draws

STREAM_FLIP = 30


def fetch_batch(
    dataset: Dataset, settings: TrainingConfig, step: int, first: int, count: int, device: torch.device
) -> Batch:
    """Samples first .. first + count - 1 of the global batch of step 0, 1, ..."""
    position = step * settings.batch_size + first
    places = torch.arange(first, first + count)
    draws = Draws(settings.seed, step, places.to(device))
    mirror = random_flips(draws, STREAM_FLIP) if settings.flip else None
    rows = batch_indices(len(dataset.train), settings.seed, position, count)
    x0, labels = dataset.train.fetch(rows, mirror)
    context = dataset.train.context(rows)
    labels, observation, loss_mask = (
        None if each is None else each.to(device) for each in (labels, context.observation, context.loss_mask)
    )
    return Batch(x0.to(device), labels, draws, step * settings.batch_size, observation, loss_mask, places)
