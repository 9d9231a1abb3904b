"""What bf16 changes of a run: its loss, its weights, a step's time and its memory, beside float32.

The exact derivative runs in bf16, a finite difference in float32.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

import benchmarks.harness as h
import fewstep as fs
from benchmarks.cost.step import resident
from benchmarks.engine.overhead import DIGITS
from fewstep.training.loop import Trainer

DIT = replace(
    DIGITS,
    network=fs.DiTConfig(width=96, depth=4, heads=3, patch=2),
    optimizer=replace(DIGITS.optimizer, lr=1e-3),
    training=replace(DIGITS.training, batch_size=64),
)
NETWORKS = {"MLP": DIGITS, "DiT of 96 by 4, 16 tokens": DIT}
KINDS = {"exact": "exact", "finite-difference": "finite differences"}
LAST = 50
"""Steps whose loss is averaged."""


def config_of(network: str, kind: str, precision: str, seed: int = 0) -> fs.RunConfig:
    """The recipe `digits` (iSD-T) with a network, by one of the derivatives."""
    base = NETWORKS[network]
    objective = replace(base.objective, derivative=fs.Derivative(kind))  # type: ignore[call-arg, arg-type]
    training = replace(base.training, precision=precision, seed=seed)  # type: ignore[arg-type]
    optimizer = replace(base.optimizer, warmup_images=10 * training.batch_size)
    return replace(base, objective=objective, training=training, optimizer=optimizer)


def weights(trainer: Trainer) -> Tensor:
    """Of its network, in one row."""
    return torch.cat([p.detach().flatten().clone() for p in trainer.learner.flow_map.network.parameters()])


def train(network: str, kind: str, precision: str, seed: int, steps: int) -> tuple[float, Tensor, Tensor]:
    """(mean loss of the last steps, the weights before, and after) from the same weights whatever the seed."""
    losses = []
    with h.trainer_of(config_of(network, kind, precision)) as first:
        begun = {key: value.clone() for key, value in first.learner.flow_map.network.state_dict().items()}
    with h.trainer_of(config_of(network, kind, precision, seed)) as trainer:
        trainer.learner.flow_map.network.load_state_dict(begun)
        before = weights(trainer)
        for step in range(steps):
            trainer.take_step()
            if step >= steps - LAST:
                losses.append(trainer.window.latest)
        return float(torch.stack(losses).mean()), before, weights(trainer)


def peak(network: str, kind: str, precision: str) -> float:
    """MiB that the loss and gradient of a batch add, in a process of its own."""
    torch.set_num_threads(1)
    with h.trainer_of(config_of(network, kind, precision)) as trainer:
        trainer.try_step(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        trainer.try_step(1)
        return resident("VmHWM") - before


def rows(steps: int, rounds: int) -> Iterator[h.Row]:
    """Four for each network and derivative."""
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "131072")  # in new processes: what is freed goes back at once
    for network in NETWORKS:
        for kind, name in KINDS.items():
            setting = f"{network}, iSD-T, {name}"
            yield from after_steps(setting, network, kind, steps)
            yield of_time(setting, network, kind, rounds)
            peaks = []
            for precision in ("bf16", "no"):
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                    peaks.append(alone.submit(peak, network, kind, precision).result())
            yield row("peak memory of a step", setting, round(peaks[0], 1), "MiB", f"{peaks[1]:,.1f} MiB in float32")


def after_steps(setting: str, network: str, kind: str, steps: int) -> Iterator[h.Row]:
    """Loss and weights after so many, beside those of float32 with other noise."""
    loss, begun, usual = train(network, kind, "no", 0, steps)
    rounded, _, own = train(network, kind, "bf16", 0, steps)
    noisy, _, other = train(network, kind, "no", 1, steps)
    beside = f"{noisy / loss - 1:+.2%} with other noise"
    name = f"loss of steps {steps - LAST + 1} to {steps}"
    yield row(name, setting, round(100 * (rounded / loss - 1), 2), "% over float32", beside)
    way = float((usual - begun).norm())
    value, beside = float((own - usual).norm()) / way, f"{float((other - usual).norm()) / way:.3f} with other noise"
    yield row(f"weights after {steps} steps", setting, round(value, 3), "of float32's way from its start", beside)


def of_time(setting: str, network: str, kind: str, rounds: int) -> h.Row:
    """Ratio of the processor's time, in turns."""
    with contextlib.ExitStack() as held:
        jobs = {
            precision: held.enter_context(h.trainer_of(config_of(network, kind, precision))).take_step
            for precision in ("bf16", "no")
        }
        ratio = h.time_ratio(*h.take_turns(jobs, rounds, time.process_time).values())
    return row("a step", setting, ratio["ratio"], "times a step in float32", f"{ratio['low']} to {ratio['high']}")


def row(name: str, setting: str, value: float, unit: str, beside: str) -> h.Row:
    return {"measure": f"bf16, {name}", "setting": setting, "value": value, "unit": unit, "beside": beside}
