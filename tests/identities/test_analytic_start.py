"""Analytic preconditioning with Euler's weight, and about the means of classes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fewstep.data.base import Dataset, Samples
from fewstep.flow.flow_map import FlowMap, at
from fewstep.flow.ode import ddim
from fewstep.flow.paths import EDM, Path
from fewstep.flow.preconditioning.analytic import AnalyticPreconditioning, AnalyticPreconditioningConfig
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.networks.condition import Condition
from fewstep.recipes.config import StatisticsConfig
from fewstep.training.statistics import estimate_together, prepared
from fewstep.utils.errors import ConfigError
from fewstep.utils.serialization import from_json, to_json
from tests.support.cases import F64, PATHS, Callback, clock, close, noise, random_network, unit_triples
from tests.support.statistics import wavy

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


@every_path
@settings(max_examples=6)
@given(times=unit_triples)
def test_with_eulers_weight_it_starts_at_the_ddim_step_but_for_its_f(path: Path, times: list[float]) -> None:
    """X - DDIM = (f - f_E)(x - alpha m) for the same N, whatever it is; the identity at s = t, Euler's diagonal."""
    own = AnalyticPreconditioning(wavy(), "backward", path, "euler")
    s, _, t = (time.repeat(3) for time in clock(path, *times))
    x, output = noise(3, 4), noise(3, 4, seed=1)
    f, f_euler = own.coefficients(t, s)[0], EulerPreconditioning(path).coefficients(t, s)[0]
    centred = x - path.values(t).over(x).alpha * wavy().mean
    close(own.jump(path, x, output, t, s) - ddim(path, x, output, t, s), (f - f_euler)[:, None] * centred, atol=1e-9)
    close(own.jump(path, x, output, t, t), x)
    rates = torch.func.jvp(lambda s: own.coefficients(t, s), (t,), (torch.ones_like(t),))[1]
    for found, wanted in zip(rates, own.diagonal(t), strict=True):
        close(found, wanted, rtol=1e-6, atol=1e-6 * float(1 + wanted.abs().max()))
    assert from_json(AnalyticPreconditioning, to_json(own)) == own


def test_the_weight_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match="weight is 'longer'"):
        AnalyticPreconditioningConfig(weight="longer")  # type: ignore[arg-type]
    built = AnalyticPreconditioningConfig(weight="euler").build(EDM(), 1.0, wavy())
    assert built.weight == "euler"


def test_about_the_means_of_classes_each_sample_has_its_own_origin() -> None:
    means = torch.tensor([[0.5], [-2.0]], dtype=F64) * torch.ones(3, dtype=F64)
    statistics = replace(wavy(), mean=torch.full((3,), 0.3, dtype=F64), class_means=means)
    network = random_network((3,), 2)
    flow_map = FlowMap(EDM(), AnalyticPreconditioning(statistics), network)
    x, labels = noise(3, 3), torch.tensor([1, -1, 0])
    t, s = at(5.0, x), at(0.3, x)
    found = flow_map.jump(x, t, s, Condition(labels))
    for row, mean in enumerate((means[1], statistics.mean, means[0])):
        alone = AnalyticPreconditioning(replace(wavy(), mean=mean))
        own = FlowMap(EDM(), alone, network).jump(x, t, s, Condition(labels))
        close(found[row].detach(), own[row].detach())
    assert from_json(type(statistics), to_json(statistics)) == statistics
    with pytest.raises(ConfigError, match="class_means"):
        replace(statistics, class_means=noise(2, 4))


def test_statistics_about_the_means_of_classes_are_those_of_one_class() -> None:
    """Of classes N(m_c, sd^2 I), each with its exact denoiser: l and s as for a single Gaussian, whatever the means."""
    centres = torch.tensor([[0.5], [-4.0]]) * torch.ones(3)
    labels = torch.arange(2).repeat_interleave(64)
    values = centres[labels] + 0.7 * noise(128, 3, seed=2).float()
    samples = Samples(values.reshape(128, 3, 1, 1), labels)
    data = Dataset("two", samples, samples, 2, ("a", "b"))
    own = torch.stack([values[labels == c].mean(0) for c in (0, 1)]).double()

    def denoise(x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        assert cond.labels is not None
        mean, lam = own[cond.labels].to(x).reshape(x.shape), 0.49
        return mean + (lam / (lam + t * t)).to(x).reshape(-1, 1, 1, 1) * (x - mean)

    network = Callback(denoise)
    network.register_parameter("none", torch.nn.Parameter(torch.zeros(1)))
    model = FlowMap(EDM(), EulerPreconditioning(), network)
    wanted = StatisticsConfig(points=12, samples=64, probes=1, classes="origin")
    found = estimate_together(model, data, wanted)
    assert found.class_means is not None
    close(found.class_means.flatten(1), own, atol=1e-6)
    close(found.l, 0.49 / (0.49 + found.tau**2), rtol=1e-3, atol=1e-5)
    assert prepared(found, wanted, data).is_shrunk
    assert not prepared(
        estimate_together(model, data, StatisticsConfig(points=12, samples=8)), StatisticsConfig(), data
    ).is_shrunk
    with pytest.raises(ConfigError, match="centred"):
        StatisticsConfig(classes="origin", centred=False)
