"""The Gaussian case of benchmarks/degeneracy/gaussian.py, and the objectives that distil the map from itself."""

from typing import Any

import torch

from benchmarks.degeneracy import gaussian as G
from fewstep.flow.closed_form import GaussianData
from fewstep.flow.paths import Linear, Trig
from fewstep.flow.preconditioning.jumps import LinearPreconditioning, TrigPreconditioning
from fewstep.flow.times import UniformTimes
from fewstep.objectives import ESD, ISD, LSD, PSD, Objective
from tests.support.cases import F64
from tests.support.objectives import made

SETTINGS: dict[str, Any] = {
    "times": UniformTimes(),
    "flow_matching_ratio": 0.0,
    "label_dropout": 0.0,
    "weight_power": 0.0,
}
SELF_DISTILLED: dict[str, Objective] = {
    "iSD": made(ISD, **SETTINGS),
    "ESD": made(ESD, **SETTINGS),
    "LSD": made(LSD, **SETTINGS),
    "PSD": made(PSD, u="midpoint", **SETTINGS),
}


def case(sd: float = 0.5, mean: float = 1.0, path: str = "linear") -> Any:
    """One-dimensional Gaussian data on a path with its own preconditioning."""
    data = GaussianData(torch.tensor(mean, dtype=F64), sd)
    if path == "linear":
        return G.Case(Linear(), LinearPreconditioning(), data)
    return G.Case(Trig(), TrigPreconditioning(), data)
