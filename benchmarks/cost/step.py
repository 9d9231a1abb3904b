"""What a training step costs: iSD, by exact and finite-difference derivative, as a multiple of a flow-matching step.

Evaluations are counted in a hook, in forward passes of the whole batch: a pass with tangents counts 2, a backward
pass 2. `floor` is what the objective cannot do without, by its definition, over flow matching's 3; a test holds the
count against it. It is a floor of operations, not of time, so the passes by themselves take turns too: `priced` is the
same count at the seconds found there. What a step takes beyond it goes outside the network, or is what parts of a
batch cost more. Peak memory is that of a process of its own per row, above what the model and data need.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.cost.setting import take_step, warm
from benchmarks.harness import ROOT, Row, markdown, take_turns, time_ratio
from fewstep import (
    ISD,
    Batch,
    Condition,
    DiagonalMatching,
    DiTConfig,
    FixedGuidance,
    FlowMap,
    MLPConfig,
    NetworkConfig,
    NoGuidance,
    Objective,
    UNetConfig,
)  # fmt: skip
from fewstep.flow.derivatives import Derivative, exact_derivative
from fewstep.flow.times import BetaTimes
from fewstep.networks.layers import carries_tangent
from fewstep.objectives import Pairs

UNET = UNetConfig(width=48, multipliers=(1, 2), blocks=1, attention=(7,), patch=2)
CASES: dict[str, tuple[NetworkConfig, tuple[int, ...], int]] = {
    "mlp": (MLPConfig(), (1, 8, 8), 256),
    "unet": (UNET, (1, 28, 28), 64),
    "dit": (DiTConfig(width=192, depth=6, heads=6, patch=4), (1, 28, 28), 64),
}
"""A network, the shape of a sample, the batch."""
DIFFERENCE, GUIDED, MOST = Derivative("finite-difference"), FixedGuidance(1.5), Pairs(BetaTimes(), 0.75)
BASE = ("flow matching", "none")
OBJECTIVES: dict[tuple[str, str], Objective] = {
    BASE: DiagonalMatching(),
    ("iSD", "exact"): ISD(guidance=NoGuidance()),
    ("iSD", "finite-difference"): ISD(guidance=NoGuidance(), derivative=DIFFERENCE),
    ("iSD-T", "exact"): ISD(guidance=GUIDED),
    ("iSD-T", "finite-difference"): ISD(guidance=GUIDED, derivative=DIFFERENCE),
    ("iSD-T, 3/4 diagonal", "exact"): ISD(guidance=GUIDED, pairs=MOST),
}


def evaluations(objective: Objective, flow_map: FlowMap, batch: Batch) -> float:
    """Cost of one step in forward passes of the whole batch."""
    total = 0.0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal total
        passes = 1 + carries_tangent(*inputs[:3]) + 2 * torch.is_grad_enabled()
        total += passes * len(inputs[0])

    handle = flow_map.network.register_forward_pre_hook(count)
    take_step(objective, flow_map, batch)
    handle.remove()
    return total / len(batch.x0)


@dataclass(frozen=True)
class Prices:
    """What one pass of the whole batch costs: without gradient; with it and back; the same carrying tangents."""

    forward: float
    train: float
    tangent: float

    def of(self, objective: Objective) -> float:
        """What the passes cost that the objective's definition needs.

        The anchor's pass gives the velocity too, and the second term's pass the value of N: neither is paid twice. A
        derivative is a tangent of that pass, or a difference of two more; guidance one for the labels that are kept.
        """
        if not isinstance(objective, ISD):
            return self.train
        null = (1 - objective.label_dropout) if objective.guidance.active else 0.0
        second = self.tangent if objective.derivative.kind == "exact" else self.train + 2 * self.forward
        return self.train + null * self.forward + (1 - objective.pairs.flow_matching_ratio) * second


def floor_passes(objective: Objective) -> float:
    """The operations that the objective's definition needs, in forward passes: backward is 2, a tangent 1."""
    return Prices(forward=1.0, train=3.0, tangent=4.0).of(objective)


def passes(flow_map: FlowMap, batch: Batch) -> dict[str, Callable[[], None]]:
    """The network's passes by themselves, at times as an objective draws them; as in `Prices`."""
    t = batch.draws.uniform(1)
    s, cond, v = t * batch.draws.uniform(2), Condition(batch.labels), batch.noise()

    def output(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return flow_map.output(x, t, s, cond)

    def back(output: torch.Tensor) -> None:
        flow_map.zero_grad(set_to_none=True)
        output.square().mean().backward()

    def forward() -> None:
        with torch.no_grad():
            output(batch.x0, t)

    def train() -> None:
        back(output(batch.x0, t))

    def tangent() -> None:
        back(exact_derivative(output, batch.x0, t, v)[0])

    return {"forward": forward, "train": train, "tangent": tangent}


def seconds(flow_map: FlowMap, batch: Batch, rounds: int) -> tuple[dict[tuple[str, str], list[float]], Prices]:
    """Of a step of every objective in every turn, and the passes' medians."""

    def finished(job: Callable[[], None]) -> None:
        job()
        if batch.x0.is_cuda:
            torch.cuda.synchronize()

    single = passes(flow_map, batch)
    work: dict[tuple[str, str], Callable[[], None]] = {("pass", name): job for name, job in single.items()}
    work |= {key: partial(take_step, objective, flow_map, batch) for key, objective in OBJECTIVES.items()}
    spent = take_turns({key: partial(finished, job) for key, job in work.items()}, rounds)
    return spent, Prices(**{name: statistics.median(spent.pop(("pass", name))) for name in single})


def peak_mib(name: str, key: tuple[str, str], device: str) -> float:
    """Memory that a step adds at its peak, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cost", "peak", name, *key, device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


def print_peak(name: str, key: tuple[str, str], device: str) -> None:
    """Body of the process that `peak_mib` starts."""
    torch.set_num_threads(1)
    flow_map, batch = warm(*CASES[name], device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        take_step(OBJECTIVES[key], flow_map, batch)
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
    before = resident("VmRSS")
    take_step(OBJECTIVES[key], flow_map, batch)
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """A field of Linux's /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**10


def measured(name: str, rounds: int, threads: int, device: str) -> list[Row]:
    """A row for every objective on one network."""
    flow_map, batch = warm(*CASES[name], device)
    spent, prices = seconds(flow_map, batch, rounds)
    return [
        {
            "objective": key[0], "derivative": key[1], "network": name, "batch": len(batch.x0),
            **time_ratio(spent[key], spent[BASE]), "turns": rounds, "peak_mib": round(peak_mib(name, key, device), 1),
            "evaluations": round(evaluations(objective, flow_map, batch), 3),
            "floor": round(floor_passes(objective) / floor_passes(OBJECTIVES[BASE]), 3),
            "priced": round(prices.of(objective) / statistics.median(spent[BASE]), 3),
            "seconds": round(statistics.median(spent[key]), 5), "forward_seconds": round(prices.forward, 5),
            "train_seconds": round(prices.train, 5), "tangent_seconds": round(prices.tangent, 5),
            "device": device, "threads": threads,
        }
        for key, objective in OBJECTIVES.items()
    ]  # fmt: skip


def step_table(rows: list[Row]) -> str:
    """Every row."""
    heads = ("network", "objective", "derivative", "ratio", "quartiles", "floor", "priced", "of it", "peak MiB")
    form = (
        "{network}|{objective}|{derivative}|{ratio:.2f}|{low:.2f} to {high:.2f}|{floor:.2f}|{priced:.2f}|{part:.0%}|"
        "{peak_mib:.0f}"
    )
    return markdown(heads, [form.format(**row, part=row["priced"] / row["ratio"]).split("|") for row in rows])


def derivative_table(rows: list[Row]) -> str:
    """Exact derivative beside finite difference: steps of flow matching, and the most memory held."""
    found = {(row["network"], row["objective"], row["derivative"]): row for row in rows}
    kinds = ("exact", "finite-difference")
    pairs = [key[:2] for key in found if key[2] == kinds[0] and (*key[:2], kinds[1]) in found]
    columns = [(kind, key, form) for key, form in (("ratio", ".2f"), ("peak_mib", ".0f")) for kind in kinds]
    heads = ("network", "objective", "exact: steps", "finite difference: steps", "exact: MiB", "finite difference: MiB")
    shown = [(*pair, *(format(found[(*pair, kind)][key], form) for kind, key, form in columns)) for pair in pairs]
    return markdown(heads, shown)
