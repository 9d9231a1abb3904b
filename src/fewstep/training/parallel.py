"""Several processes that train one model: how they find each other, share a batch, and part."""

import atexit
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, KwargsHandler, clear_environment
from torch import Tensor, nn

from fewstep.flow.flow_map import FlowMap
from fewstep.recipes.config import RunConfig
from fewstep.utils.errors import CheckpointError, ConfigError, FewstepWarning

LAUNCHED = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
MPI = ("OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_", "I_MPI_")
SETTINGS = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "FP8_", *MPI)
LONGEST = timedelta(hours=2)
"""That processes wait for each other, as for the one that draws and measures; a lost one is seen by `Peers`."""
_OFF = ("", "no", "false", "0", "1", "default", "auto")
_USUAL = {"RANK": ("0",), "LOCAL_RANK": ("0",), "WORLD_SIZE": ("1",)}


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

    def all_have(self, file: Path | None, device: torch.device) -> bool:
        """Whether a file is there for every process: without a disk in common some may have it and others not.

        Every process asks, also one that has no place for the file, None.
        """
        there = float(file is not None and file.is_file())
        return int(self.total(torch.tensor(there, device=device))) == self.count


class Agreement:
    """What all processes of a run decide alike: between their hosts, so that none waits for its device."""

    def __init__(self, processes: int) -> None:
        self.group = torch.distributed.new_group(backend="gloo", timeout=LONGEST) if processes > 1 else None

    def any(self, *asked: bool) -> list[bool]:
        """Of each question, whether any process says yes."""
        if self.group is None:
            return [*asked]
        answers = torch.tensor(asked, dtype=torch.float64)
        torch.distributed.all_reduce(answers, torch.distributed.ReduceOp.MAX, self.group)
        return [answer > 0 for answer in answers.tolist()]

    def first(self, value: float) -> float:
        """What the first process says."""
        if self.group is None:
            return value
        said = torch.tensor([value], dtype=torch.float64)
        torch.distributed.broadcast(said, 0, self.group)
        return float(said.tolist()[0])


class Replicated:
    """How processes hold what a run learns: each a whole copy, gradients averaged behind the backward pass (DDP).

    `Sharded` of sharding.py overrides all of it.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def wrap(self, module: nn.Module, beside: list[nn.Module]) -> nn.Module:
        """The module that steps call; beside: frozen networks that they call too."""
        with warnings.catch_warnings():  # PyTorch's new name for `broadcast_buffers` is none that Accelerate passes on
            warnings.simplefilter("ignore", FutureWarning)
            return cast(nn.Module, self.accelerator.prepare(module))

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, the frozen networks can be called."""
        return nullcontext()

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a part of the batch; processes meet at the last."""
        return nullcontext() if last else cast(AbstractContextManager[None], self.accelerator.no_sync(module))

    def whole(self, tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
        """Tensors as files hold them; keep: whether this process wants them."""
        return dict(tensors) if keep else {}

    def parts(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of tensors from a file what this process holds, as it does of those of the same names in `like`."""
        return dict(tensors)

    def clip(self, network: nn.Module, most: float) -> tuple[Tensor, Tensor | None]:
        """Clip the gradient's norm; the norm before, (), and that of each tensor that is trained, where it is at hand.

        Tensors without a gradient are left out; the others keep the network's order.
        """
        reached = [parameter for parameter in network.parameters() if parameter.grad is not None]
        if not reached:
            return torch.zeros((), device=next(network.parameters()).device), None
        norms = torch.stack(torch._foreach_norm([cast(Tensor, each.grad) for each in reached]))
        norm = torch.linalg.vector_norm(norms)
        nn.utils.clip_grads_with_norm_(reached, most, norm)
        return norm, norms

    def averaged(self, flow_map: FlowMap, weights: Mapping[str, Tensor]) -> FlowMap | None:
        """A flow map of whole weights for this process to evaluate; None where the trained one can take them."""
        return None

    def agreed(self, fault: CheckpointError | None) -> CheckpointError | None:
        """What is wrong with what any process holds."""
        return fault


def share_out(accelerator: Accelerator, config: RunConfig) -> Replicated:
    """`Sharded` over several processes; raises ConfigError for an optimizer that needs whole tensors."""
    if config.optimizer.name != "adamw":
        raise ConfigError(
            f"--runtime.shard shares tensors out, and {config.optimizer.name} needs whole ones: take --optimizer.name "
            "adamw"
        )
    if accelerator.num_processes == 1:
        return Replicated(accelerator)
    from fewstep.training.sharding import Sharded  # imports much of torch.distributed

    return Sharded(accelerator)


def join_processes(cpu: bool, handlers: Sequence[KwargsHandler] = (), **options: Any) -> Accelerator:
    """The processes that were launched together, or this one alone; they part when it ends. The rest is Accelerate's.

    Of the environment only what a launcher says of processes counts, and of devices; a FewstepWarning names the rest.
    """
    kept, ignored = _launch_variables(os.environ)
    if ignored:
        message = f"{', '.join(ignored)} in the environment: ignored, a run's own options decide"
        warnings.warn(message, FewstepWarning, stacklevel=2)
    with clear_environment():
        os.environ.update(kept)
        # Accelerate forms a group of CPU processes only when told that there is no other device.
        handlers = [*handlers, InitProcessGroupKwargs(timeout=LONGEST)]
        accelerator = Accelerator(
            cpu=cpu or not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=handlers, **options
        )
    atexit.register(leave_processes)
    return accelerator


def _launch_variables(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Variables for Accelerate to see, and those of the others, as NAME=VALUE, that would have changed something.

    A launcher sets all of LAUNCHED; without one of them the others mean nothing.
    """
    alone = not environment.keys() >= LAUNCHED
    hidden = [name for name in environment if name.startswith(SETTINGS) or (alone and name in LAUNCHED)]
    told = (name for name in hidden if not name.startswith("MASTER_"))
    said = [name for name in told if environment[name].lower() not in _USUAL.get(name, _OFF)]
    kept = {name: value for name, value in environment.items() if name not in hidden}
    return kept, [f"{name}={environment[name]}" for name in sorted(said)]


def leave_processes() -> None:
    """Close the group before the interpreter goes: its threads would abort a process that has done all its work."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def abandon_processes() -> None:
    """Give up the group, of which a process is lost, with what GPUs still wait for."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        abort = getattr(torch.distributed.distributed_c10d, "_abort_process_group", None)
        if abort is not None and torch.distributed.get_backend() == torch.distributed.Backend.NCCL:
            abort()
        leave_processes()


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
