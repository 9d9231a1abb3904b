"""Several processes that train one model: how they find each other, share a batch, and part."""

import atexit
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.utils.errors import ConfigError


def _alone(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share an estimate: this one's index, their number, and the sum of a tensor over them."""

    index: int = 0
    count: int = 1
    total: Callable[[Tensor], Tensor] = _alone

    @staticmethod
    def of(accelerator: Accelerator) -> "ProcessGroup":
        """The processes that an accelerator has."""
        index, count = accelerator.process_index, accelerator.num_processes
        return ProcessGroup(index, count, lambda value: cast(Tensor, accelerator.reduce(value, "sum")))


def join_processes(cpu: bool, **options: Any) -> Accelerator:
    """The processes that were launched together, or this one alone; they part when it ends. options: Accelerate's."""
    # Accelerate forms a group of CPU processes only when told that there is no other device.
    accelerator = Accelerator(cpu=cpu or not torch.cuda.is_available(), mixed_precision="no", **options)
    atexit.register(leave_processes)
    return accelerator


def leave_processes() -> None:
    """Close the group before the interpreter goes: its threads would abort a process that has done all its work."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def split_batch(batch_size: int, processes: int, micro_batch: int) -> tuple[int, int]:
    """(share of each process, accumulation steps); raises ConfigError when the global batch does not split evenly."""
    if batch_size < processes:
        raise ConfigError(
            f"a batch of {batch_size} is smaller than the {processes} processes: raise --training.batch-size"
        )
    if batch_size % processes:
        raise ConfigError(f"a batch of {batch_size} does not split over {processes} processes: make it a multiple")
    share = batch_size // processes
    if micro_batch < 0:
        raise ConfigError(f"micro_batch is {micro_batch}; it must be at least 1, or 0 for the whole share")
    parts = 1 if micro_batch == 0 else math.ceil(share / micro_batch)
    while share % parts:
        parts += 1
    return share, parts
