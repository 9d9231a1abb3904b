"""What a training step of each method costs, beside Euler's."""

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import fewstep as fs
from benchmarks.harness import Row, take_turns, time_ratio, trainer_of
from benchmarks.skip.methods import BASELINE, methods


def step_costs(dataset: str, teacher: Path, data: fs.Dataset, rounds: int, names: tuple[str, ...] = ()) -> list[Row]:
    """{dataset, method, ratio, low, high}: quartiles over turns of a step's time of the processor over Euler's."""
    with ExitStack() as stack:
        jobs = {}
        for name, config in methods(dataset).items():
            if names and name not in (BASELINE, *names):
                continue
            trainer = stack.enter_context(trainer_of(replace(config, teacher=str(teacher)), data))
            jobs[name] = trainer.take_step
        spent = take_turns(jobs, rounds, time.process_time)
    return [{"dataset": dataset, "method": name} | time_ratio(own, spent[BASELINE]) for name, own in spent.items()]
