"""An optimizer's step as one program (torch.compile) over the fused one of a run; the share of a step that this has."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

import benchmarks.harness as h
from benchmarks.engine.precision import NETWORKS
from fewstep.training.loop import Trainer


def compiled_step(parameters: list[nn.Parameter]) -> Callable[[], object]:
    """AdamW compiled; its learning rate is a tensor, which foreach does not take: a new one compiles nothing."""
    optimizer = torch.optim.AdamW(parameters, torch.tensor(1e-4), betas=(0.9, 0.99), weight_decay=0.0, foreach=False)
    step: Callable[[], object] = torch.compile(optimizer.step, fullgraph=False)
    return step


def jobs_of(trainer: Trainer) -> dict[str, Callable[[], object]]:
    """Both forms on the gradients of one step, and a whole step."""
    trainer.take_step()
    parameters = [p for p in trainer.learner.flow_map.network.parameters() if p.grad is not None]
    kept = [p.grad for p in parameters]
    compiled = compiled_step(parameters)

    def with_gradients(step: Callable[[], object]) -> None:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
        step()

    fused = trainer.learner.optimizers.parts[0].optimizer.step
    return {
        "compiled": lambda: with_gradients(compiled),
        "fused": lambda: with_gradients(fused),
        "whole": trainer.take_step,
    }


def rows(rounds: int) -> Iterator[h.Row]:
    """Two for each network."""
    for name, config in NETWORKS.items():
        with h.trainer_of(config) as trainer:
            spent = h.take_turns(jobs_of(trainer), rounds, time.process_time)
        ratio, share = h.time_ratio(spent["compiled"], spent["fused"]), h.time_ratio(spent["fused"], spent["whole"])
        yield row("compiled", name, ratio, "times the fused one")
        yield row("fused", name, share, "of a whole step, iSD-T")


def row(form: str, name: str, ratio: h.Row, unit: str) -> h.Row:
    return {
        "measure": "optimizer's step", "setting": f"{name}, {form}", "value": ratio["ratio"], "unit": unit,
        "beside": f"{ratio['low']} to {ratio['high']}",
    }  # fmt: skip
