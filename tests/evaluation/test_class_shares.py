"""Samples have the classes of what they are compared with: an exact model of unequal classes is near its data."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fewstep.evaluation.evaluate import draw_features
from fewstep.evaluation.metrics.features import IdentityExtractor
from fewstep.evaluation.metrics.fidelity import frechet_distance
from fewstep.evaluation.metrics.measure import Evaluator
from fewstep.evaluation.tune_steps import TuningPlan, tune
from fewstep.flow.closed_form import GaussianData, GaussianOutput
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import Linear
from fewstep.flow.preconditioning.jumps import LinearPreconditioning
from fewstep.networks.base import Network
from fewstep.networks.condition import Condition
from fewstep.recipes.config import EvaluationConfig
from fewstep.sampling.generate import SamplingSettings
from fewstep.sampling.pipeline import Pipeline
from fewstep.utils.random import Draws

SD, MEANS = 0.3, torch.tensor([0.0, 4.0])
PATH, JUMPS = Linear(), LinearPreconditioning()


class Classes(Network):
    """The exact network of two Gaussians of shape (1, 1, 2), each a class."""

    def __init__(self) -> None:
        super().__init__((1, 1, 2), 2, False)
        self.place = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        assert cond is not None
        assert cond.labels is not None
        data = GaussianData(MEANS[cond.labels].reshape(-1, 1, 1, 1), SD)
        found: Tensor = GaussianOutput(data, PATH, JUMPS)(x, t, s)
        return found.to(x.dtype)


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline(FlowMap(PATH, JUMPS, Classes()))


@pytest.fixture
def evaluator() -> Evaluator:
    """400 held-out samples, of which 20 are of the second class."""
    labels = torch.arange(400) // 380
    values = MEANS[labels][:, None] + SD * Draws(3, 0, torch.arange(400)).normal(0, (2,), torch.float64)
    return Evaluator("two Gaussians", values, labels, IdentityExtractor((1, 1, 2)))


@pytest.mark.parametrize("count", [100, 400, 1000])
def test_an_exact_model_is_near_its_data(count: int, pipeline: Pipeline, evaluator: Evaluator) -> None:
    found = {}
    for shares in ("data", "uniform"):
        asked = evaluator.asked(pipeline.flow_map, count, replace(EvaluationConfig(), classes=shares))
        _, features = draw_features(pipeline, count, SamplingSettings(steps=1), evaluator.extractor, asked)
        found[shares] = frechet_distance(features, evaluator.features)
    assert found["data"] < 0.05
    assert found["uniform"] > 2


def test_a_placement_is_judged_by_classes_in_their_shares(pipeline: Pipeline, evaluator: Evaluator) -> None:
    plan, settings = TuningPlan(samples=200, evaluations=4), SamplingSettings(steps=2, spacing="uniform")
    asked = evaluator.asked(pipeline.flow_map, plan.samples, EvaluationConfig())
    assert tune(pipeline, settings, evaluator, plan, asked).check.default < 0.3
    assert tune(pipeline, settings, evaluator, plan).check.default > 2


def test_a_model_without_classes_is_asked_for_none(evaluator: Evaluator) -> None:
    model = GaussianData(torch.tensor(0.0), SD).flow_map(PATH, JUMPS)
    assert evaluator.classes(model, 10, EvaluationConfig()) is None
