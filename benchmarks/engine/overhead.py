"""What the trainer adds to the bare objective, backward pass and optimizer; what `generate` adds to network calls."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

import benchmarks.harness as h
import fewstep as fs
from fewstep.flow.flow_map import at
from fewstep.networks.condition import Condition
from fewstep.recipes import recipe
from fewstep.sampling.generate import prior_noise
from fewstep.training.loop import Trainer
from fewstep.utils.random import Draws

DIGITS = recipe("digits")
UNET = fs.UNetConfig(width=32, multipliers=(1, 2), blocks=1, attention=())
CASES: dict[str, fs.RunConfig] = {
    "MLP, iSD-T": DIGITS,
    "MLP, flow matching": replace(DIGITS, objective=fs.DiagonalMatching()),
    "U-Net, iSD-T": replace(DIGITS, network=UNET),
}
COUNTS = (256, 512)
"""Samples of a batch; 512 is what `generate` takes where nothing is said."""


def bare_step(trainer: Trainer) -> Callable[[], None]:
    """The same losses, gradients and optimizer, of one batch again and again."""
    flow_map, objective = trainer.learner.flow_map, trainer.config.objective
    optimizer, batch = trainer.learner.optimizers.parts[0].optimizer, trainer.batch(0, trainer.micro)

    def step() -> None:
        optimizer.zero_grad()
        objective(flow_map, batch).mean().backward()
        optimizer.step()

    return step


def two_calls(flow_map: fs.FlowMap, count: int) -> Callable[[], None]:
    """The network alone, twice, on noise that is there."""
    x = prior_noise(flow_map, Draws(0, 0, torch.arange(count)))
    t, s, cond = at(1.0, x).float(), at(0.5, x).float(), Condition(torch.arange(count) % 10)

    def calls() -> None:
        with torch.no_grad():
            for _ in range(2):
                flow_map.network(x, t, s, cond)

    return calls


def rows(rounds: int) -> Iterator[h.Row]:
    """Ratios of the processor's time, in turns."""
    for name, config in CASES.items():
        with contextlib.ExitStack() as held:
            whole, other = (held.enter_context(h.trainer_of(config)) for _ in range(2))
            step, bare = whole.take_step, bare_step(other)
            spent = h.take_turns({"whole": step, "bare": bare}, rounds, time.process_time)
            yield row(f"a step of the trainer, {name}", "the bare objective, backward pass and optimizer", spent)
            if config.objective.on_diagonal:
                continue
            flow_map = whole.learner.flow_map.eval()
            for count in COUNTS:
                jobs = {"whole": partial(fs.generate, flow_map, count, steps=2), "bare": two_calls(flow_map, count)}
                spent = h.take_turns(jobs, 2 * rounds, time.process_time)
                yield row(f"generate in two calls, {name}, {count} samples", "two calls of the network", spent)


def row(setting: str, beside: str, spent: dict[str, list[float]]) -> h.Row:
    ratio = h.time_ratio(spent["whole"], spent["bare"])
    return {
        "measure": "overhead", "setting": setting, "value": ratio["ratio"],
        "unit": f"times {beside}", "beside": f"{ratio['low']} to {ratio['high']}",
    }  # fmt: skip
