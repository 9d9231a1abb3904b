"""What stands for a set of samples: some of them drawn over all of it, classes in the shares that they have there."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.data.base import SampleSet
from fewstep.networks.condition import Prompts
from fewstep.utils.random import permutation

_CLASSES, _SAMPLES = -2, -3  # epochs of their own: those from 0 on order the training data


def even_draw(samples: SampleSet, count: int, seed: int, like: Tensor | None = None) -> Tensor:
    """Numbers of `count` of the samples, rising, or of all where there are no more; int64.

    The samples are shuffled by `seed`, put in order of their labels, and taken at even steps, so that every class keeps
    its share to within one sample, however the set is sorted.

    like: labels (N,) whose shares the drawn ones are to have in place of the set's own, as far as classes are in both;
    there are then no more than the rarest class allows. Where no class is in both they are left out of account.
    """
    order = permutation(seed, _SAMPLES, len(samples))
    if samples.labels is not None:
        order = order[torch.argsort(samples.labels.cpu()[order], stable=True)]
        order = order if like is None else order[_in_shares(samples.labels.cpu()[order], like.cpu())]
    size = len(order)
    taken = min(count, size)
    rising: Tensor = order[torch.arange(taken) * size // taken].sort().values
    return rising


def _in_shares(ordered: Tensor, like: Tensor) -> Tensor:
    """Which of rising labels (n,) to keep, bool, so that the most are left in the shares of `like`."""
    number = int(torch.cat([ordered, like]).max()) + 1
    found, wanted = torch.bincount(ordered, minlength=number), torch.bincount(like, minlength=number)
    both = (found > 0) & (wanted > 0)
    if not both.any():
        return torch.ones_like(ordered, dtype=torch.bool)
    rarest = (found[both].double() / wanted[both]).argmin()
    kept = torch.where(both, (wanted * found[both][rarest] // wanted[both][rarest]).clamp(min=1), 0)
    place = torch.arange(len(ordered)) - (found.cumsum(0) - found)[ordered]  # of each among those of its class
    return place < kept[ordered]


@dataclass(frozen=True)
class DrawnPrompts:
    """The prompts of samples with these numbers, (n,) int64, read as they are needed."""

    samples: SampleSet
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Prompts:
        found = self.samples.context(self.rows[index]).prompts
        assert found is not None  # they are of samples that have them
        return found


def classes_like(labels: Tensor, count: int, seed: int) -> Tensor:
    """Classes (count,) int64 in the shares that they have among `labels` (N,), every prefix to about two samples.

    Sample k is of class k mod C, unless that class has had half a sample more than its share or another one lacks one
    and a half; so it is for every k where classes are of one size, to within one label. Fewer samples than classes
    begin anywhere among them: their order is then drawn from `seed`. A class that no label names gets no sample.
    """
    found: tuple[Tensor, Tensor] = labels.cpu().unique(return_counts=True)
    classes, sizes = found
    number = len(classes)
    if count < number:
        order = permutation(seed, _CLASSES, number)
        classes, sizes = classes[order], sizes[order]
    if int(sizes.max() - sizes.min()) <= 1:
        return classes[torch.arange(count) % number]
    shares, given = (sizes.double() / len(labels)).numpy(), np.zeros(number)
    places = torch.empty(count, dtype=torch.int64)
    for k in range(count):
        due = shares * (k + 1) - given
        place, lacking = k % number, int(due.argmax())
        if due[place] < -0.5 or due[lacking] >= 1.5:
            place = lacking
        given[place] += 1
        places[k] = place
    return classes[places]
