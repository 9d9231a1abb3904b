"""Samplers at exact maps: every number of steps agrees, marginals are kept, orders and evaluations are as declared."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fewstep.flow.closed_form import GaussianData, GaussianOutput
from fewstep.flow.flow_map import FlowMap, at
from fewstep.flow.guidance import ClassifierFreeGuidance, sampling_condition
from fewstep.flow.paths import EDM, VP, Linear, Path, Trig
from fewstep.flow.preconditioning.jumps import EulerPreconditioning, LinearPreconditioning
from fewstep.flow.times import check_grid, edm_grid, uniform_grid
from fewstep.networks.base import Network
from fewstep.networks.condition import NULL_LABEL, Condition
from fewstep.networks.unet import UNetConfig
from fewstep.sampling.generate import SamplingSettings, generate
from fewstep.sampling.samplers import euler_sampler, gamma_sampler, heun_sampler, map_sampler
from fewstep.utils.errors import ConfigError, FewstepError, ShapeError
from fewstep.utils.random import Draws

F64 = torch.float64
MEAN, SD = torch.tensor([0.5, -0.3], dtype=F64), 0.6
PATHS: dict[str, Path] = {"edm": EDM(), "linear": Linear(), "trig": Trig(SD), "vp": VP()}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


class ExactNetwork(Network):
    """Gaussian data whose mean moves by the label; exact in every jump."""

    def __init__(self, path: Path, preconditioning: Any, num_classes: int = 0) -> None:
        super().__init__((2,), num_classes, False)
        self.path, self.preconditioning = path, preconditioning
        self.place = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        mean = MEAN
        if cond is not None and cond.labels is not None:
            mean = MEAN + (cond.labels[:, None] + 1)
        return GaussianOutput(GaussianData(mean, SD), self.path, self.preconditioning)(x, t, s).to(x.dtype)


def exact_map(path: Path, num_classes: int = 0) -> FlowMap:
    preconditioning = EulerPreconditioning(path)
    return FlowMap(path, preconditioning, ExactNetwork(path, preconditioning, num_classes))


def draws(count: int, seed: int = 0) -> Draws:
    return Draws(seed, 0, torch.arange(count))


def marginal(path: Path, count: int) -> Tensor:
    """Samples of x at t_max, the data's share included."""
    x0, eps = (draws(count, 9).normal(stream, (2,), F64) for stream in (0, 1))
    return path.interpolate(MEAN + SD * x0, eps, at(path.t_max, eps))


def check_data(samples: Tensor) -> None:
    """Mean and deviation within 5 standard errors; t_min's noise is far below one."""
    n = len(samples)
    assert bool(((samples.mean(0) - MEAN).abs() < 5 * SD / math.sqrt(n)).all())
    assert bool(((samples.std(0) - SD).abs() < 5 * SD / math.sqrt(2 * n)).all())


@every_path
def test_exact_maps_sample_the_data_in_any_number_of_steps(path: Path) -> None:
    flow_map, x = exact_map(path), marginal(path, 4000)
    one, two, five = (
        map_sampler(flow_map, x, uniform_grid(path, n), Condition(), draws(len(x))).detach() for n in (1, 2, 5)
    )
    torch.testing.assert_close(two, one, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(five, one, rtol=1e-8, atol=1e-8)
    check_data(one)


@every_path
def test_gamma_zero_is_the_map_sampler(path: Path) -> None:
    flow_map, x, times = exact_map(path), marginal(path, 50), edm_grid(path, 4)
    args = (flow_map, x, times, Condition(), draws(50))
    assert torch.equal(gamma_sampler(0.0)(*args), map_sampler(*args))


@every_path
@pytest.mark.parametrize("gamma", [0.3, 0.8, 1.0])
def test_gamma_sampling_keeps_the_marginals(path: Path, gamma: float) -> None:
    """At the data, and at the time before: there the noise has just been added."""
    flow_map, x, times = exact_map(path), marginal(path, 20_000), uniform_grid(path, 4)
    samples = gamma_sampler(gamma)(flow_map, x, times, Condition(), draws(len(x))).detach()
    check_data(samples)
    plain = map_sampler(flow_map, x, times, Condition(), draws(len(x))).detach()
    assert float((samples - plain).abs().mean()) > 0.01


def test_gamma_one_renoises_the_whole() -> None:
    """After the last re-noising nothing is left of the start but its jump to data."""
    path, x = Linear(), marginal(Linear(), 3)
    times = torch.tensor([1.0, 0.4, 0.0], dtype=F64)
    flow_map, noise = exact_map(path), draws(3).normal(1000, (2,), F64)
    landed = flow_map.jump(x, at(1.0, x), at(0.0, x))
    expected = flow_map.jump(0.6 * landed + 0.4 * noise, at(0.4, x), at(0.0, x))
    actual = gamma_sampler(1.0)(flow_map, x, times, Condition(), draws(3))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("path", [EDM(0.002, 5.0), Linear(), Trig(SD), VP()], ids=["edm", "linear", "trig", "vp"])
@pytest.mark.parametrize(("sampler", "order"), [(euler_sampler, 1), (heun_sampler, 2)])
def test_solvers_have_their_order(path: Path, sampler: Any, order: int) -> None:
    """Against the exact jump over the middle of the range, with a last step of h^2, where Heun's is Euler's."""
    flow_map, x = exact_map(path), marginal(path, 20)
    high, low = (float(path.time_from_unit(torch.tensor(u, dtype=F64))) for u in (0.8, 0.5))
    exact, steps, errors = GaussianData(MEAN, SD).jump(path, x, at(high, x), at(low, x)), (32, 64, 128), []
    for n in steps:
        inner = torch.linspace(high, low + (high - low) / n**2, n, dtype=F64)
        times = torch.cat([inner, torch.tensor([low], dtype=F64)])
        got = sampler(flow_map, x, times, Condition(), draws(20))
        errors.append(float((got - exact).abs().max().detach()))
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("sampler", "per_n"), [("map", (1, 2, 5)), ("euler", (1, 2, 5)), ("heun", (1, 3, 9))])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_evaluations_are_counted(sampler: Any, per_n: tuple[int, ...], gamma: float) -> None:
    flow_map = exact_map(Linear(), 3)
    for n, nfe in zip((1, 2, 5), per_n, strict=True):
        settings = SamplingSettings(sampler if gamma == 0 else "gamma", n, gamma=gamma, batch_size=4)
        expected = nfe if gamma == 0 else n
        assert generate(flow_map, 7, settings).nfe == expected
        assert generate(flow_map, 7, replace(settings, guidance_scale=2.0)).nfe == 2 * expected


@given(count=st.integers(1, 9), size=st.integers(1, 10), first=st.integers(0, 8), seed=st.integers(0, 2**40))
def test_sample_k_of_a_seed_is_the_same_whatever_the_batch(count: int, size: int, first: int, seed: int) -> None:
    flow_map = exact_map(Linear(), 3)
    settings = SamplingSettings("gamma", 3, gamma=0.7, seed=seed)
    whole = generate(flow_map, 17, settings)
    part = generate(flow_map, count, replace(settings, batch_size=size), first=first)
    torch.testing.assert_close(part.samples, whole.samples[first : first + count])
    assert torch.equal(part.labels, whole.labels[first : first + count])
    other = generate(flow_map, count, replace(settings, seed=seed + 1), first=first)
    assert not bool((other.samples == part.samples).any())


def test_generated_samples_are_the_datas() -> None:
    result = generate(exact_map(Linear()), 4000, SamplingSettings(steps=1))
    check_data(result.samples.double())
    assert result.labels is None


LABELLED, PLAIN = exact_map(Linear(), 3), exact_map(Linear())
BAD: list[tuple[FlowMap, dict[str, Any], dict[str, Any], str]] = [
    (LABELLED, {}, {"labels": torch.tensor([0, 3])}, "class 3"),
    (LABELLED, {}, {"labels": torch.tensor([0, -2])}, "class -2"),
    (LABELLED, {}, {"labels": torch.tensor([0, 1, 2])}, "one per sample"),
    (PLAIN, {}, {"labels": torch.tensor([0, 1])}, "without classes"),
    (PLAIN, {"steps": 0}, {}, "at least 1"),
    (PLAIN, {"steps": -3}, {}, "at least 1"),
    (PLAIN, {"sampler": "gamma", "gamma": 1.1}, {}, "gamma"),
    (PLAIN, {"sampler": "gamma", "gamma": -0.1}, {}, "gamma"),
    (PLAIN, {"sampler": "gamma", "gamma": math.nan}, {}, "gamma"),
    (PLAIN, {"times": (1.0,)}, {}, "fall strictly"),
    (PLAIN, {"times": (1.0, 0.5, 0.5, 0.0)}, {}, "fall strictly"),
    (PLAIN, {"times": (0.0, 1.0)}, {}, "fall strictly"),
    (PLAIN, {"times": (1.5, 0.0)}, {}, "fall strictly"),
    (PLAIN, {"times": (1.0, -0.5)}, {}, "fall strictly"),
    (PLAIN, {"times": (1.0, math.nan, 0.0)}, {}, "fall strictly"),
    (PLAIN, {"times": (1.0, 0.5)}, {}, r"times end at 0\.5.*end at t_min = 0"),
    (PLAIN, {"batch_size": 0}, {}, "at least 1"),
    (LABELLED, {}, {"labels": torch.tensor([1.7, 2.2])}, "no whole numbers"),
    (LABELLED, {}, {"labels": torch.tensor([1.0, math.nan])}, "no whole numbers"),
    (LABELLED, {}, {"labels": torch.tensor([1.0, math.inf])}, "no whole numbers"),
    (LABELLED, {}, {"labels": torch.tensor([True, False])}, "no whole numbers"),
    (LABELLED, {}, {"labels": [0, 10**30]}, "no whole numbers"),
    (LABELLED, {}, {"labels": ["cat", "dog"]}, "no class 'cat'"),
    (LABELLED, {}, {"labels": torch.tensor([0, 200], dtype=torch.uint8)}, "class 200"),
    (LABELLED, {"guidance_scale": math.inf}, {}, "finite omega"),
    (LABELLED, {"guidance_scale": 1e300}, {}, "finite omega"),
    (LABELLED, {"guidance_scale": 0.0}, {}, "omega > 0"),
    (LABELLED, {"guidance_scale": -2.0}, {}, "omega > 0"),
    (LABELLED, {"guidance_scale": 2.0, "interval": (0.6, 0.4)}, {}, "interval"),
    (LABELLED, {"guidance_scale": 2.0, "interval": (-0.1, 0.4)}, {}, "interval"),
]


def test_labels_may_be_a_list_and_of_any_type_that_holds_whole_numbers() -> None:
    settings = SamplingSettings(seed=3)
    wanted = generate(LABELLED, 3, settings, labels=torch.tensor([0, 2, 1]))
    for kind in (torch.uint8, torch.float16):
        for labels in ([0, 2, 1], torch.tensor([0, 2, 1], dtype=kind)):
            found = generate(LABELLED, 3, settings, labels=labels)
            assert torch.equal(found.samples, wanted.samples)
            assert found.labels is not None
            assert found.labels.tolist() == [0, 2, 1]


def test_samples_that_are_not_finite_are_told() -> None:
    for value in (math.nan, math.inf):
        drawn = generate(PLAIN, 3, SamplingSettings())
        drawn.check_finite()
        drawn.samples[1, 0] = value
        with pytest.raises(ShapeError, match="not finite in 1 of 3 samples"):
            drawn.check_finite()


@pytest.mark.parametrize(("flow_map", "settings", "options", "text"), BAD)
def test_what_cannot_be_sampled_is_refused(flow_map: FlowMap, settings: Any, options: Any, text: str) -> None:
    with pytest.raises(ShapeError, match=text):
        generate(flow_map, 2, SamplingSettings(**settings), **options)
    assert len(generate(flow_map, 2, SamplingSettings()).samples) == 2


def test_a_count_below_one_and_guidance_without_classes_are_refused() -> None:
    with pytest.raises(ShapeError, match="at least 1"):
        generate(PLAIN, 0, SamplingSettings())
    with pytest.raises(ConfigError, match="class labels"):
        generate(PLAIN, 2, SamplingSettings(guidance_scale=2.0))
    for omega, interval in ((0.0, (0.0, 1.0)), (math.nan, (0.0, 1.0)), (2.0, (0.5, 1.5))):
        with pytest.raises(FewstepError):
            ClassifierFreeGuidance(LABELLED, omega, interval)
        with pytest.raises(FewstepError):
            sampling_condition(None, False, omega, interval)


@every_path
def test_guidance_acts_inside_its_interval(path: Path) -> None:
    """Both ends of the range count as inside an interval of the whole range."""
    flow_map, x = exact_map(path, 3), marginal(path, 4)
    labels = torch.tensor([0, 1, 2, NULL_LABEL])
    cond, null = Condition(labels), Condition(torch.full((4,), NULL_LABEL))
    for interval, inside, outside in (((0.0, 1.0), (1.0, 0.5), ()), ((0.3, 0.6), (0.4, 0.55), (1.0, 0.7, 0.2))):
        guided = ClassifierFreeGuidance(flow_map, 2.5, interval)
        for unit in (*inside, *outside):
            t = at(path.t_max if unit == 1 else float(path.time_from_unit(torch.tensor(unit, dtype=F64))), x)
            s = at(path.t_min, x)
            omega = 2.5 if unit in inside else 1.0
            for call, args in (("jump", (x, t, s)), ("velocity", (x, t))):
                base, own = (getattr(flow_map, call)(*args, c) for c in (null, cond))
                torch.testing.assert_close(getattr(guided, call)(*args, cond), base + omega * (own - base))
                assert torch.equal((own == base).all(1), labels == NULL_LABEL)


def test_a_strength_of_one_is_no_guidance() -> None:
    flow_map, x = exact_map(Linear(), 3), marginal(Linear(), 3)
    cond, t, s = Condition(torch.arange(3)), at(0.7, x), at(0.1, x)
    guided = ClassifierFreeGuidance(flow_map, 1.0)
    torch.testing.assert_close(guided.jump(x, t, s, cond), flow_map.jump(x, t, s, cond))
    torch.testing.assert_close(guided.velocity(x, t, cond), flow_map.velocity(x, t, cond))
    unlabelled = guided.jump(x, t, s, Condition())
    torch.testing.assert_close(unlabelled, flow_map.jump(x, t, s))


@every_path
@pytest.mark.parametrize("grid", [uniform_grid, edm_grid])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_grids_walk_the_whole_range(path: Path, grid: Any, steps: int) -> None:
    times = grid(path, steps)
    assert (len(times), float(times[0]), float(times[-1])) == (steps + 1, path.t_max, path.t_min)
    assert torch.equal(check_grid(path, times), times)


def test_the_grid_of_edm_is_the_published_one() -> None:
    i, rho = torch.arange(18, dtype=F64), 7
    published = (80 ** (1 / rho) + i / 17 * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    torch.testing.assert_close(edm_grid(EDM(), 17), published)


def test_samples_can_be_used_in_training_and_dropout_is_off() -> None:
    network = UNetConfig(width=8, multipliers=(1,), blocks=1, attention=(), embedding_width=16, dropout=0.5)
    flow_map = FlowMap(Linear(), LinearPreconditioning(), network.build((1, 4, 4), 0, False))
    with torch.no_grad():
        for parameter in flow_map.parameters():
            parameter.add_(0.1)
    first, second = (generate(flow_map, 3, SamplingSettings()).samples for _ in range(2))
    assert torch.equal(first, second)
    assert flow_map.training
    weight = torch.ones((), requires_grad=True)
    (first * weight).sum().backward()
    assert float(weight.grad) == pytest.approx(float(first.sum()))  # type: ignore[arg-type]
