"""Real images beside a model's samples: some held out, and the training images that samples come nearest to."""

import torch
from torch import Tensor

from fewstep.data.base import Dataset, SampleSet
from fewstep.data.draws import even_draw
from fewstep.evaluation.report.page import Grid
from fewstep.sampling.decode import Viewer

_SEARCHED = 5000  # training images, drawn over all of them
_AT_ONCE = 500


def real_grid(dataset: Dataset, view: Viewer, count: int, columns: int) -> Grid:
    """So many held-out images, drawn over all of them, or training images where none are held out."""
    part, name = (dataset.heldout, "held out") if len(dataset.heldout) else (dataset.train, "of the training")
    images, _ = part.fetch(even_draw(part, count, 0))
    return Grid(f"Real images, {name}", f"{len(images)} of {len(part):,}.", view.thumbnails(images), columns)


def nearest_grid(samples: Tensor, dataset: Dataset, view: Viewer, columns: int) -> Grid:
    """Samples (n, C, H, W), `columns` to a row, and below each row the training image nearest to each of them.

    Nearest by the root mean square difference of all values, among 5,000 training images drawn over all of them.
    """
    searched = even_draw(dataset.train, _SEARCHED, 0)
    found = nearest(samples, dataset.train, searched)
    images, _ = dataset.train.fetch(found)
    rows = zip(samples.split(columns), images.split(columns), strict=True)
    shown = torch.cat([part for pair in rows for part in pair])
    note = f"In turn a row of samples, and below each the nearest of {len(searched):,} training images."
    return Grid("Nearest training images", note, view.thumbnails(shown), columns)


def nearest(samples: Tensor, among: SampleSet, numbers: Tensor) -> Tensor:
    """For each sample a of (n, ...) the number, out of `numbers`, of that b of `among` with the least ||a - b||."""
    wanted = samples.flatten(1).float()
    least, place = torch.full((len(wanted),), torch.inf), torch.zeros(len(wanted), dtype=torch.int64)
    for part in numbers.split(_AT_ONCE):
        values, _ = among.fetch(part)
        distance, near = torch.cdist(wanted, values.flatten(1)).min(1)
        place = torch.where(distance < least, part[near], place)
        least = torch.minimum(distance, least)
    return place
