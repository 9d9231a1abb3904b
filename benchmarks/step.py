"""What a training step costs: iSD, by exact and finite-difference derivative, as a multiple of a flow-matching step.

    python benchmarks/step.py [--repeats 30] [--threads 1] [--out benchmarks/results/step.json]

All objectives take turns in one process on the same network and batch, so that a noisy machine slows all alike. A turn
gives each objective's step as a multiple of that turn's flow-matching step; the ratio is the median of turns, `low` and
`high` are their quartiles. Peak memory is that of a process of its own per row, above what the model and data need.

Evaluations are counted in a hook, in forward passes of the whole batch: a pass with tangents counts 2, a backward
pass 2. `floor` is what the objective cannot do without, by its definition (`floor_passes`), over flow matching's 3; a
test holds the count against it, so that a redundant evaluation fails. It is a floor of operations, not of time: a pass
without gradient can cost less than a third of one with it, and a pass that carries tangents more than one and a third.
So the passes by themselves take turns too, and `priced` is the same count at the seconds found there, a part of the
batch in proportion: what a step takes beyond it goes outside the network, or is what parts of a batch cost more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from fewstep import ISD, Batch, DiagonalMatching, DiTConfig, FixedGuidance, FlowMap, MLPConfig, NoGuidance, UNetConfig
from fewstep.flow.derivatives import exact_derivative
from fewstep.flow.paths import Linear
from fewstep.flow.preconditioning import LinearPreconditioning
from fewstep.networks.condition import Condition
from fewstep.networks.layers import carries_tangent
from fewstep.objectives import Objective
from fewstep.utils.random import Draws


@dataclass(frozen=True)
class Case:
    """A network on one shape and batch."""

    config: MLPConfig | UNetConfig | DiTConfig
    shape: tuple[int, ...]
    batch: int


CASES = {
    "mlp": Case(MLPConfig(), (1, 8, 8), 256),
    "unet": Case(UNetConfig(width=48, multipliers=(1, 2), blocks=1, attention=(7,), patch=2), (1, 28, 28), 64),
    "dit": Case(DiTConfig(width=192, depth=6, heads=6, patch=4), (1, 28, 28), 64),
}
OBJECTIVES: dict[tuple[str, str], Objective] = {
    ("flow matching", "none"): DiagonalMatching(),
    ("iSD", "exact"): ISD(guidance=NoGuidance()),
    ("iSD", "finite-difference"): ISD(guidance=NoGuidance(), derivative="finite-difference"),
    ("iSD-T", "exact"): ISD(guidance=FixedGuidance(1.5)),
    ("iSD-T", "finite-difference"): ISD(guidance=FixedGuidance(1.5), derivative="finite-difference"),
    ("iSD-T, 3/4 diagonal", "exact"): ISD(guidance=FixedGuidance(1.5), diagonal=0.75),
}


def setting(name: str, device: str) -> tuple[FlowMap, Batch]:
    """A flow map with weights away from their zero initialisation, and a batch."""
    case = CASES[name]
    torch.manual_seed(0)
    network = case.config.build(case.shape, 10, False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    draws = Draws(0, 0, torch.arange(case.batch, device=device))
    labels = torch.arange(case.batch, device=device) % 10
    x0 = draws.normal(1, case.shape)
    return FlowMap(Linear(), LinearPreconditioning(), network).to(device), Batch(x0, labels, draws)


def take_step(objective: Objective, flow_map: FlowMap, batch: Batch) -> None:
    """Loss and gradient."""
    flow_map.zero_grad(set_to_none=True)
    objective(flow_map, batch).mean().backward()


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
        null = (1 - objective.dropout) if objective.guidance.active else 0.0
        second = self.tangent if objective.derivative == "exact" else self.train + 2 * self.forward
        return self.train + null * self.forward + (1 - objective.diagonal) * second


OPERATIONS = Prices(forward=1.0, train=3.0, tangent=4.0)
"""In forward passes: backward is 2, a tangent 1."""


def floor_passes(objective: Objective) -> float:
    """The operations that the objective's definition needs, in forward passes of the whole batch."""
    return OPERATIONS.of(objective)


def passes(flow_map: FlowMap, batch: Batch) -> dict[str, Callable[[], None]]:
    """The network's passes by themselves, at times as an objective draws them; as in `Prices`."""
    t = batch.draws.uniform(1)
    s, cond, v = t * batch.draws.uniform(2), Condition(batch.labels), batch.noise()

    def forward() -> None:
        with torch.no_grad():
            flow_map.output(batch.x0, t, s, cond)

    def back(output: torch.Tensor) -> None:
        flow_map.zero_grad(set_to_none=True)
        output.square().mean().backward()

    def train() -> None:
        back(flow_map.output(batch.x0, t, s, cond))

    def tangent() -> None:
        back(exact_derivative(lambda x, t: flow_map.output(x, t, s, cond), batch.x0, t, v)[0])

    return {"forward": forward, "train": train, "tangent": tangent}


def turns(flow_map: FlowMap, batch: Batch, repeats: int) -> tuple[dict[tuple[str, str], list[float]], Prices]:
    """Seconds of a step of every objective in every turn, and the passes' medians; two turns warm up."""
    alone = passes(flow_map, batch)
    work: dict[tuple[str, str], Callable[[], None]] = {("pass", name): job for name, job in alone.items()}
    for key, objective in OBJECTIVES.items():
        work[key] = partial(take_step, objective, flow_map, batch)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    for turn in range(repeats + 2):
        for key, job in work.items():
            start = time.perf_counter()
            job()
            if batch.x0.is_cuda:
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[key].append(time.perf_counter() - start)
    return seconds, Prices(**{name: statistics.median(seconds.pop(("pass", name))) for name in alone})


def peak_mib(name: str, key: tuple[str, str], device: str) -> float:
    """Memory that a step adds at its peak, in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, *key, "--device", device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(name: str, key: tuple[str, str], device: str) -> None:
    """Body of the process that `peak_mib` starts."""
    torch.set_num_threads(1)
    flow_map, batch = setting(name, device)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step.json")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(options.peak[0], (options.peak[1], options.peak[2]), options.device)
        return
    torch.set_num_threads(options.threads)
    rows = []
    heads = f"{'ratio':>6} {'quartiles':>13} {'floor':>6} {'priced':>7} {'of it':>6} {'peak MiB':>9}"
    print(f"{'network':7} {'objective':20} {'derivative':18} {heads}")
    base = ("flow matching", "none")
    base_cost = floor_passes(OBJECTIVES[base])
    for name, case in CASES.items():
        flow_map, batch = setting(name, options.device)
        seconds, prices = turns(flow_map, batch, options.repeats)
        base_seconds = statistics.median(seconds[base])
        for key, objective in OBJECTIVES.items():
            found = [own / other for own, other in zip(seconds[key], seconds[base], strict=True)]
            low, ratio, high = statistics.quantiles(found, n=4)
            cost = evaluations(objective, flow_map, batch)
            row = {
                "objective": key[0],
                "derivative": key[1],
                "network": name,
                "batch": case.batch,
                "ratio": round(ratio, 3),
                "low": round(low, 3),
                "high": round(high, 3),
                "turns": len(found),
                "peak_mib": round(peak_mib(name, key, options.device), 1),
                "evaluations": round(cost, 3),
                "floor": round(floor_passes(objective) / base_cost, 3),
                "priced": round(prices.of(objective) / base_seconds, 3),
                "seconds": round(statistics.median(seconds[key]), 5),
                "forward_seconds": round(prices.forward, 5),
                "train_seconds": round(prices.train, 5),
                "tangent_seconds": round(prices.tangent, 5),
                "device": options.device,
                "threads": options.threads,
            }
            rows.append(row)
            quartiles = f"{low:.2f} to {high:.2f}"
            print(
                f"{name:7} {key[0]:20} {key[1]:18} {ratio:>6.2f} {quartiles:>13} {row['floor']:>6.2f} "
                f"{row['priced']:>7.2f} {row['priced'] / ratio:>6.0%} {row['peak_mib']:>9.0f}",
                flush=True,
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"Stored: {options.out}")


if __name__ == "__main__":
    main()
