"""The step benchmark's count of evaluations: no objective evaluates more than its definition needs."""

import pytest
import torch

from benchmarks.cost.step import OBJECTIVES, evaluations, floor_passes
from fewstep import DiagonalMatching, FlowMap, Linear, LinearPreconditioning, MLPConfig
from fewstep.objectives import Batch
from fewstep.utils.random import Draws


@pytest.mark.parametrize("key", OBJECTIVES, ids=" ".join)
def test_no_evaluation_is_redundant(key: tuple[str, str]) -> None:
    objective = OBJECTIVES[key]
    network = MLPConfig(width=8, depth=1, embedding_width=8).build((2,), 3, False)
    flow_map = FlowMap(Linear(), LinearPreconditioning(), network)
    draws = Draws(0, 0, torch.arange(400))
    batch = Batch(draws.normal(1, (2,)), torch.arange(400) % 3, draws)
    # Labels are dropped at random, so the null evaluations of guidance are a tenth short only on average.
    assert evaluations(objective, flow_map, batch) == pytest.approx(floor_passes(objective), abs=0.05)


def test_a_second_evaluation_would_be_counted() -> None:
    network = MLPConfig(width=8, depth=1, embedding_width=8).build((2,), 0, False)
    flow_map = FlowMap(Linear(), LinearPreconditioning(), network)
    draws = Draws(0, 0, torch.arange(8))

    class Twice:
        def __call__(self, flow_map: FlowMap, batch: Batch, companions: object) -> object:
            DiagonalMatching()(flow_map, batch)
            return DiagonalMatching()(flow_map, batch)

    assert evaluations(Twice(), flow_map, Batch(draws.normal(1, (2,)), None, draws)) == 6.0
