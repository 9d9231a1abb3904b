"""Statistics against an estimate of another kind, at every level of the default grid.

benchmarks/preconditioning is the heavy version: more samples and seeds. Here is what shows a bias in a few seconds.
"""

import json

import pytest
import torch
from torch import Tensor

from benchmarks.preconditioning.__main__ import CHECKED
from fewstep.flow.closed_form import toy_mixture
from fewstep.flow.paths import EDM
from fewstep.flow.preconditioning.estimation import EstimationSettings, estimate_statistics, noise_grid
from fewstep.flow.preconditioning.interpolation import derivative, slopes, widths
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.recipes.config import StatisticsConfig
from tests.support import statistics_reference as CHECK
from tests.support.cases import F64, SD, close, gaussian, noise

MIXTURE = toy_mixture()
LAM = noise_grid(EDM(), 120)
STEP = float(LAM[1] - LAM[0])


@pytest.fixture(scope="module")
def found() -> TrajectoryStatistics:
    ((rows, _),) = CHECK.portions(MIXTURE, 4096, seed=3)
    estimated: TrajectoryStatistics = CHECK.estimate(MIXTURE, rows, 256, 0, probes=2)
    return estimated


def test_both_estimates_agree_within_their_errors_at_all_noise(found: TrajectoryStatistics) -> None:
    chosen = torch.cat([torch.arange(0, 112, 8), torch.arange(114, 120)])
    truth = CHECK.reference(MIXTURE, found.lam[chosen], STEP / 10, CHECK.portions(MIXTURE, 16_384, seed=4))
    tables = ("l", "s", "l_stderr", "s_stderr")
    part = {name: getattr(found, name)[chosen] for name in tables}
    for name in ("l", "s"):
        score = (part[name] - getattr(truth, name)) / torch.hypot(
            part[f"{name}_stderr"], getattr(truth, f"{name}_stderr")
        )
        assert float(score.abs().max()) < 4
        assert float(score.square().mean()) < 4
    low = found.tau < 0.05
    assert float(found.s_stderr[low].max()) < 0.01


def test_the_references_trace_is_that_of_the_jacobian() -> None:
    """And its moments are those of the denoiser, at all noise."""
    ((x0, eps),) = CHECK.portions(MIXTURE, 32, seed=5)
    mean = MIXTURE.weights @ MIXTURE.means
    for tau in (80.0, 1.0, 0.1, 0.002):
        x, t = x0 + tau * eps, torch.full((1,), tau, dtype=F64)
        moments = CHECK.moments(MIXTURE, x, tau)
        denoised = MIXTURE.denoise(EDM(), x, t.expand(32))
        close(moments[1], (denoised - mean).square().mean(1), rtol=1e-9)
        close(moments[2], ((denoised - mean) * (x - mean)).mean(1), rtol=1e-9)
        jacobian = torch.func.jacrev(lambda y, t=t: MIXTURE.denoise(EDM(), y[None], t)[0])(x[0])
        close(moments[0, :1], jacobian.trace()[None] / 16, rtol=1e-8)


def sample_curve() -> tuple[Tensor, Tensor, Tensor]:
    """l, its derivative, and ds/dl', (points,), of 1,024 samples that every level shares."""
    draws = list(CHECK.portions(MIXTURE, 1024, seed=6))
    means = torch.stack(
        [
            torch.stack([CHECK.moments(MIXTURE, x0 + tau * eps, tau).mean(1) for tau in torch.exp(-level).tolist()])
            for x0, eps in draws
            for level in (LAM + j * STEP / 10 for j in (-2, -1, 0, 1, 2))
        ],
        dim=1,
    )
    l, dd, dc, cc = means[:, 2].unbind(-1)  # noqa: E741
    weights = means.new_tensor([1.0, -8.0, 0.0, 8.0, -1.0])
    exact = (means[..., 0] * weights).sum(1) / (12 * STEP / 10)
    return l, exact, (l * cc - dc) / (dd - 2 * l * dc + l * l * cc)


def test_differences_over_the_grid_move_s_by_less_than_4096_samples_do() -> None:
    """Beside the errors that the benchmark stored; differences over close neighbours exceed them."""
    l, exact, weight = sample_curve()  # noqa: E741
    stored = [row for row in json.loads(CHECKED.read_text()) if row["seed"] == 0]
    stated = torch.tensor([row["s_stderr"] for row in stored], dtype=F64)

    def moved(estimate: Tensor) -> Tensor:
        return (weight * (estimate - exact)).abs() / stated

    assert float(moved(derivative(l, STEP, widths(STEP)[0])).max()) < 0.7
    assert float(moved(slopes(l, STEP))[-8:].min()) > 4
    assert float(moved(slopes(l, STEP))[-1]) > 1000


@pytest.mark.parametrize("width", [2, 3, 5, 7, 9])
@pytest.mark.parametrize("points", [2, 4, 9, 30])
def test_differences_are_exact_for_polynomials(width: int, points: int) -> None:
    degree = min(width, points) - 1
    knots = torch.linspace(-1, 1, points, dtype=F64)
    values = torch.stack([knots**degree, 0.3 - knots])
    expected = torch.stack([degree * knots ** max(degree - 1, 0), -torch.ones(points, dtype=F64)])
    close(derivative(values, float(knots[1] - knots[0]), width), expected, rtol=1e-9, atol=1e-9)


def test_coarse_grids_have_narrow_stencils() -> None:
    assert [widths(step) for step in (0.05, 0.27, 0.4, 1.5)] == [(9, 8), (9, 8), (7, 6), (3, 2)]


def test_the_grids_step_is_part_of_the_error_of_s() -> None:
    """r = (1 - l) m of every sample, so that samples leave s no error: what is left is the grid's, and it is stated."""
    data = gaussian(0.4, SD)
    coarse = estimate_statistics(
        lambda x, t: data.denoise(EDM(), x, t),
        0.4 + SD * noise(64, 3),
        settings=EstimationSettings(points=30, samples=16, centred=False, shrink=False),
    )
    miss = (coarse.s + 2 * coarse.l).abs()
    assert float(miss.max()) > 1e-3
    within = miss <= coarse.s_stderr + 1e-6
    assert float(within.double().mean()) > 0.8  # two stencils may err alike where l bends back
    assert bool(within[-8:].all())


def test_the_defaults_are_those_of_the_command_line() -> None:
    given, own = StatisticsConfig(), EstimationSettings()
    for name in ("points", "samples", "seed", "probes", "centred", "shrink"):
        assert getattr(own, name) == getattr(given, name), name
