"""Statistics of trajectories against closed forms, with the errors that they state for themselves."""

import json
import math
import warnings
from dataclasses import fields, replace
from functools import cache
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.flow.closed_form import MixtureData
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import EDM, Linear, Path
from fewstep.flow.preconditioning.estimation import (
    EstimationSettings,
    StatisticsEstimator,
    estimate_statistics,
    noise_grid,
)
from fewstep.flow.preconditioning.interpolation import HermiteCurve, slopes
from fewstep.flow.preconditioning.jumps import EulerPreconditioning, LinearPreconditioning
from fewstep.flow.preconditioning.network_scaling import EDMScaling
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.utils.errors import CheckpointError, ConfigError, FewstepError, FewstepWarning, ShapeError
from fewstep.utils.serialization import to_json
from tests.support.cases import F64, PATHS, SD, clock, close, gaussian, noise, random_network

DIMENSION, POINTS = 16, 40
WIDE = torch.linspace(0.4, 1.6, DIMENSION, dtype=F64)


@cache
def mixture() -> MixtureData:
    """Six components of different widths, with more variance in some directions than in others, of mean zero."""
    generator = torch.Generator().manual_seed(0)
    half = 0.6 * WIDE * torch.randn(3, DIMENSION, dtype=F64, generator=generator)
    weights = torch.tensor([0.2, 0.2, 0.1, 0.2, 0.2, 0.1], dtype=F64)
    sds = torch.tensor([0.3, 0.2, 0.4, 0.3, 0.2, 0.4], dtype=F64)
    return MixtureData(weights, torch.cat([half, -half]), sds)


@cache
def rows(count: int = 4096, seed: int = 0) -> Tensor:
    u = torch.rand(count, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return mixture().sample(u, noise(count, DIMENSION, seed=seed + 1))


def denoise(x: Tensor, t: Tensor) -> Tensor:
    return mixture().denoise(EDM(), x, t)


ZERO = torch.zeros(DIMENSION, dtype=F64)


@cache
def estimate(
    seed: int = 0, samples: int = 512, probes: int | None = None, shrink: bool = False
) -> TrajectoryStatistics:
    """With the exact mean, so that the denoiser is exact for the data's law."""
    return estimate_statistics(
        denoise,
        rows(seed=seed),
        EDM(),
        EstimationSettings(points=POINTS, samples=samples, seed=seed, probes=probes, batch_size=2048, shrink=shrink),
        mean=ZERO,
    )


def agree(one: Tensor, other: Tensor, *errors: Tensor, slack: float = 1e-9) -> None:
    """Differences in units of the stated error: their mean square is near 1, and none is absurd."""
    score = (one - other).abs() / torch.sqrt(sum(error.square() for error in errors) + slack**2)
    assert float(score.max()) < 5
    assert float(score.square().mean()) < 3.5


def test_the_curve_is_exact_for_parabolas_and_integrates_exactly() -> None:
    knots = torch.linspace(-1, 2, 7, dtype=F64)
    curve = HermiteCurve.through(0.3 - knots + 2 * knots**2, -1.0, 0.5)
    points = torch.linspace(-1, 2, 50, dtype=F64)
    place = curve.locate(points)
    close(curve.value(place), 0.3 - points + 2 * points**2)
    antiderivative = 0.3 * points - points**2 / 2 + 2 * points**3 / 3
    close(curve.integral(place), antiderivative - antiderivative[0])
    close(slopes(0.3 - knots + 2 * knots**2, 0.5), -1 + 4 * knots)


def test_a_flow_map_is_a_denoiser() -> None:
    flow_map = gaussian(0.0, SD).flow_map(Linear(), LinearPreconditioning())
    x0 = SD * noise(64, 4)
    found, wanted = (
        estimate_statistics(each, x0, Linear(), EstimationSettings(points=8, samples=32))
        for each in (flow_map, flow_map.denoise)
    )
    assert torch.equal(found.l, wanted.l)
    assert torch.equal(found.s, wanted.s)


@pytest.mark.parametrize("path_name", PATHS)
@pytest.mark.parametrize("probes", [None, 1, 0])
def test_gaussian_data_have_their_closed_form(path_name: str, probes: int | None) -> None:
    """l = sd^2/(sd^2 + t^2) by every trace; about the mean no residual is left, and s is 0 by definition."""
    path, data = PATHS[path_name], gaussian(0.4, SD)
    found = estimate_statistics(
        lambda x, t: data.denoise(path, x, t),
        0.4 + SD * noise(500, 3),
        path,
        EstimationSettings(points=30, samples=64, probes=probes, shrink=False),
        mean=torch.full((3,), 0.4, dtype=F64),
    )
    close(found.l, SD**2 / (SD**2 + found.tau**2), rtol=1e-6)
    close(found.s, torch.zeros_like(found.s))
    assert float(found.l_stderr.max()) < 1e-6
    assert found.limit == 1


def test_off_centre_gaussian_data_have_theirs() -> None:
    """Raw data: r = (1 - l) m, so s = -l'/(1 - l) and tends to 0 at high noise."""
    data = gaussian(0.4, SD)
    found = estimate_statistics(
        lambda x, t: data.denoise(EDM(), x, t),
        0.4 + SD * noise(500, 3),
        settings=EstimationSettings(points=100, samples=4, centred=False),
    )
    assert found.limit == 0
    assert found.origin is None
    close(found.s, -2 * found.l, rtol=2e-3, atol=2e-3)


def test_s_is_half_the_rate_at_which_the_residual_grows() -> None:
    """The flow keeps the marginals, so E<r, dr/dlambda> = d/dlambda E|r|^2 / 2: s without any derivative of D.

    Shown for l = 0, where r = D - m, by a direct average over samples.
    """
    found = estimate_statistics(
        denoise,
        rows(),
        EDM(),
        EstimationSettings(points=100, samples=2048, probes=0, shrink=False, batch_size=2048),
        mean=ZERO,
    )
    inside = slice(0, 80)  # the parts of l = 0 that change over the grid's cells by little
    x0, eps = rows()[:2048], noise(2048, DIMENSION, seed=9)
    square = [denoise(x0 + tau * eps, tau.expand(2048)).square().mean() for tau in found.tau]
    rate = slopes(torch.log(torch.stack(square)), float(found.lam[1] - found.lam[0])) / 2
    close(rate[inside], found.s_without_l[inside], rtol=0.05, atol=0.03)


def test_seeds_agree_within_the_errors_they_state() -> None:
    one, other = estimate(0), estimate(1)
    agree(one.l, other.l, one.l_stderr, other.l_stderr)
    agree(one.s, other.s, one.s_stderr, other.s_stderr)
    agree(one.s_without_l, other.s_without_l, one.s_without_l_stderr, other.s_without_l_stderr)
    assert 0.0001 < float(one.l_stderr.max()) < 0.02
    assert 0.001 < float(one.s_stderr.max()) < 0.1


def test_errors_fall_with_the_root_of_the_samples() -> None:
    few, many = estimate(2, 512, 0), estimate(2, 4096, 0)
    ratio = few.l_stderr.log().mean() - many.l_stderr.log().mean()
    assert float(ratio) == pytest.approx(0.5 * math.log(8), abs=0.35)


@pytest.mark.parametrize("probes", [1, 4, 0])
def test_probes_and_steins_identity_agree_with_the_exact_trace(probes: int) -> None:
    exact, other = estimate(0), estimate(0, probes=probes)
    agree(exact.l, other.l, other.l_stderr, slack=1e-6)
    known = exact.tau > (0.2 if probes == 0 else 0)  # below, the error of Stein's l is as large as 1 - l
    agree(exact.s[known], other.s[known], exact.s_stderr[known], other.s_stderr[known], slack=1e-3)


def test_every_path_sees_the_same_statistics() -> None:
    """The same law through the linear path's coordinates and clock."""
    linear = estimate_statistics(
        lambda x, t: mixture().denoise(Linear(), x, t),
        rows(),
        Linear(),
        EstimationSettings(points=POINTS, samples=256, probes=1, shrink=False),
        mean=ZERO,
    )
    edm = estimate_statistics(
        denoise, rows(), EDM(), EstimationSettings(points=POINTS, samples=256, probes=1, shrink=False), mean=ZERO
    )
    close(linear.lam, edm.lam)
    close(linear.l, edm.l, rtol=1e-7)
    close(linear.s, edm.s, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("path", "high"), [(EDM(), 80.0), (Linear(), 80.0), (EDM(0.01, 50.0), 50.0)])
def test_the_grid_covers_the_path_within_edms_range(path: Path, high: float) -> None:
    lam = noise_grid(path, 9)
    close(torch.exp(-lam[[0, -1]]), torch.tensor([high, max(path.t_min, 0.002)], dtype=F64))


def test_an_interrupted_and_a_shared_estimation_equal_one_pass() -> None:
    def fresh() -> StatisticsEstimator:
        return StatisticsEstimator(denoise, rows(), EDM(), EstimationSettings(points=12, samples=100, probes=1))

    whole, stopped, resumed, other = (fresh() for _ in range(4))
    whole.update(0, 100)
    stopped.update(0, 37)
    resumed.restore(stopped.state())
    assert resumed.seen == 37
    resumed.update(37, 33)
    other.update(70, 30)
    resumed.restore({"sums": resumed.sums + other.sums})
    assert (whole.seen, resumed.seen) == (100, 100)
    for one, two in zip(vars_of(whole.statistics()), vars_of(resumed.statistics()), strict=True):
        close(one, two, rtol=1e-8, atol=1e-9)
    with pytest.raises(ConfigError, match="other settings"):
        StatisticsEstimator(denoise, rows(), EDM(), EstimationSettings(points=13, samples=100)).restore(stopped.state())


def vars_of(found: TrajectoryStatistics) -> list[Tensor]:
    return [value for field in fields(found) if isinstance(value := getattr(found, field.name), Tensor)]


def test_data_come_as_a_tensor_or_as_a_function_of_the_samples_number() -> None:
    order: list[Tensor] = []
    recorder = StatisticsEstimator(denoise, rows(100), EDM(), EstimationSettings(points=3, samples=50))
    numbers = torch.arange(50)
    table = recorder._rows(numbers)

    def by_number(asked: Tensor) -> Tensor:
        order.append(asked)
        return table[asked]

    progress: list[tuple[int, int]] = []
    settings = EstimationSettings(points=5, samples=50, probes=0, shrink=False)
    one = estimate_statistics(denoise, rows(100), settings=settings, mean=ZERO)
    other = estimate_statistics(
        denoise,
        by_number,
        settings=replace(settings, batch_size=20),
        mean=ZERO,
        progress=lambda *now: progress.append(now),
    )
    close(one.l, other.l)
    assert progress == [(20, 50), (40, 50), (50, 50)]
    assert len({tuple(row) for row in table.tolist()}) == 50


def test_a_network_in_single_precision_and_image_shape() -> None:
    path = PATHS["edm"]
    network = random_network((1, 2, 3)).float()
    flow_map = FlowMap(path, EulerPreconditioning(path), network, EDMScaling(SD, path))
    x0 = noise(64, 1, 2, 3).float()
    found = estimate_statistics(flow_map.denoise, x0, path, EstimationSettings(points=6, samples=64))
    double = FlowMap(path, EulerPreconditioning(path), random_network((1, 2, 3)), EDMScaling(SD, path))
    expected = estimate_statistics(double.denoise, x0.double(), path, EstimationSettings(points=6, samples=64))
    assert found.mean.shape == (1, 2, 3)
    close(found.l, expected.l, rtol=1e-3, atol=1e-4)
    close(found.s[:4], expected.s[:4], rtol=2e-2, atol=2e-2)


def test_shrinking_moves_nothing_beyond_its_error_where_the_denoiser_is_exact() -> None:
    for seed in (0, 1):
        raw, shrunk = estimate(seed), estimate(seed).shrunk()
        high = raw.tau > 5 * raw.sigma_data
        assert torch.equal(raw.s[~high], shrunk.s[~high])
        assert bool(((shrunk.s - raw.s).abs() <= 2 * raw.s_stderr + 1e-9).all())
        assert bool(((shrunk.l - raw.l).abs() <= raw.l_stderr + 1e-12).all())
        assert shrunk.shrunk() is shrunk
    assert estimate(0, probes=0, shrink=True) == estimate(0, probes=0).shrunk()


def test_a_teachers_own_error_at_high_noise_is_taken_out() -> None:
    """A small spurious function of x/t: raw s strays far from its limit, shrunk s comes back to it."""
    projection = noise(DIMENSION, DIMENSION, seed=4) / 4

    def polluted(x: Tensor, t: Tensor) -> Tensor:
        return denoise(x, t) + 0.08 * torch.sin((x / t[:, None]) @ projection)

    raw = estimate_statistics(
        polluted,
        rows(),
        EDM(),
        EstimationSettings(points=POINTS, samples=1024, probes=0, batch_size=1024, shrink=False),
        mean=ZERO,
    )
    high = raw.tau > 12
    shrunk = raw.shrunk()
    assert float((raw.s[high] - 1).abs().max()) > 0.7
    assert float((shrunk.s[high] - 1).abs().max()) < 0.12
    assert float((shrunk.s_without_l[high] - 1).abs().max()) < 0.12
    assert torch.equal(shrunk.s[raw.tau < 2], raw.s[raw.tau < 2])


def test_ablations_carry_the_s_that_belongs_to_their_l() -> None:
    found = estimate(0)
    assert not bool(found.without("l").l.any())
    assert torch.equal(found.without("l").s, found.s_without_l)
    assert torch.equal(found.without("s").l, found.l)
    nothing = found.without("s").without("l")
    assert not bool(nothing.l.any())
    assert not bool(nothing.s.any())
    with pytest.raises(ConfigError, match="'m'"):
        found.without("m")  # type: ignore[arg-type]


def test_a_stored_file_is_the_same_statistics(tmp_path: FilePath) -> None:
    found, file = estimate(0), tmp_path / "here" / "statistics.json"
    found.save(file)
    loaded = TrajectoryStatistics.load(file)
    assert loaded == found
    assert hash(loaded) == hash(found)
    assert loaded.seconds == found.seconds
    assert loaded != replace(found, s=found.s + 1e-12)
    assert found != 3


ONE = {"dtype": "float64", "shape": [1], "values": [0.5]}


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ('{"l": [1', "is damaged .*estimate it anew"),
        ("[]", "object"),
        ("{}", "missing key"),
        ({"colour": 1}, "colour"),
        ({"l": ONE}, "l must be"),
        ({"l": {**ONE, "shape": [40]}}, "values"),
        ({"l": {**ONE, "values": [math.nan]}}, "finite"),
        ({"lam": {"dtype": "float64", "shape": [3], "values": [0, 1, 3]}}, "must"),
        ({"l": [0.5]}, "l must be"),
        ({"samples": "many"}, "samples"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: FilePath, damage: str | dict[str, Any], named: str) -> None:
    file, stored = tmp_path / "statistics.json", to_json(estimate(0))
    file.write_text(damage if isinstance(damage, str) else json.dumps({**stored, **damage}))  # type: ignore[dict-item]
    with pytest.raises((CheckpointError, ConfigError), match=named) as caught:
        TrajectoryStatistics.load(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no such file"):
        TrajectoryStatistics.load(tmp_path / "absent.json")


def untangible(x: Tensor, t: Tensor) -> Tensor:
    """The denoiser by way of NumPy, which no tangent passes."""
    return torch.from_numpy(denoise(x, t).numpy())


def test_differences_stand_in_for_forward_mode() -> None:
    """By the probe with a warning, or as asked without one; both as near to the exact derivative as their step."""
    settings = EstimationSettings(points=POINTS, samples=64, batch_size=2048, shrink=False)
    exact = estimate_statistics(denoise, rows(), settings=replace(settings, derivative="exact"), mean=ZERO)
    with pytest.warns(FewstepWarning):
        probed = estimate_statistics(untangible, rows(), settings=settings, mean=ZERO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        differences = replace(settings, derivative="finite-difference")
        asked = estimate_statistics(untangible, rows(), settings=differences, mean=ZERO)
    assert [found.derivative for found in (exact, probed, asked)] == ["exact", *["finite-difference"] * 2]
    for found in (probed, asked):
        close(found.l, exact.l, atol=1e-3)
        close(found.s, exact.s, atol=1e-2)


@pytest.mark.parametrize(
    ("error", "settings"),
    [
        (ConfigError, {"points": 2}),
        (ConfigError, {"samples": 1}),
        (ConfigError, {"probes": -1}),
        (ConfigError, {"batch_size": 0}),
        (ConfigError, {"derivative": "forward"}),
        (ConfigError, {"data": torch.ones(5, 3)}),
        (ConfigError, {"denoiser": lambda x, t: x / 0}),
        (ShapeError, {"data": torch.ones(5, 3, dtype=torch.int64)}),
        (ShapeError, {"data": torch.ones(0, 3)}),
        (ShapeError, {"mean": torch.zeros(3)}),
    ],
)
def test_what_cannot_be_estimated_is_refused(error: type[FewstepError], settings: dict[str, Any]) -> None:
    names = {field.name for field in fields(EstimationSettings)}
    others = {"denoiser": denoise, "data": rows()} | {k: v for k, v in settings.items() if k not in names}
    own = {"samples": 8, "points": 3} | {k: v for k, v in settings.items() if k in names}
    with pytest.raises(error):
        estimate_statistics(settings=EstimationSettings(**own), **others)


def test_uneven_or_broken_tables_are_refused() -> None:
    found = estimate(0)
    (t,) = clock(EDM(), 0.5)
    for change in (
        {"lam": found.lam.exp()},
        {"s": found.s[:3]},
        {"l": found.l.float()},
        {"sigma_data": 0.0},
        {"mean": t / 0},
    ):
        with pytest.raises(ConfigError, match="trajectory statistics"):
            replace(found, **change)
