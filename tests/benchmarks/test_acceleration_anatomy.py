"""The interventions of benchmarks/acceleration/anatomy.py change the one thing that they say they change."""

import torch
from torch import Tensor

from benchmarks.acceleration import anatomy
from fewstep.flow.closed_form import GaussianData
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import EDM
from fewstep.flow.preconditioning.analytic import AnalyticPreconditioning
from fewstep.flow.preconditioning.base import Preconditioning
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.objectives import ALONE, Batch, Losses
from fewstep.utils.random import Draws

F64 = torch.float64
T, S = torch.tensor([80.0, 5.0, 0.4], dtype=F64), torch.tensor([0.9, 0.9, 0.4], dtype=F64)


def computed() -> AnalyticPreconditioning:
    lam = torch.linspace(-4.4, 6.2, 60, dtype=F64)
    l = torch.sigmoid(2 * lam)  # noqa: E741  (math.md §3.1)
    return AnalyticPreconditioning(TrajectoryStatistics.closed_form(lam, l, 1 - 3 * l, torch.ones(2, dtype=F64), 0.5))


def flow_map(preconditioning: Preconditioning) -> FlowMap:
    return GaussianData(torch.ones(2, dtype=F64), 0.5).flow_map(EDM(), preconditioning)


def test_exchanged_jumps_have_eulers_g_and_nothing_else_of_eulers() -> None:
    found = anatomy.Exchanged(computed())
    f, g = found.coefficients(T, S)
    assert torch.equal(f, computed().coefficients(T, S)[0])
    assert torch.equal(g, EulerPreconditioning().coefficients(T, S)[1])
    assert (float(f[2]), float(g[2])) == (1.0, 0.0)
    assert torch.equal(found.diagonal(T)[0], EulerPreconditioning().diagonal(T)[0])
    x = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    exact = GaussianData(torch.ones(2, dtype=F64), 0.5).jump(EDM(), x, T, S)
    torch.testing.assert_close(flow_map(found).jump(x, T, S), exact)


def test_reweighting_makes_an_error_of_the_network_weigh_as_with_euler() -> None:
    """(g dN)^2 of the computed form, reweighted, is that of Euler's; other terms stay."""
    change = 0.3

    def objective(model: FlowMap, batch: Batch, companions: object) -> Losses:
        error: Tensor = (model.preconditioning.coefficients(T[:2], S[:2])[1] * change).square()
        terms = {"consistency": error, "denoising": torch.ones(2, dtype=F64)}
        return Losses(sum(terms.values(), torch.zeros(2, dtype=F64)), T[:2], S[:2], terms=terms)

    batch = Batch(torch.zeros(2, 2), None, Draws(0, 0, torch.arange(2)))
    plain, euler = (objective(flow_map(each), batch, ALONE) for each in (computed(), EulerPreconditioning()))
    found = anatomy.reweighted(objective, flow_map(computed()), batch, ALONE)
    assert float((plain.loss - euler.loss).abs().min()) > 0.01
    torch.testing.assert_close(found.loss, euler.loss)
    torch.testing.assert_close(found.terms["denoising"], plain.terms["denoising"])
