"""Peak memory of one attention, forward and backward, against the one written out."""

import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import benchmarks.harness as h
from fewstep.networks.attention import attention
from fewstep.utils.forward_ad import jvp

HEADS, WIDTH = 6, 64
KINDS = {
    "no tangent": "PyTorch's fused form",
    "tangent": "a tangent without a graph",
    "recorded tangent": "a tangent with its graph",
}
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, its scores whole."""
    return ((q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)).softmax(-1) @ v


def step(form: Form, kind: str, length: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Forward, with a tangent or not, and backward."""
    shape = 1, HEADS, length, WIDTH
    inputs = tuple(torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    if kind == "no tangent":
        form(*inputs).sum().backward()
        return
    directions = tuple(torch.randn_like(x) for x in inputs)
    attached = kind == "recorded tangent"
    found, moved = jvp(form, inputs, directions, attached)
    (found.sum() + moved.square().sum() if attached else found.sum()).backward()


def peak(form: str, kind: str, length: int) -> float:
    """MiB above what a process holds before, in one of its own."""
    command = [sys.executable, "-m", "benchmarks.engine.attention", form, kind, str(length)]
    own = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # what is freed goes back at once
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=h.ROOT, env=own).stdout)


def rows(length: int) -> Iterator[h.Row]:
    """A row for each kind of pass."""
    for kind, name in KINDS.items():
        own, usual = peak("own", kind, length), peak("written-out", kind, length)
        setting = f"{length} tokens, {name}"
        yield {
            "measure": "attention, peak memory", "setting": setting, "value": round(own, 1), "unit": "MiB",
            "beside": f"{usual:,.0f} MiB written out",
        }  # fmt: skip


def main(form: str, kind: str, length: str) -> None:
    """Print the MiB that one pass adds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    chosen = {"own": attention, "written-out": written_out}[form]
    step(chosen, kind, 64)  # what PyTorch loads at first use
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(chosen, kind, int(length))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
