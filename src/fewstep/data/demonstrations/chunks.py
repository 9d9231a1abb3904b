"""Chunks of demonstrations: what was seen last, and the actions that follow."""

import hashlib
import math
import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.data.base import Context, Dataset, SampleSet
from fewstep.data.demonstrations.episodes import Demonstrations, load_demonstrations
from fewstep.data.demonstrations.normaliser import ChunkConfig, Normaliser, PolicySpec
from fewstep.utils.errors import DataError, FewstepWarning
from fewstep.utils.random import Draws

_SPLIT = 54
_RARE, _SQUEEZED = 200, 100  # of so many steps one may be far off; by so many times the range of the others


@dataclass(frozen=True, eq=False)
class ChunkSet(SampleSet):
    """One sample for every step of some episodes: the actions from there on, (horizon, Da), normalised.

    It is conditioned on the observations up to that step, (To, Do), the first one repeated where an episode has only
    begun. Beyond an episode's end the last action is repeated and not counted, nor is an action that does not vary.
    Episodes are never crossed.
    """

    demonstrations: Demonstrations
    episodes: Tensor
    spec: PolicySpec

    @cached_property
    def _steps(self) -> Tensor:
        """Where every sample is, which episode's first step lies behind it and last before it: (N, 3) int64."""
        rows = []
        for episode in self.episodes.tolist():
            start, end = int(self.demonstrations.starts[episode]), int(self.demonstrations.ends[episode])
            steps = torch.arange(start, end)
            rows.append(torch.stack([steps, torch.full_like(steps, start), torch.full_like(steps, end - 1)], 1))
        return torch.cat(rows)

    @cached_property
    def _actions(self) -> Tensor:
        return self.spec.actions.encode(self.demonstrations.actions)

    @cached_property
    def _observations(self) -> Tensor:
        return self.spec.observations.encode(self.demonstrations.observations)

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.chunks.horizon, self.demonstrations.actions.shape[1]

    def fetch(self, indices: Tensor, mirror: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if mirror is not None:
            raise DataError("chunks of actions have no mirror images")
        step, _, last = self._steps[indices.cpu()].unbind(1)
        ahead = step[:, None] + torch.arange(self.spec.chunks.horizon)
        return self._actions[torch.minimum(ahead, last[:, None])], None

    def context(self, indices: Tensor) -> Context:
        step, first, last = self._steps[indices.cpu()].unbind(1)
        count = self.spec.chunks.n_obs_steps
        behind = step[:, None] - torch.arange(count - 1, -1, -1)
        ahead = step[:, None] + torch.arange(self.spec.chunks.horizon)
        seen = self._observations[torch.maximum(behind, first[:, None])]
        counted = (ahead <= last[:, None])[:, :, None]
        return Context(seen, counted & self.spec.actions.varied if self.constant else counted)

    @property
    def length_of_first(self) -> int:
        """Steps of the first of these episodes, whose samples come first."""
        first = int(self.episodes[0])
        return int(self.demonstrations.ends[first] - self.demonstrations.starts[first])

    @property
    def constant(self) -> tuple[int, ...]:
        return tuple((~self.spec.actions.varied).nonzero()[:, 0].tolist())

    def moments(self) -> tuple[float, float]:
        values = self._actions[self._steps[:, 0]].double()
        if self.constant:
            values = values[:, self.spec.actions.varied]
        return float(values.mean()), float(values.std(correction=0))

    def update(self, digest: hashlib.blake2b) -> None:
        # By the name that it had first, so that the data of older runs are known again.
        digest.update(repr(self.spec).replace("PolicySpec(", "Control(", 1).encode())
        for values in (self._actions, self._observations, self._steps):
            digest.update(values.contiguous().numpy().data)


def load_chunks(file: str, chunks: ChunkConfig, heldout: float, seed: int) -> Dataset:
    """The demonstrations of a file as chunks; whole episodes are held out. Normalisers are fitted on the others.

    Raises DataError as `load_demonstrations` does, and for fewer than two episodes.
    """
    if not file:
        raise DataError("no demonstrations given: name a file with --data.root (record one with `fewstep demos TASK`)")
    demonstrations = load_demonstrations(file)
    if len(demonstrations) < 2:
        raise DataError(f"{file} has {len(demonstrations)} episode: at least 2 are needed, to train and to hold out")
    train, held = split_episodes(len(demonstrations), heldout, seed)
    steps = torch.cat(
        [torch.arange(int(demonstrations.starts[e]), int(demonstrations.ends[e])) for e in train.tolist()]
    )
    spec = PolicySpec(
        demonstrations.task,
        chunks,
        Normaliser.fit(demonstrations.observations[steps]),
        Normaliser.fit(demonstrations.actions[steps]),
        demonstrations.action_low,
        demonstrations.action_high,
    )
    if not bool(spec.actions.varied.any()):
        raise DataError(f"{file} has actions that vary by less than 1e-4: none would be learned, take larger units")
    _warn_of_outliers(f"{file}: action", demonstrations.actions, steps)
    _warn_of_outliers(f"{file}: observation", demonstrations.observations, steps)
    parts = [ChunkSet(demonstrations, part, spec) for part in (train, held)]
    name, split_by = demonstrations.task or "demonstrations", "train anew with --data.heldout"
    return Dataset(name, parts[0], parts[1], policy=spec, split_by=split_by)


def split_episodes(count: int, heldout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the episodes to train on and of those held out, at least one each, both rising."""
    order = torch.argsort(Draws(seed, 0, torch.arange(count)).uniform(_SPLIT), stable=True)
    held = min(max(1, math.floor(count * heldout)), count - 1)
    return order[held:].sort().values, order[:held].sort().values


def _warn_of_outliers(what: str, values: Tensor, steps: Tensor) -> None:
    """A FewstepWarning for each column of values (N, D) whose range a few steps make 100 times what the others have."""
    ranked, values = values[steps].sort(0).values, values[steps]
    edge = max(1, len(steps) // _RARE)
    low, high = ranked[min(edge, len(steps) - 1)], ranked[max(-edge - 1, -len(steps))]
    full = ranked[-1] - ranked[0]
    for number in ((high > low) & (full > _SQUEEZED * (high - low))).nonzero()[:, 0].tolist():
        far = int((values[:, number] - (low + high)[number] / 2).abs().argmax())
        warnings.warn(
            f"{what} {number} is {values[far, number]:g} at step {int(steps[far])} but mostly from {low[number]:g} to "
            f"{high[number]:g}, so that normalised all others are nearly one: drop that episode if it is an error",
            FewstepWarning,
            stacklevel=5,
        )
