"""What a training step of each method costs, beside Euler's, and what is measured of the teacher before the first."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import fewstep as fs
from benchmarks.harness import Row, take_turns, time_ratio, trainer_of
from benchmarks.skip.methods import BASELINE, FEW, methods
from fewstep.training.covariance import measure
from fewstep.training.statistics import estimate_together
from fewstep.training.trajectories import regress

BEFORE = ", before the first step"
"""Of a form's name in the rows: its time is that of what is measured of the teacher, in steps of Euler's."""
SAMPLES, TRAJECTORIES = 8, 8
OF_UNETS = 32
"""One in so many samples and trajectories is measured; of U-Nets one in 32 trajectories."""


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


def form_of(method: str) -> str:
    """What of a method's name says what is measured of the teacher."""
    return method.split(",")[0] + FEW * (FEW in method)


def start_costs(dataset: str, teacher: Path, data: fs.Dataset, rounds: int) -> list[Row]:
    """Of each form that needs a measure of its teacher, that one over a step of Euler's: rows as `step_costs`."""
    known = methods(dataset)
    share = OF_UNETS if isinstance(known[BASELINE].network, fs.UNetConfig) else TRAJECTORIES
    model = fs.load(teacher).flow_map.requires_grad_(False)
    with trainer_of(replace(known[BASELINE], teacher=str(teacher)), data) as trainer:
        jobs: dict[str, Callable[[], object]] = {BASELINE: trainer.take_step}
        if "analytic" in known:
            given = known["analytic"].statistics
            few = replace(given, samples=given.samples // SAMPLES)
            jobs["analytic"] = partial(estimate_together, model, data, few)
        for name, config in known.items():
            wanted, of = config.model.preconditioning.regression, config.model.preconditioning.covariance
            if wanted is not None and of is not None and form_of(name) not in jobs:
                settings = replace(wanted, trajectories=wanted.trajectories // share)
                jobs[form_of(name)] = partial(regress, model, data, measure(data, of), settings)
        spent = take_turns(jobs, rounds, time.process_time)
    times = {BASELINE: 1, "analytic": SAMPLES}
    spent = {name: [times.get(name, share) * value for value in own] for name, own in spent.items()}
    return [
        {"dataset": dataset, "method": name + BEFORE} | time_ratio(own, spent[BASELINE])
        for name, own in spent.items()
        if name != BASELINE
    ]
