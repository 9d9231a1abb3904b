"""The Gaussian case of benchmarks/degeneracy_gaussian.py, and the objectives that distil the map from itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fewstep.flow.closed_form import GaussianData
from fewstep.flow.paths import Linear, Trig
from fewstep.flow.preconditioning import LinearPreconditioning, TrigPreconditioning
from fewstep.flow.times import UniformTimes
from fewstep.objectives import ESD, ISD, LSD, PSD, Objective
from tests.support.cases import F64


def load_benchmark() -> ModuleType:
    """The benchmark as a module, though it is no package."""
    file = Path(__file__).parents[2] / "benchmarks" / "degeneracy_gaussian.py"
    spec = importlib.util.spec_from_file_location("degeneracy_gaussian", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["degeneracy_gaussian"] = module
    spec.loader.exec_module(module)
    return module


G = load_benchmark()
SETTINGS: dict[str, Any] = {"times": UniformTimes(), "diagonal": 0.0, "dropout": 0.0, "power": 0.0}
SELF_DISTILLED: dict[str, Objective] = {
    "iSD": ISD(**SETTINGS),
    "ESD": ESD(**SETTINGS),
    "LSD": LSD(**SETTINGS),
    "PSD": PSD("midpoint", **SETTINGS),
}


def case(sd: float = 0.5, mean: float = 1.0, path: str = "linear") -> Any:
    """One-dimensional Gaussian data on a path with its own preconditioning."""
    data = GaussianData(torch.tensor(mean, dtype=F64), sd)
    if path == "linear":
        return G.Case(Linear(), LinearPreconditioning(), data)
    return G.Case(Trig(), TrigPreconditioning(), data)
