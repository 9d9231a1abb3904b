"""The objectives that distil the map from itself, with every term on all samples and no weights."""

from typing import Any

from fewstep.flow.times import UniformTimes
from fewstep.objectives import ESD, ISD, LSD, PSD, Objective
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
