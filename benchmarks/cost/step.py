"""What a training step costs: iSD, by exact and finite-difference derivative, as a multiple of a flow-matching step.

Evaluations are counted in forward passes of the whole batch: a pass with tangents counts 2, a backward pass 2. `floor`
is what the objective cannot do without, by its definition, over flow matching's 3; a test holds the count against it.
Peak memory is above what the model and data need. A compiled step's ratio is to a compiled one of flow matching;
`of_written` is its time over that of the same step as it is written.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

import fewstep as fs
from benchmarks.harness import Row, markdown, take_turns, time_ratio
from fewstep.flow.derivatives import Derivative
from fewstep.flow.flow_map import AS_WRITTEN, Passes
from fewstep.flow.times import BetaTimes
from fewstep.networks.layers import carries_tangent
from fewstep.objectives import ALONE, Pairs
from fewstep.training.compiling import CompiledPasses
from fewstep.utils.random import Draws

CASES: dict[str, tuple[fs.NetworkConfig, tuple[int, ...], int]] = {
    "mlp": (fs.MLPConfig(), (1, 8, 8), 256),
    "unet": (fs.UNetConfig(width=48, multipliers=(1, 2), blocks=1, attention=(7,), patch=2), (1, 28, 28), 64),
    "dit": (fs.DiTConfig(width=192, depth=6, heads=6, patch=4), (1, 28, 28), 64),
}
"""A network, the shape of a sample, the batch."""
DIFFERENCE, GUIDED, MOST = Derivative("finite-difference"), fs.FixedGuidance(1.5), Pairs(BetaTimes(), 0.75)
Key = tuple[str, str]
COMPILED = (("flow matching", "none"), ("iSD", "exact"))
"""What is timed compiled too: of the others each compiles for minutes."""
BASE: Key = ("flow matching", "none")
OBJECTIVES: dict[Key, fs.Objective] = {
    BASE: fs.DiagonalMatching(),
    ("iSD", "exact"): fs.ISD(guidance=fs.NoGuidance()),
    ("iSD", "finite-difference"): fs.ISD(guidance=fs.NoGuidance(), derivative=DIFFERENCE),
    ("iSD-T", "exact"): fs.ISD(guidance=GUIDED),
    ("iSD-T", "finite-difference"): fs.ISD(guidance=GUIDED, derivative=DIFFERENCE),
    ("iSD-T, 3/4 diagonal", "exact"): fs.ISD(guidance=GUIDED, pairs=MOST),
}


def warm(
    config: fs.NetworkConfig, shape: tuple[int, ...], count: int, device: str = "cpu"
) -> tuple[fs.FlowMap, fs.Batch]:
    """A flow map with weights away from their zero initialisation, and a batch of ten classes."""
    torch.manual_seed(0)
    network = config.build(shape, 10, False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    draws = Draws(0, 0, torch.arange(count, device=device))
    batch = fs.Batch(draws.normal(1, shape), torch.arange(count, device=device) % 10, draws)
    return fs.FlowMap(fs.Linear(), fs.LinearPreconditioning(), network).to(device), batch


def take_step(
    objective: fs.Objective,
    flow_map: fs.FlowMap,
    batch: fs.Batch,
    own: fs.Companions = ALONE,
    passes: Passes = AS_WRITTEN,
) -> None:
    """Loss and gradient."""
    flow_map.zero_grad(set_to_none=True)
    with flow_map.using(passes):
        objective(flow_map, batch, own).mean().backward()
    if batch.x0.is_cuda:
        torch.cuda.synchronize()


def evaluations(objective: fs.Objective, flow_map: fs.FlowMap, batch: fs.Batch) -> float:
    """Cost of one step in forward passes of the whole batch."""
    total = 0.0

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal total
        total += (1 + carries_tangent(*inputs[:3]) + 2 * torch.is_grad_enabled()) * len(inputs[0])

    with flow_map.network.register_forward_pre_hook(count):
        take_step(objective, flow_map, batch)
    return total / len(batch.x0)


def floor_passes(objective: fs.Objective) -> float:
    """The operations that the objective's definition needs, in forward passes: backward is 2, a tangent 1.

    The anchor's pass gives the velocity too, and the second term's pass the value of N: neither is paid twice. A
    derivative is a tangent of that pass, or a difference of two more; guidance one for the labels that are kept.
    """
    if not isinstance(objective, fs.ISD):
        return 3.0
    null = (1 - objective.label_dropout) if objective.guidance.active else 0.0
    second = 4.0 if objective.derivative.kind == "exact" else 5.0
    return 3.0 + null + (1 - objective.pairs.flow_matching_ratio) * second


def peak_mib(name: str, key: Key, device: str) -> float:
    """Memory that a step adds at its peak: meant for a process of its own."""
    torch.set_num_threads(1)
    flow_map, batch = warm(*CASES[name], device)
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
    before = torch.cuda.memory_allocated() / 2**20 if device == "cuda" else resident("VmRSS")
    take_step(OBJECTIVES[key], flow_map, batch)
    return (torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resident("VmHWM")) - before


def resident(field: str) -> float:
    """A field of Linux's /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**10


def measured(name: str, rounds: int, device: str, compiled: bool, wanted: tuple[str, ...]) -> Iterator[Row]:
    """A row for every objective of these names on one network, once all have taken their turns.

    compiled: those of COMPILED take turns compiled too, and stand beside a compiled step of flow matching. On a CPU it
    is the processor's time that counts, which other work on the machine takes no part in.
    """
    flow_map, batch = warm(*CASES[name], device)
    jobs: dict[tuple[Key, bool], Callable[[], None]] = {}
    for key, objective in OBJECTIVES.items():
        if wanted and key[0] not in (BASE[0], *wanted):
            continue
        jobs[key, False] = partial(take_step, objective, flow_map, batch)
        if compiled and key in COMPILED:
            jobs[key, True] = partial(jobs[key, False], passes=compiled_passes(jobs[key, False]))
    spent = take_turns(jobs, rounds, time.process_time if device == "cpu" else time.perf_counter)
    for (key, own), objective in ((job, OBJECTIVES[job[0]]) for job in jobs):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            peak = None if own else round(alone.submit(peak_mib, name, key, device).result(), 1)
        yield {
            "objective": key[0], "derivative": key[1], "network": name, "compiled": own, "batch": len(batch.x0),
            **time_ratio(spent[key, own], spent[BASE, own]), "turns": rounds, "peak_mib": peak,
            "evaluations": round(evaluations(objective, flow_map, batch), 3),
            "floor": round(floor_passes(objective) / floor_passes(OBJECTIVES[BASE]), 3),
            "written_ratio": time_ratio(spent[key, False], spent[BASE, False])["ratio"],
            "of_written": time_ratio(spent[key, own], spent[key, False])["ratio"],
            "seconds": round(statistics.median(spent[key, own]), 5), "device": device,
        }  # fmt: skip


def compiled_passes(step: Callable[..., None]) -> CompiledPasses:
    """What a step needs, compiled."""
    passes = CompiledPasses()
    passes.learn([partial(step, passes=passes)] * 2)
    return passes


def step_table(rows: list[Row]) -> str:
    """Every row of what is not compiled."""
    heads = ("network", "objective", "derivative", "ratio", "quartiles", "floor", "peak MiB")
    form = "{network}|{objective}|{derivative}|{ratio:.2f}|{low:.2f} to {high:.2f}|{floor:.2f}|{peak_mib:.0f}"
    return markdown(heads, [form.format(**row).split("|") for row in rows if not row["compiled"]])


def compiled_table(rows: list[Row]) -> str:
    """Rows that were timed compiled, beside the same as they are written."""
    form = "{network}|{objective}|{written_ratio:.2f}|{ratio:.2f}|{of_written:.2f}"
    shown = [form.format(**row).split("|") for row in rows if row["compiled"]]
    return markdown(("network", "objective", "as written", "compiled", "time of the written step"), shown)
