"""CM preconditioning at the oracle: the exact Gaussian map to the data end through c_skip and c_out, for CT and ECT."""

import pytest
import torch
from torch import Tensor

from fewstep.flow.closed_form import GaussianData
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import EDM
from fewstep.flow.preconditioning.jumps import CMPreconditioning
from fewstep.networks.condition import Condition
from fewstep.objectives import CT, ECT, Batch
from tests.support.batches import OneTime, draws
from tests.support.cases import SD, Callback, close, gaussian, noise, slope
from tests.support.gradients import expected_gradient
from tests.support.objectives import made

PATH, CM = EDM(), CMPreconditioning(SD)
OBJECTIVES = [made(CT, kind="l2", first=10, last=640, duration=600), made(ECT, kind="l2", stage_images=100)]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=["ct", "ect"])
every_stage = pytest.mark.parametrize("images", [0, 250, 700])


def cm_map(data: GaussianData) -> FlowMap:
    """The data's map to e = t_min in CM's form: N = (X - c_skip x)/c_out, both as the paper (2303.01469) writes them,

    c_skip = sd^2/((t - e)^2 + sd^2), c_out = sd (t - e)/sqrt(sd^2 + t^2); 0 at t = e, where there is no diagonal.
    """

    def output(x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        gap, time = (t - PATH.t_min)[:, None], t[:, None]
        c_skip, c_out = SD**2 / (gap**2 + SD**2), SD * gap / torch.sqrt(SD**2 + time**2)
        found = (data.jump(PATH, x, t, s) - c_skip * x) / torch.where(gap == 0, 1.0, c_out)
        return torch.where(gap == 0, 0.0, found)

    return FlowMap(PATH, CM, Callback(output))


def batch_of(data: GaussianData, images: int, count: int = 256) -> Batch:
    return Batch(data.mean + data.sd * noise(count, 3, seed=5), None, draws(count), images)


@every_stage
@every_objective
def test_neighbours_on_one_solution_end_at_one_point(objective: CT | ECT, images: int) -> None:
    """X(x_t, t, t_min) - X(x_u, u, t_min) is zero for x_u on the ODE through x_t, to 1e-8, at the objective's times."""
    data = gaussian()
    batch = batch_of(data, images)
    t, u = objective.neighbours(PATH, batch)
    s, x = torch.full_like(t, PATH.t_min), PATH.interpolate(batch.x0, batch.noise(), t)
    x_u = data.jump(PATH, x, t, u)

    def difference(flow_map: FlowMap) -> float:
        return float((flow_map.jump(x, t, s) - flow_map.jump(x_u, u, s)).abs().max())

    exact = cm_map(data)
    close(exact.jump(x, t, s), data.jump(PATH, x, t, s))
    assert difference(exact) < 1e-8
    for other in (gaussian(1.2), gaussian(sd=1.3)):
        assert difference(cm_map(other)) > 1e-3


@every_stage
@every_objective
def test_the_loss_is_zero_where_one_noise_is_one_solution(objective: CT | ECT, images: int) -> None:
    """Of data at a single point: x_t and x_u = m + u eps then lie on one straight line of the ODE.

    The residual is the loss's root times t - u; c_skip and c_out keep the width SD, which the data do not have.
    """
    point = gaussian(sd=0.0)
    losses = objective(cm_map(point), batch_of(point, images))
    assert float(losses.logs["consistency"].sqrt().max()) < 1e-8
    assert bool(losses.loss.isfinite().all())
    for other in (gaussian(1.2, 0.0), gaussian()):
        assert float(objective(cm_map(other), batch_of(point, images)).logs["consistency"].sqrt().max()) > 1e-3


def test_the_bias_of_adjacent_points_falls_with_their_distance() -> None:
    """As with preconditionings that have a diagonal: of order 1 in t - u at the data's map, and not at another's."""
    ct = made(CT, times=OneTime(0.8), first=50, last=400, duration=400, kind="l2")
    found = [bias(ct, images) for images in (0, 100, 200, 300)]
    assert slope([1 / 50, 1 / 100, 1 / 200, 1 / 400], found) == pytest.approx(1, abs=0.25)
    assert bias(ct, 300, shift=0.5) > 10 * found[-1]
    ect = made(ECT, times=OneTime(0.8), stage_images=1, kind="l2", stages=20)
    found = [bias(ect, stage) for stage in (4, 5, 6, 7)]
    assert slope([2.0**-stage for stage in (4, 5, 6, 7)], found) == pytest.approx(1, abs=0.25)
    assert bias(ect, 7, shift=0.5) > 10 * found[-1]


def bias(objective: CT | ECT, images: int, shift: float = 0.0) -> float:
    """Norm of the expected gradient at the exact map of CM's form; no point of these lies at t_min."""
    return expected_gradient(objective, PATH, CM, images, shift)
