"""Batches one after another, made between steps or ahead of them by processes of their own, to the same bits."""

import atexit
import ctypes
import itertools
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import BaseContext
from typing import ClassVar

import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from fewstep.data.base import SampleSet
from fewstep.objectives import Batch
from fewstep.recipes.config import TrainingConfig
from fewstep.training.batches import HostPart, fetch_part, on_device
from fewstep.utils.errors import DataError, FewstepError

AHEAD = 2
"""Parts of batches that each process has ready."""
_LOOK_SECONDS = 0.25


@dataclass(frozen=True)
class Shares(TorchDataset[HostPart | Exception]):
    """A process's share of every batch, in `parts` of `micro` samples from `first` on, numbered through the run."""

    train: SampleSet
    settings: TrainingConfig
    first: int
    micro: int
    parts: int

    def place(self, number: int) -> tuple[int, tuple[int, int]]:
        """(step, (first sample of the global batch, how many)) of a part."""
        step, part = divmod(number, self.parts)
        return step, (self.first + part * self.micro, self.micro)

    def __getitem__(self, number: int) -> HostPart | Exception:
        """What is wrong with it is handed over as it is, for the training to raise."""
        try:
            return fetch_part(self.train, self.settings, *self.place(number))
        except Exception as error:
            return error if isinstance(error, FewstepError) or get_worker_info() is None else _portable(error)


def _portable(error: Exception) -> Exception:
    """An error as it can be handed to another process: Python's own ones, with the traceback as a note; of others what
    they say."""
    plain = type(error).__module__ == "builtins" and all(isinstance(each, str | int) for each in error.args)
    if not plain:
        return DataError(f"the data cannot be read: {' '.join(f'{type(error).__name__}: {error}'.split())}")
    error.add_note("".join(traceback.format_exception(error)))
    return error


class Loader:
    """The parts in order, from any one on.

    workers: processes that fetch, decode and mirror ahead; none does it when a part is asked for. waited: seconds
    that the training has spent so since it was last asked for its share.
    """

    def __init__(self, shares: Shares, device: torch.device, workers: int = 0, context: str | None = None) -> None:
        self.shares, self.device, self.workers, self.context = shares, device, workers, context
        self.waited = 0.0
        self._coming: Iterator[HostPart | Exception] | None = None
        self._number = -1

    def batch(self, step: int, part: int) -> Batch:
        """A part of a step's batch, on the device; raises what its data raise, DataError where a process was killed."""
        number, start = step * self.shares.parts + part, time.perf_counter()
        found = self._next(number) if self.workers else self.shares[number]
        self.waited += time.perf_counter() - start
        if isinstance(found, Exception):
            self.close()
            raise found
        return on_device(found, self.shares.settings, *self.shares.place(number), self.device)

    def wait_of(self, seconds: float) -> float:
        """The share of so many seconds that was spent in wait for data, and counts anew."""
        waited, self.waited = self.waited, 0.0
        return min(waited / seconds, 1.0)

    def _next(self, number: int) -> HostPart | Exception:
        if self._coming is None or number != self._number:
            self.close()
            self._coming = self._from(number)
        self._number = number + 1
        try:
            return next(self._coming)
        except (RuntimeError, EOFError, OSError) as error:  # when it misses one, or one ends while it hands over
            self.close()
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"a process that reads the data has ended ({reason}): it may have run out of memory; take fewer "
                "--runtime.workers"
            ) from error

    def _from(self, number: int) -> Iterator[HostPart | Exception]:
        pinned = self.device.type == "cuda"
        own_child = (self.context or multiprocessing.get_start_method()) != "forkserver"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of more processes than cores, which may be meant
            loader = DataLoader(
                self.shares,
                batch_size=None,
                sampler=itertools.count(number),
                num_workers=self.workers,
                pin_memory=pinned,
                prefetch_factor=AHEAD,
                multiprocessing_context=_without_locks(self.context),
                worker_init_fn=partial(serve, own_child=own_child),
                generator=torch.Generator(),  # the run's own numbers are not touched
            )
            return iter(loader)

    def close(self) -> None:
        """End the processes."""
        self._coming, self._number = None, -1


class Flag:
    """What says to processes that they are to end, in place of multiprocessing's Event.

    An event's lock is waited for for ever where the process that held it was killed.
    """

    seen: ClassVar[bool] = False
    """Whether this process has seen it said."""

    def __init__(self, context: BaseContext) -> None:
        self._set = context.RawValue(ctypes.c_bool, False)

    def set(self) -> None:
        """Say so."""
        self._set.value = True

    def is_set(self) -> bool:
        """Whether it was said."""
        said = bool(self._set.value)
        Flag.seen |= said
        return said


def _without_locks(name: str | None) -> BaseContext:
    """A way of starting processes, the default one for None, whose events are flags."""
    kind = type(multiprocessing.get_context(name))
    found: BaseContext = type(kind.__name__, (kind,), {"Event": lambda context: Flag(context)})()
    return found


def serve(worker: int, own_child: bool = True) -> None:
    """A process that reads data leaves signals to the training, and ends with it, however that ends.

    Told to end it does at once: Python's own end aborts one whose other thread is handing a batch over in torch's code.
    own_child: of the training itself, not of a server that forks for it.
    """
    Flag.seen = False  # what a training saw before it forked
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    training = multiprocessing.parent_process()
    if training is not None:
        atexit.register(_leave)
    parent = os.getppid() if training is None or not own_child else training.pid
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _leave() -> None:
    if Flag.seen:
        os._exit(0)


def _end_with(parent: int | None) -> None:
    """A killed training cannot end its processes, and one that waits to hand a batch over would wait for ever."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)
