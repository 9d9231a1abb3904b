"""A flow map's passes compiled by torch.compile: its network, and the network with a tangent, each as one program.

What is compiled is settled before the first step: the passes that two batches have in common, by their sizes and what
they differentiate. Any other runs as it is written, such as those of samples that guidance pushes, which are
of another number in every batch. The modules stay what they are, so that no name in a file changes.
The optimizer's step stays PyTorch's fused one, which a compiled one does not reach (`python -m benchmarks.engine
optimizer`).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import Tensor

from fewstep.flow.flow_map import AS_WRITTEN, Directions, FlowMap, Passes
from fewstep.networks.base import Network
from fewstep.networks.condition import Condition
from fewstep.training.step import TrainStep
from fewstep.utils.errors import ConfigError

BACKEND = "inductor"
_OPTION = "--runtime.compile"
_PROGRAMS = 64
"""Of one function, at most; torch's own limit is 8, for all runs of a process together."""
Signature = tuple[object, ...]


class CompiledPasses(Passes):
    """The passes that it has learnt, compiled; others as they are written. known: which those are."""

    def __init__(self) -> None:
        # With torch's own random numbers a dropout is the one of a run that is not compiled.
        options = {"fallback_random": True} if BACKEND == "inductor" else None
        compiled = partial(torch.compile, dynamic=False, fullgraph=True, backend=BACKEND, options=options)
        self._output: Callable[..., Tensor] = compiled(AS_WRITTEN.output)
        self._with_tangent: Callable[..., tuple[Tensor, Tensor]] = compiled(AS_WRITTEN.with_tangent)
        self.known: set[Signature] = set()
        self._seen: set[Signature] | None = None

    def output(self, flow_map: FlowMap, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None) -> Tensor:
        run = self._output if self._is_known("output", x, t is s) else AS_WRITTEN.output
        return run(flow_map, x, t, s, cond)

    def with_tangent(
        self,
        flow_map: FlowMap,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Condition | None,
        along: Directions,
        attached: bool,
    ) -> tuple[Tensor, Tensor]:
        known = self._is_known("tangent", x, attached, *(direction is None for direction in along))
        run = self._with_tangent if known else AS_WRITTEN.with_tangent
        return run(flow_map, x, t, s, cond, along, attached)

    def _is_known(self, kind: str, x: Tensor, *rest: object) -> bool:
        if torch._C._functorch.peek_interpreter_stack() is not None:  # a compiled program lets no transform through
            return False
        signature = (kind, len(x), x.requires_grad, torch.is_grad_enabled(), *rest)
        if self._seen is not None:
            self._seen.add(signature)
        return signature in self.known

    def learn(self, steps: list[Callable[[], None]]) -> None:
        """Compile the passes that all the steps make; each is the loss and gradient of a batch, and the first runs
        again.

        Raises what torch raises where it cannot.
        """
        found = []
        for step in steps:
            self._seen = set()
            step()
            found.append(self._seen)
        self._seen, self.known = None, set.intersection(*found)
        torch._functorch.config.donated_buffer = False  # gradients are also taken term by term, from a graph that stays
        with torch._dynamo.config.patch(optimize_ddp=False, recompile_limit=_PROGRAMS):
            steps[0]()


def compile_steps(step: TrainStep, try_step: Callable[[int], None], hidden: bool) -> None:
    """Compile what steps evaluate; try_step: the loss and gradient of the batch after so many, none of which is kept.

    Raises ConfigError, with its name, for what cannot be compiled; it is not tried again.
    """
    if not hidden:
        print("compiling the network and its derivatives: this takes a minute or more", file=sys.stderr, flush=True)
    step.passes = passes = CompiledPasses()
    device = next(step.flow_map.parameters()).device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        _refusing(f"{type(step.flow_map.network).__name__} with {type(step.objective).__name__}"),
    ):
        passes.learn([partial(try_step, 0), partial(try_step, 1)])


def check_compiling(network: torch.nn.Module, device: torch.device) -> None:
    """Raise ConfigError where a network, or this machine, compiles nothing."""
    if not (isinstance(network, Network) and network.compiles):
        anew = " without its activations" if getattr(network, "recomputes", False) else ""
        raise ConfigError(f"{_OPTION}: {type(network).__name__}{anew} cannot be compiled: leave it out")
    if device.type == "cuda" and find_spec("triton") is None:
        raise ConfigError(f"{_OPTION} needs Triton on a GPU: pip install triton, or leave it out")
    if device.type == "cpu":
        _check_compiler()


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise ConfigError(f"{_OPTION} needs a C++ compiler, such as g++: install one, or leave it out") from error


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not _of_compilers(error):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"{_OPTION}: {what} cannot be compiled ({reason[:160]}): leave it out") from error


def _of_compilers(error: Any) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))
