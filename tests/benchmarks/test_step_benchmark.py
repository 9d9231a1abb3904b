"""The step benchmark's count of evaluations: no objective evaluates more than its definition needs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fewstep import DiagonalMatching, FlowMap, Linear, LinearPreconditioning, MLPConfig
from fewstep.objectives import Batch
from fewstep.utils.random import Draws


def load_benchmark() -> ModuleType:
    file = Path(__file__).parents[2] / "benchmarks" / "step.py"
    spec = importlib.util.spec_from_file_location("step_benchmark", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["step_benchmark"] = module
    spec.loader.exec_module(module)
    return module


BENCHMARK = load_benchmark()


@pytest.mark.parametrize("key", BENCHMARK.OBJECTIVES, ids=" ".join)
def test_no_evaluation_is_redundant(key: tuple[str, str]) -> None:
    objective = BENCHMARK.OBJECTIVES[key]
    network = MLPConfig(width=8, depth=1, embedding_width=8).build((2,), 3, False)
    flow_map = FlowMap(Linear(), LinearPreconditioning(), network)
    draws = Draws(0, 0, torch.arange(400))
    batch = Batch(draws.normal(1, (2,)), torch.arange(400) % 3, draws)
    # Labels are dropped at random, so the null evaluations of guidance are a tenth short only on average.
    assert BENCHMARK.evaluations(objective, flow_map, batch) == pytest.approx(
        BENCHMARK.floor_passes(objective), abs=0.05
    )


def test_a_second_evaluation_would_be_counted() -> None:
    network = MLPConfig(width=8, depth=1, embedding_width=8).build((2,), 0, False)
    flow_map = FlowMap(Linear(), LinearPreconditioning(), network)
    draws = Draws(0, 0, torch.arange(8))

    class Twice:
        def __call__(self, flow_map: FlowMap, batch: Batch) -> object:
            DiagonalMatching()(flow_map, batch)
            return DiagonalMatching()(flow_map, batch)

    assert BENCHMARK.evaluations(Twice(), flow_map, Batch(draws.normal(1, (2,)), None, draws)) == 6.0
