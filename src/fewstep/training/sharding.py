"""A run's tensors shared out over its processes by FSDP2 (`torch.distributed.fsdp.fully_shard`).

Between steps each process keeps its part alone of the weights, their averages, the optimizer's state and a frozen
teacher. For a step the weights are gathered as one: a tangent passes through no hook of FSDP's, and processes that call
a network more or less often never wait for each other. Gradients are averaged and shared out behind the backward pass.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed import all_gather_object
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.training.parallel import Replicated
from fewstep.utils.errors import CheckpointError


class _Held(nn.Module):
    """A module whose weights are gathered and given back by hand: nothing is called through this one."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held


class Sharded(Replicated):
    """Every process keeps a part of each tensor. Its methods are called by all processes, in the same order."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self.frozen: list[FSDPModule] = []

    def _share(self, module: nn.Module) -> FSDPModule:
        return fully_shard(module, mesh=self.mesh, reshard_after_forward=False)

    def wrap(self, module: nn.Module, beside: list[nn.Module]) -> nn.Module:
        trained = {id(parameter) for parameter in module.parameters()}
        for each in beside:  # where adapters share their base with a teacher, it is gathered with what is trained
            if not any(id(parameter) in trained for parameter in each.parameters()):
                self.frozen.append(self._share(_Held(each)))
        self._share(module)
        return module

    @contextmanager
    def gathered(self) -> Iterator[None]:
        for module in self.frozen:
            module.unshard()
        try:
            yield
        finally:
            for module in self.frozen:
                module.reshard()

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        assert isinstance(module, FSDPModule)
        module.set_requires_gradient_sync(last)
        return nullcontext()

    def whole(self, tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
        found = {}
        for key, value in tensors.items():
            full = value.full_tensor().cpu() if isinstance(value, DTensor) else value
            if keep:
                found[key] = full
        return found

    def parts(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        def part(value: Tensor, own: Tensor | None) -> Tensor:
            if not isinstance(own, DTensor) or own.shape != value.shape:
                return value
            return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)

        return {key: part(value, like.get(key)) for key, value in tensors.items()}

    def clip(self, network: nn.Module, most: float) -> tuple[Tensor, Tensor | None]:
        norm = nn.utils.clip_grad_norm_(network.parameters(), most)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm, None

    def agreed(self, fault: CheckpointError | None) -> CheckpointError | None:
        found: list[str | None] = [None] * self.mesh.size()
        all_gather_object(found, None if fault is None else str(fault))
        return next((CheckpointError(words) for words in found if words is not None), None)

    def averaged(self, flow_map: FlowMap, weights: Mapping[str, Tensor]) -> FlowMap:
        shared = [value for value in flow_map.parameters() if isinstance(value, DTensor)]
        room = {id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=p.device), False) for p in shared}
        own = {key: value for key, value in flow_map.network.state_dict().items() if key not in weights}
        model = copy.deepcopy(flow_map, dict(room))
        model.network.load_state_dict(self.whole(own) | self.whole(weights))
        return model.requires_grad_(False).eval()
