"""Class numbers: their names where the data brings none, and a split that keeps their shares."""

import torch
from torch import Tensor

from fewstep.data.base import Samples
from fewstep.utils.errors import DataError
from fewstep.utils.random import permutation

_MOST_CLASSES = 1 << 20
_BEFORE_TRAINING = -1


def numbered_classes(where: str, *labels: Tensor | None) -> tuple[str, ...]:
    """The classes of all parts' labels (N,) named by their numbers, "0" to the greatest; empty when none has labels.

    Raises DataError, naming `where`, for numbers that are no class numbers.
    """
    given = [part for part in labels if part is not None and len(part)]
    if not given:
        return ()
    least, greatest = min(int(part.min()) for part in given), max(int(part.max()) for part in given)
    if least < 0 or greatest >= _MOST_CLASSES:
        raise DataError(
            f"'{where}' has labels from {least} to {greatest}: number its classes 0, 1, 2 and so on, "
            f"below {_MOST_CLASSES}"
        )
    return tuple(str(number) for number in range(greatest + 1))


def split(samples: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Training and held-out samples, each in the order they had, as `held_out` says; raises DataError as it does."""
    held = held_out(len(samples), samples.labels, fraction, seed)
    rank = torch.arange(len(samples))
    return samples.select(rank[~held]), samples.select(rank[held])


def held_out(count: int, labels: Tensor | None, fraction: float, seed: int) -> Tensor:
    """Which of `count` samples are held out, (count,) bool: round(fraction * count), at least 1, at most count - 1.

    The samples are shuffled by `seed`, put in order of their labels, and held out at even steps, so that every class
    loses its share to within one sample. Raises DataError for fewer than two samples.
    """
    if count < 2:
        raise DataError(f"cannot split {count} samples: training and held-out parts need at least one each")
    size = min(max(round(fraction * count), 1), count - 1)
    order = permutation(seed, _BEFORE_TRAINING, count)
    if labels is not None:
        order = order[torch.argsort(labels[order], stable=True)]
    rank = torch.arange(count)
    held = torch.zeros(count, dtype=torch.bool)
    held[order] = (rank + 1) * size // count > rank * size // count
    return held
