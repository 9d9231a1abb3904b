"""Class numbers and their names, and a split that keeps the classes' shares."""

import re
import warnings

import torch
from torch import Tensor

from fewstep.data.base import Loaded, Samples
from fewstep.utils.errors import DataError, FewstepWarning
from fewstep.utils.random import permutation
from fewstep.utils.text import listed

_MOST_CLASSES = 1 << 20
_BEFORE_TRAINING = -1

Part = tuple[Tensor, Tensor | None]


def natural_order(name: str) -> tuple[list[str | int], str]:
    """A key that sorts names as people do: 2 before 10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def numbered(name: str, where: str, train: Part, heldout: tuple[Tensor | None, Tensor | None]) -> Loaded:
    """Both parts, images and labels (N,), with the numbers that labels have as names of classes 0, 1, ...

    No names where no part has labels. Raises DataError, naming `where`, for numbers that are no class numbers.
    """
    given = [labels.unique() for _, labels in (train, heldout) if labels is not None]
    present = torch.cat(given) if given else torch.arange(0)
    least, greatest = (int(present.min()), int(present.max())) if len(present) else (0, -1)
    if least < 0 or greatest >= _MOST_CLASSES:
        raise DataError(
            f"'{where}' has labels from {least} to {greatest}: number its classes 0, 1, 2 and so on, "
            f"below {_MOST_CLASSES}"
        )
    names = tuple(str(number) for number in range(greatest + 1))
    names, (labels, held_labels) = present_classes(where, names, [train[1], heldout[1]])
    held = None if heldout[0] is None else Samples(heldout[0], held_labels)
    return Loaded(name, Samples(train[0], labels), held, names)


def present_classes(
    where: str, names: tuple[str, ...], labels: list[Tensor | None]
) -> tuple[tuple[str, ...], list[Tensor | None]]:
    """The names of those classes that any sample has, and the parts' labels (N,) among them.

    A FewstepWarning says so where others get new numbers by it.
    """
    present = torch.cat([part.unique() for part in labels if part is not None] or [torch.arange(0)]).unique()
    if len(present) == len(names):
        return names, labels
    number = torch.full((len(names),), -1)
    number[present] = torch.arange(len(present))
    kept = tuple(names[old] for old in present.tolist())
    absent = [name for name, new in zip(names, number.tolist(), strict=True) if new < 0]
    warnings.warn(
        f"'{where}' has no sample of class {listed(absent)}: its {len(kept)} classes are "
        f"{listed([f'{name} (number {i})' for i, name in enumerate(kept)])}",
        FewstepWarning,
        stacklevel=4,
    )
    return kept, [None if part is None else number[part] for part in labels]


def split(samples: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Training and held-out samples, each in the order they had, as `held_out` says; raises DataError as it does."""
    held = held_out(len(samples), samples.labels, fraction, seed)
    return samples.select((~held).nonzero()[:, 0]), samples.select(held.nonzero()[:, 0])


def held_out(count: int, labels: Tensor | None, fraction: float, seed: int) -> Tensor:
    """Which of `count` samples are held out, (count,) bool: round(fraction * count), at least 1, at most count - 1.

    The samples are shuffled by `seed`, put in order of their labels, and held out at even steps, so that every class
    loses its share to within one sample, and its last one only where no other class can give one in its place.
    Raises DataError for fewer than two samples.
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
    if labels is not None:
        _give_back(held, labels.unique(return_inverse=True)[1])
    return held


def _give_back(held: Tensor, labels: Tensor) -> None:
    """Let every class that is held out whole train on one sample, and hold out one more of another that has two."""
    total = torch.bincount(labels)
    taken = torch.bincount(labels[held], minlength=len(total))
    for label in (taken == total).nonzero()[:, 0].tolist():
        owed = torch.where(total - taken >= 2, total * held.double().mean() - taken, -1.0)
        other = int(owed.argmax())
        if owed[other] <= 0:
            return
        held[(labels == label).nonzero()[0]] = False
        held[((labels == other) & ~held).nonzero()[0]] = True
        taken[[label, other]] += torch.tensor([-1, 1])
