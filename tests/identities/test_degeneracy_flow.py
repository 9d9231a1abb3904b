"""explanation/why-an-anchor.md, integrated: where gradient descent ends from a departed start, anchored or not.

In the smallest family of maps of Proposition 4: theta and mu change the velocity, c and d depart from being a flow map.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support import gaussian_updates as G
from tests.support.cases import F64
from tests.support.degeneracy import SELF_DISTILLED
from tests.support.gaussian_updates import case

START = (0.4, 0.5, -0.3, 0.5)
"""theta, c, mu, d, all zero at the data's own map."""


def integrate(flow: Callable[[Tensor], Tensor], start: Tensor, growth: float, steps: int) -> tuple[Tensor, float]:
    """dp/dtau = flow(p) by the exponential Euler method of Rosenbrock's kind, order 2: the end, and its time.

    p <- p + h phi(h J) flow(p), phi(z) = (e^z - 1)/z, J the Jacobian at p: exact where the flow is linear, so that
    steps, 1/2 and growing, may be long as slow directions die out. h phi is a block of exp([[h J, h flow], [0, 0]]).
    """
    p, h, time, size = start, 0.5, 0.0, len(start)
    jacobian = torch.func.jacfwd(lambda p: (found := flow(p), found), has_aux=True)
    for _ in range(steps):
        slope, value = jacobian(p)
        block = torch.zeros(size + 1, size + 1, dtype=F64)
        block[:size, :size], block[:size, size] = h * slope, h * value
        p = p + torch.linalg.matrix_exp(block)[:size, size]
        time, h = time + h, h * growth
    return p, time


@functools.cache
def ending(name: str, weight: float, start: tuple[float, ...] = START) -> Tensor:
    """(theta, c, mu, d) where the update of an objective, and `weight` of the anchor's, comes to rest."""
    setting = case()
    family = G.Tangent(setting, G.exact(setting))

    def flow(p: Tensor) -> Tensor:
        found: Tensor = G.update(family, G.ERRORS[name], setting, p)
        return found + weight * G.update(family, G.anchor_error, setting, p) if weight else found

    return integrate(flow, torch.tensor(start, dtype=F64), 1.6, 18)[0]


def mean_squares(name: str, parameters: Tensor) -> tuple[float, float]:
    """E|error|^2 of an objective, and of the velocity against the data's."""
    setting = case()
    flow_map, at = G.Tangent(setting, G.exact(setting)).map(parameters), G.points(setting)
    found = (error(flow_map, flow_map, at, setting) for error in (G.ERRORS[name], G.anchor_error))
    distilled, anchor = (float((at.weight * each[:, 0].square()).sum()) for each in found)
    return distilled, anchor


every_objective = pytest.mark.parametrize("name", SELF_DISTILLED)


@every_objective
def test_without_the_anchor_descent_ends_consistent_and_wrong(name: str) -> None:
    """The residual falls to nothing and the velocity stays off the data's, at a mean square above a twentieth."""
    found = ending(name, 0.0)
    begun = mean_squares(name, torch.tensor(START, dtype=F64))
    distilled, anchor = mean_squares(name, found)
    assert min(begun) > 1e-3
    assert distilled < 1e-12
    assert anchor > 0.05
    assert float(found[[1, 3]].abs().max()) < 1e-5
    assert float(found[[0, 2]].abs().max()) > 0.2


@every_objective
def test_with_the_anchor_it_ends_at_the_datas_own_map(name: str) -> None:
    found = ending(name, 1.0)
    assert float(found.abs().max()) < 1e-8
    assert max(mean_squares(name, found)) < 1e-15


def test_meanflow_ends_there_with_none() -> None:
    """Its conditional velocity is the data's."""
    assert float(ending("MeanFlow", 0.0).abs().max()) < 1e-4


def test_another_start_ends_elsewhere_without_the_anchor_alone() -> None:
    other = (-0.5, 0.3, 0.6, -0.4)
    assert float((ending("iSD", 0.0) - ending("iSD", 0.0, other)).abs().max()) > 0.2
    assert float((ending("iSD", 1.0) - ending("iSD", 1.0, other)).abs().max()) < 1e-4


def test_the_integrator_follows_a_flow_in_closed_form() -> None:
    """One slope without an anchor: da/dtau = -P a^2, a = a0/(1 + P a0 tau)."""
    setting = case(0.5, 0.0)
    family, one = G.Shared(setting, G.contraction(0.0, 0.0), 1), G.OneSlope.of(setting)
    start = torch.tensor([0.8, 0.0], dtype=F64)
    found, time = integrate(lambda p: G.update(family, G.ERRORS["iSD"], setting, p), start, 1.2, 15)
    assert float(found[0]) == pytest.approx(0.8 / (1 + one.curvature * 0.8 * time), rel=1e-2)
    assert float(found[0]) < 0.5
