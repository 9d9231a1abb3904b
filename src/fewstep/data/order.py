"""The order of training: an endless sequence of epochs, each a fresh permutation, read at any position."""

from functools import lru_cache

import torch
from torch import Tensor

from fewstep.utils.errors import ShapeError
from fewstep.utils.random import permutation


def batch_indices(count: int, seed: int, start: int, size: int) -> Tensor:
    """The samples at global positions start..start+size-1, shape (size,) int64 in [0, count).

    Position p is item p mod count of epoch p // count, so batches of any size that follow each other read the same
    sequence, and a batch may cross epochs. Raises ShapeError unless count >= 1, start >= 0 and size >= 1.
    """
    if count < 1 or start < 0 or size < 1:
        raise ShapeError(
            f"no batch of size {size} at position {start} of {count} samples: "
            "give at least one sample, a position from 0 and a size from 1"
        )
    pieces = []
    while size > 0:
        epoch, offset = divmod(start, count)
        piece = _epoch(seed, epoch, count)[offset : offset + size]
        pieces.append(piece)
        start += len(piece)
        size -= len(piece)
    return torch.cat(pieces)


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, count: int) -> Tensor:
    """Kept for the next batches; callers get copies of its parts, so that nobody can write into it."""
    return permutation(seed, epoch, count)
