"""A sampler as a table of numbers: all that a program without paths and preconditionings needs to draw samples.

One step of the map sampler is x <- a x + b F(c_in x, t, s) + m, with F the raw network and
a = f + g c_skip, b = g c_out, m the origin times its weight (math.md §2, §3.6).
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.preconditioning.base import origin_weight
from fewstep.sampling.generate import SamplingSettings
from fewstep.sampling.pipeline import Pipeline
from fewstep.utils.errors import ConfigError

_EXACT = 1e-12


@dataclass(frozen=True)
class Step:
    """Numbers of one step; t, s: in the clock of the raw network. origin: the weight of the origin, 0 for none."""

    t: float
    s: float
    c_in: float
    a: float
    b: float
    origin: float


@dataclass(frozen=True)
class StepTable:
    """prior: the deviation of the noise to start from. steps: for each number of network calls, its steps."""

    prior: float
    steps: dict[int, tuple[Step, ...]]

    def is_flow(self, noise_time: float) -> bool:
        """Whether every step is x + (s - t) F(x, t, s) on times from 1 to 0, in a clock of `noise_time` at noise."""
        flow = self.prior == 1.0
        for step in (step for steps in self.steps.values() for step in steps):
            change = (step.s - step.t) / noise_time
            numbers = step.c_in - 1, step.a - 1, step.b - change, step.origin
            flow = flow and all(abs(number) < _EXACT for number in numbers)
        return flow

    def to_json(self) -> str:
        """{"prior", "steps": {calls: [{t, s, c_in, a, b, origin}]}}."""
        rows = {str(calls): [asdict(step) for step in steps] for calls, steps in self.steps.items()}
        return json.dumps({"prior": self.prior, "steps": rows}, indent=1) + "\n"


def step_table(pipeline: Pipeline, calls: tuple[int, ...], **settings: Any) -> StepTable:
    """The map sampler of a pipeline in these numbers of calls, at the times that were tuned for them if any were.

    settings: of SamplingSettings, besides steps. Raises ConfigError for another sampler than the map's.
    """
    times = sampling_times(pipeline, calls, **settings)
    return StepTable(prior_of(pipeline), {count: steps_of(pipeline.flow_map, own) for count, own in times.items()})


def sampling_times(pipeline: Pipeline, calls: tuple[int, ...], **settings: Any) -> dict[int, Tensor]:
    """For each number of calls the falling times of the map sampler; raises ConfigError for another sampler."""
    found = {}
    for count in calls:
        own = SamplingSettings(steps=count, **settings)
        if own.sampler != "map":
            raise ConfigError(f"sampler {own.sampler!r} is no table of steps: export the map sampler")
        found[count] = own.grid(pipeline.flow_map.path, pipeline.step_times)
    return found


def prior_of(pipeline: Pipeline) -> float:
    """The deviation of the noise that samples start from."""
    path = pipeline.flow_map.path
    return float(path.values(torch.tensor([path.t_max], dtype=torch.float64)).sigma)


def steps_of(flow_map: FlowMap, times: Tensor) -> tuple[Step, ...]:
    """Steps at falling times (n + 1,)."""
    path, scaling = flow_map.path, flow_map.scaling
    if flow_map.preconditioning.known_measures() is not None:
        raise ConfigError(
            "the steps of a model with a skip scale every direction of the data apart, which this format has no place "
            "for: export it --to torch"
        )
    times = path.clock(times)
    t, s = times[:-1], times[1:]
    f, g = flow_map.preconditioning.coefficients(t, s)
    c_skip, c_out, c_in = scaling.values(t)
    weight = torch.zeros_like(f)
    if flow_map.preconditioning.origin is not None:
        weight = origin_weight(path, f, g, t, s)
    columns = scaling.c_noise(t), scaling.c_noise(s), c_in, f + g * c_skip, g * c_out, weight
    return tuple(Step(*row) for row in torch.stack(columns, 1).tolist())
