"""The consistency gap: its definition, and how much smaller analytic preconditioning makes it."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from fewstep.flow.closed_form import MixtureData, toy_mixture
from fewstep.flow.paths import EDM, Path
from fewstep.flow.preconditioning.analytic import AnalyticPreconditioning
from fewstep.flow.preconditioning.base import Preconditioning
from fewstep.flow.preconditioning.estimation import STREAM_NOISE, EstimationSettings, estimate_statistics
from fewstep.flow.preconditioning.gap import GapSettings, consistency_gap
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.utils.errors import ConfigError, ShapeError
from fewstep.utils.random import Draws
from tests.support.cases import F64, PATHS, clock, close, mixture, noise

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def draw(data: MixtureData, count: int) -> Tensor:
    u = torch.rand(count, dtype=F64, generator=torch.Generator().manual_seed(5))
    return data.sample(u, noise(count, data.means.shape[1], seed=6))


def denoiser(data: MixtureData, path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: data.denoise(path, x, t)


@pytest.fixture(scope="module")
def statistics() -> TrajectoryStatistics:
    data = mixture()
    mean = data.weights @ data.means
    return estimate_statistics(
        denoiser(data, EDM()),
        draw(data, 4096),
        settings=EstimationSettings(points=60, samples=2048, batch_size=2048),
        mean=mean,
    )


def rms(
    preconditioning: Preconditioning, tau: list[list[float]], path: Path = EDM(), end: Literal["t", "s"] | None = None
) -> Tensor:
    data = mixture()
    t, s = (path.time_from_tau(each) for each in torch.tensor(tau, dtype=F64).T)
    return consistency_gap(
        preconditioning,
        denoiser(data, path),
        draw(data, 256),
        t,
        s,
        path=path,
        settings=GapSettings(solver_steps=64, end=end),
    ).rms


def test_the_backward_form_has_a_fraction_of_eulers_gap(statistics: TrajectoryStatistics) -> None:
    jumps = [[80.0, 12.9], [80.0, 1.9], [12.9, 0.6]]
    analytic, euler = AnalyticPreconditioning(statistics), EulerPreconditioning()
    ratio = rms(analytic, jumps) / rms(euler, jumps, end="s")
    assert float(ratio.max()) < 0.6
    assert float((rms(analytic, jumps) / rms(euler, jumps)).max()) < 0.4
    assert float((rms(AnalyticPreconditioning(statistics, "forward"), jumps) / rms(euler, jumps)).max()) < 0.4


def test_on_the_mixture_in_16_dimensions_the_gap_is_smaller_for_every_jump_that_stops_between() -> None:
    """A fraction of Euler's from the noise end; between 1.9 and 0.59, where the posterior decides, hardly less."""
    data, path = toy_mixture(), EDM()
    mean = data.weights @ data.means
    found = estimate_statistics(
        denoiser(data, path), draw(data, 1024), settings=EstimationSettings(samples=256, probes=1), mean=mean
    )
    t, s = torch.tensor([[80.0, 12.9], [80.0, 1.9], [12.9, 1.9], [12.9, 0.59], [1.9, 0.59]], dtype=F64).T

    def gaps(preconditioning: Preconditioning, end: Literal["t", "s"] | None = None) -> Tensor:
        own = denoiser(data, path)
        return consistency_gap(
            preconditioning, own, draw(data, 256), t, s, settings=GapSettings(solver_steps=32, end=end)
        ).rms

    euler = torch.minimum(gaps(EulerPreconditioning(), "t"), gaps(EulerPreconditioning(), "s"))
    ratio = gaps(AnalyticPreconditioning(found)) / euler
    assert bool((ratio < torch.tensor([0.25, 0.5, 0.5, 0.8, 1.0], dtype=F64)).all())


def test_jumps_to_data_leave_either_form_nothing_to_gain(statistics: TrajectoryStatistics) -> None:
    to_data = [[80.0, 0.002], [2.0, 0.002]]
    assert float(rms(AnalyticPreconditioning(statistics), to_data).max()) < 5e-3
    assert float(rms(EulerPreconditioning(), to_data, end="s").max()) < 5e-3


def test_the_forward_form_multiplies_the_networks_error(statistics: TrajectoryStatistics) -> None:
    t, s = torch.tensor([80.0], dtype=F64), torch.tensor([0.002], dtype=F64)
    assert float(AnalyticPreconditioning(statistics, "forward").coefficients(t, s)[1]) > 20
    assert float(AnalyticPreconditioning(statistics).coefficients(t, s)[1]) < 1.01


@every_path
def test_the_gap_is_the_same_on_every_path(path: Path, statistics: TrajectoryStatistics) -> None:
    """N* is a denoiser's kind of quantity: it does not change with the coordinates."""
    jumps = [[40.0, 2.0], [2.0, 0.1]]
    expected = rms(AnalyticPreconditioning(statistics), jumps)
    close(rms(AnalyticPreconditioning(statistics, path=path), jumps, path), expected, rtol=1e-6)


def test_it_is_the_distance_between_the_best_network_and_the_denoiser() -> None:
    """Against the oracle's own solution, sample by sample."""
    data, path = mixture(), EDM()
    s, t = (time.repeat(2) for time in clock(path, 0.5, 0.7))
    x0 = draw(data, 2)
    gap = consistency_gap(
        EulerPreconditioning(), denoiser(data, path), x0, t[:1], s[:1], settings=GapSettings(samples=2, end="s", seed=3)
    )
    x = path.interpolate(x0, Draws(3, 0, torch.arange(2)).normal(STREAM_NOISE, (2,), F64), t)
    landed, f = data.jump(path, x, t, s), (s / t)[:, None]
    square = ((landed - f * x) / (1 - f) - data.denoise(path, landed, s)).square().mean(1)
    close(gap.rms, square.mean().sqrt()[None], rtol=1e-6)
    close(gap.stderr, (square.std() / 2**0.5 / 2 / square.mean().sqrt())[None], rtol=1e-5)


def test_a_gap_is_of_all_data_however_they_are_sorted() -> None:
    """Sorted by a component, as by a class, the first rows alone have a gap far from that of the whole."""
    data, t, s = mixture(), 2.0, 0.1
    x0 = draw(data, 512)
    x0 = x0[x0[:, 1].argsort()]

    def gap(x0: Tensor, samples: int, seed: int = 0) -> float:
        settings = GapSettings(samples=samples, seed=seed, solver_steps=8)
        return float(consistency_gap(EulerPreconditioning(), denoiser(data, EDM()), x0, t, s, settings=settings).rms)

    whole, part, first = gap(x0, 512), gap(x0, 128), gap(x0[:128], 128)
    assert abs(part - whole) < 0.3 * abs(first - whole)
    assert gap(x0, 128) == part != gap(x0, 128, seed=1)


def test_the_solver_is_of_order_four() -> None:
    found = []
    data, t, s = mixture(), torch.tensor([5.0], dtype=F64), torch.tensor([0.3], dtype=F64)
    for steps in (8, 16, 256):
        gap = consistency_gap(
            EulerPreconditioning(),
            denoiser(data, EDM()),
            draw(data, 64),
            t,
            s,
            settings=GapSettings(solver_steps=steps),
        )
        found.append(float(gap.rms))
    assert abs(found[0] - found[2]) > 8 * abs(found[1] - found[2])


def test_what_cannot_be_a_jump_is_refused() -> None:
    data, path = mixture(), PATHS["linear"]
    x0, one = draw(data, 4), torch.ones(1, dtype=F64)
    for t, s in ((one, 0.5 * one), (0.5 * one, 0 * one), (0.5 * one, 0.5 * one), (0.5 * one, torch.zeros(2))):
        with pytest.raises(ShapeError):
            consistency_gap(EulerPreconditioning(path), denoiser(data, path), x0, t, s, path=path)
    with pytest.raises(ConfigError, match="samples"):
        consistency_gap(
            EulerPreconditioning(), denoiser(data, EDM()), x0, one, 0.5 * one, settings=GapSettings(samples=1)
        )
    with pytest.raises(ShapeError, match="needs data"):
        consistency_gap(EulerPreconditioning(), denoiser(data, EDM()), x0[:0], one, 0.5 * one)


def test_times_may_be_numbers() -> None:
    data = mixture()
    x0, one = draw(data, 8), torch.ones(1, dtype=F64)
    found, wanted = (
        consistency_gap(
            EulerPreconditioning(), denoiser(data, EDM()), x0, t, s, settings=GapSettings(samples=8, solver_steps=8)
        )
        for t, s in ((1.0, 0.5), (one, 0.5 * one))
    )
    assert torch.equal(found.rms, wanted.rms)
