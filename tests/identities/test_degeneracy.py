"""explanation/why-an-anchor.md: consistent maps of wrong velocities, their linearised updates, how much anchor."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import Linear
from fewstep.flow.preconditioning.jumps import LinearPreconditioning
from fewstep.networks.mlp import MLPConfig
from fewstep.objectives import ISD, Batch, MeanFlow, Objective, Shortcut, eulerian_residual
from fewstep.objectives.base import STREAM_NOISE, STREAM_S, STREAM_T
from fewstep.utils.forward_ad import jvp
from fewstep.utils.random import Draws
from tests.support import gaussian_updates as G
from tests.support.batches import draws
from tests.support.cases import F64, Callback, close, noise
from tests.support.degeneracy import SELF_DISTILLED, SETTINGS
from tests.support.gaussian_updates import case
from tests.support.objectives import made

OBJECTIVES = SELF_DISTILLED | {"MeanFlow": made(MeanFlow, **SETTINGS)}
SHORTCUT = Shortcut(steps=8, bootstrap=1.0, target_decay=None, label_dropout=0.0)


def zeros(family: Any) -> Tensor:
    return torch.zeros(family.size, dtype=F64)


FLOWS: dict[str, Callable[[Any], Any]] = {
    "exact": G.exact,
    "identity": lambda _: G.contraction(-1.0, 0.0),
    "collapsing": lambda _: G.contraction(-1.0, 9.0),
}


@functools.cache
def about(flow: str, path: str) -> Any:
    """A chart of 8 parameters about a flow, 4 of them the velocity's."""
    setting = case(path=path)
    return G.Tangent(setting, FLOWS[flow](setting), velocity=(1, 2), departures=(2, 3))


@functools.cache
def jacobian(flow: str, path: str, name: str) -> Tensor:
    """Of an objective's update, or of the anchor's, about a flow."""
    family = about(flow, path)
    return G.jacobian(family, G.anchor_error if name == "anchor" else G.ERRORS[name], family.case)


def distilled(objective: Objective, flow_map: FlowMap, x0: Tensor) -> Tensor:
    return objective(flow_map, Batch(x0, None, draws(len(x0)))).terms["distill"]


every_path = pytest.mark.parametrize("path", ["linear", "trig"])
every_objective = pytest.mark.parametrize("name", SELF_DISTILLED)
every_flow = pytest.mark.parametrize("flow", FLOWS)


@every_path
@every_objective
@settings(max_examples=5)
@given(theta=st.lists(st.floats(-2, 2), min_size=4, max_size=4), strength=st.floats(0, 20))
def test_the_flow_map_of_any_velocity_has_no_residual(
    path: str, name: str, theta: list[float], strength: float
) -> None:
    """Nor a gradient, on any data; the anchor has one."""
    setting = case(path=path)
    family = G.Tangent(setting, G.contraction(-1.0, strength), velocity=(1, 2), departures=(2, 3))
    velocity = torch.tensor([*theta[:2], 0, 0, *theta[2:], 0, 0], dtype=F64, requires_grad=True)
    flow_map = family.map(velocity)
    for x0 in (noise(32, 1), 3 + 5 * noise(32, 1, seed=1).square()):
        loss = distilled(SELF_DISTILLED[name], flow_map, x0)
        scale = 1 + float(flow_map.velocity(x0, torch.full((32,), 0.5, dtype=F64)).detach().square().mean())
        assert float(loss.detach().max()) < 1e-16 * scale
        assert float(torch.autograd.grad(loss.sum(), velocity)[0].norm()) < 1e-6 * scale
    anchor = made(ISD, **SETTINGS)(flow_map, Batch(4 + noise(256, 1), None, draws(256))).terms["anchor"].mean()
    assert float(torch.autograd.grad(anchor, velocity)[0].norm()) > 1e-2


@every_path
@every_objective
@pytest.mark.parametrize("parameter", [2, 3, 6, 7])
def test_a_map_that_is_no_flow_has_a_residual(path: str, name: str, parameter: int) -> None:
    family = about("exact", path)
    departed = zeros(family).index_fill(0, torch.tensor([parameter]), 0.3)
    assert float(distilled(SELF_DISTILLED[name], family.map(departed), noise(32, 1)).mean()) > 1e-5


@pytest.mark.parametrize("strength", [0.0, 1.0, 9.0, 1e3])
def test_a_straight_contraction_has_none_for_shortcuts_either(strength: float) -> None:
    """Euler's steps are exact on straight lines; N = k (x - c)/(1 + k t) knows no s. Samples collapse as k grows."""
    towards = torch.tensor([2.0, -1.0], dtype=F64)
    flow_map = FlowMap(
        Linear(),
        LinearPreconditioning(),
        Callback(lambda x, t, s, cond: strength * (x - towards) / (1 + strength * t[:, None])),
    )
    x0, ones = noise(64, 2), torch.ones(64, dtype=F64)
    for objective in (*SELF_DISTILLED.values(), SHORTCUT):
        assert float(distilled(objective, flow_map, x0).max()) < 1e-20 * (1 + strength) ** 4
    samples = flow_map.jump(x0, ones, 0 * ones)
    close(samples, towards + (x0 - towards) / (1 + strength))


@every_objective
def test_a_network_that_starts_at_zero_stays_there(name: str) -> None:
    """The identity: not a small gradient but none, in any parameter."""
    network = MLPConfig(width=8, depth=1, embedding_width=8).build((2,), 0, False).double()
    flow_map = FlowMap(Linear(), LinearPreconditioning(), network)
    distilled(SELF_DISTILLED[name], flow_map, noise(16, 2)).sum().backward()
    assert not any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in network.parameters())


@every_path
def test_a_constant_has_none_but_needs_a_network_without_bound(path: str) -> None:
    """For any velocity that drives the tangent, the conditional one of MeanFlow too; LSD asks that it rest there."""
    setting, towards = case(path=path), 2.0

    def output(x: Tensor, t: Tensor, s: Tensor, cond: object) -> Tensor:
        return G.network_output(setting, x, torch.full_like(x, towards), 3 * (x - towards), t, s)

    flow_map, x0 = FlowMap(setting.path, setting.preconditioning, Callback(output)), noise(64, 1)
    for objective in OBJECTIVES.values():
        assert float(distilled(objective, flow_map, x0).max()) < 1e-16
    t = torch.full((64,), 0.5, dtype=F64)
    sizes = [float(flow_map.output(x0, t, t - gap).abs().max()) for gap in (1e-1, 1e-2, 1e-3)]
    assert sizes[1] / sizes[0] == pytest.approx(10, rel=0.2)
    assert sizes[2] / sizes[1] == pytest.approx(10, rel=0.2)


@dataclass(frozen=True)
class Nodes(Draws):
    """Draws that are the nodes of a quadrature."""

    values: dict[int, Tensor]

    def uniform(self, stream: int, shape: tuple[int, ...] = (), dtype: torch.dtype = F64) -> Tensor:
        return self.values[stream][self.indices]

    normal = uniform


def quadrature(setting: Any) -> tuple[Batch, Tensor]:
    """x0 and eps at two nodes each and the benchmark's times, as a batch, with weights."""
    at = G.points(setting)
    t, s, weight = (v[::2].repeat_interleave(4) for v in (at.t, at.s, 2 * at.weight))
    count = len(t)
    data, eps = (
        torch.tensor(signs, dtype=F64).repeat(count // 4)[:, None] for signs in ([1, 1, -1, -1], [1, -1, 1, -1])
    )
    values = {STREAM_T: t / setting.path.t_max, STREAM_S: s / setting.path.t_max, STREAM_NOISE: eps}
    x0 = setting.data.mean + setting.data.sd * data
    return Batch(x0, None, Nodes(0, 0, torch.arange(count), values)), weight / 4


@every_path
@pytest.mark.parametrize("name", [*OBJECTIVES, "anchor"])
def test_the_update_is_the_expected_gradient_of_the_librarys_objective(path: str, name: str) -> None:
    family = about("exact", path)
    batch, weight = quadrature(family.case)
    parameters = (0.3 * noise(family.size, seed=3)).requires_grad_()
    objective, term = (OBJECTIVES["iSD"], "anchor") if name == "anchor" else (OBJECTIVES[name], "distill")
    loss = (weight * objective(family.map(parameters), batch).terms[term]).sum() / 2
    (expected,) = torch.autograd.grad(-loss, parameters)
    error = G.anchor_error if name == "anchor" else G.ERRORS[name]
    found = G.update(family, error, family.case, parameters.detach())
    close(found, expected, rtol=1e-9, atol=1e-11)
    assert float(found.norm()) > 1e-3


@every_path
@every_flow
@every_objective
def test_without_the_anchor_flow_maps_of_all_velocities_are_fixed_points(path: str, name: str, flow: str) -> None:
    family = about(flow, path)
    assert float(G.update(family, G.ERRORS[name], family.case, zeros(family)).abs().max()) < 1e-10


@every_path
@pytest.mark.parametrize("flow", ["identity", "collapsing"])
def test_with_the_anchor_only_the_datas_is(path: str, flow: str) -> None:
    """As for MeanFlow, whose conditional velocity is its anchor."""
    right, wrong = about("exact", path), about(flow, path)
    for error in (G.anchor_error, G.ERRORS["MeanFlow"]):
        assert float(G.update(right, error, right.case, zeros(right)).abs().max()) < 1e-10
        assert float(G.update(wrong, error, wrong.case, zeros(wrong)).norm()) > 1


def parts(family: Any) -> tuple[Tensor, Tensor]:
    """(G, A): Gram matrices of N for pairs of times and of N on the diagonal."""
    at = G.points(family.case)
    off, on = (G.features(family, at, diagonal) for diagonal in (False, True))
    return G.gram(off, at.weight), G.gram(on, at.weight)


@every_path
@every_flow
def test_the_jacobians_are_what_the_page_derives(path: str, flow: str) -> None:
    """-G K for iSD, -K G K for ESD; on the linear path -G (1 - 2^(1-k)) for PSD at midpoints."""
    family = about(flow, path)
    gram, powers = parts(family)[0], torch.diag(family.powers())
    close(jacobian(flow, path, "iSD"), -gram @ powers)
    close(jacobian(flow, path, "ESD"), -powers @ gram @ powers)
    if path == "linear":
        halves = torch.where(family.of_velocity(), 0.0, 1 - 2 ** (1 - family.powers()))
        close(jacobian(flow, path, "PSD"), -gram * halves)


@every_path
@every_flow
def test_in_the_metric_of_the_network_isds_eigenvalues_are_the_powers(path: str, flow: str) -> None:
    family = about(flow, path)
    found = G.spectrum(jacobian(flow, path, "iSD"), parts(family)[0])
    close(found, -family.powers().sort(descending=True).values, atol=1e-7)


@every_path
@every_flow
@every_objective
def test_the_null_space_is_the_velocity(path: str, name: str, flow: str) -> None:
    """And every other eigenvalue is negative: these maps attract, and along them nothing moves."""
    family = about(flow, path)
    matrix = jacobian(flow, path, name)
    values = G.spectrum(matrix)
    assert int((values.abs() < 1e-9).sum()) == int(family.of_velocity().sum()) == 4
    assert float(values[3]) < -1e-4
    assert float(matrix[:, family.of_velocity()].abs().max()) < 1e-9


@every_path
@pytest.mark.parametrize("weight", [0.01, 1.0, 100.0])
def test_any_anchor_makes_the_datas_map_stable_where_departures_leave_the_diagonal_alone(
    path: str, weight: float
) -> None:
    family = about("exact", path)
    anchor = jacobian("exact", path, "anchor")
    close(anchor, -parts(family)[1])
    departures = ~family.of_velocity()
    assert float(anchor[departures].abs().max()) < 1e-12
    for name in G.ERRORS:
        alone = jacobian("exact", path, name)
        assert float(G.spectrum(alone + weight * anchor)[-1]) < -1e-5
        if name == "MeanFlow":
            assert float(G.spectrum(alone)[-1]) < -1e-5


@pytest.mark.parametrize("power", [1, 2, 3])
def test_no_velocity_changes_the_powers(power: int) -> None:
    """About the flow of v = -x^2, X = x/(1 - x (t - s)): N moved by (t - s)^(k-1) c(X) has residual -k times that.

    The velocity is held, as MeanFlow's is.
    """
    x, t, s = 0.4 * noise(16, 1), torch.linspace(0.5, 1, 16, dtype=F64), torch.linspace(0.1, 0.4, 16, dtype=F64)

    def departure(x: Tensor, t: Tensor) -> Tensor:
        gap = (t - s)[:, None]
        return gap ** (power - 1) * torch.sin(3 * x / (1 - x * gap))

    def residual(size: Tensor) -> Tensor:
        def output(x: Tensor, t: Tensor) -> Tensor:
            return -(x**2) / (1 - x * (t - s)[:, None]) + size * departure(x, t)

        v = -(x**2)
        flow_map = FlowMap(Linear(), LinearPreconditioning(), Callback(lambda *inputs: inputs[0]))
        return eulerian_residual(flow_map, x, v, *jvp(output, (x, t), (v, torch.ones_like(t))), t, s)

    exact, moved = jvp(residual, (torch.zeros((), dtype=F64),), (torch.ones((), dtype=F64),))
    close(exact, torch.zeros_like(x), atol=1e-14)
    close(moved, -power * departure(x, t))


@functools.cache
def shared(sd: float, degree: int) -> tuple[Any, Tensor]:
    """A polynomial family about the data's map, and the Gram matrix of its features."""
    setting = case(sd, 0.0)
    family = G.Shared(setting, G.exact(setting), degree)
    return family, parts(family)[0]


@pytest.mark.parametrize(("sd", "degree"), [(0.5, 2), (1.0, 3), (3.0, 2)])
def test_an_anchor_above_half_the_squared_stretch_is_enough(sd: float, degree: int) -> None:
    """Then theta J theta < 0, whatever the parameters; MeanFlow needs no more than its own half of G."""
    family, gram = shared(sd, degree)
    anchor = G.jacobian(family, G.anchor_error, family.case)
    alone = G.jacobian(family, G.ERRORS["iSD"], family.case)
    anchored = alone + 1.001 * G.sufficient_weight(family.case) * anchor
    assert float(torch.linalg.eigvalsh(anchored + anchored.T)[-1]) < 0
    meanflow = G.jacobian(family, G.ERRORS["MeanFlow"], family.case)
    assert float(torch.linalg.eigvalsh(meanflow + meanflow.T + gram)[-1]) < 1e-6


def test_the_stretch_of_data_narrower_than_noise_is_below_one_weight() -> None:
    """C^2 <= 1 + sd^2: with sd <= 1 an anchor of weight 1 is enough."""
    for sd in (0.1, 0.5, 1.0):
        assert G.sufficient_weight(case(sd, 0.0)) < (1 + sd**2) / 2


@pytest.mark.parametrize(("sd", "degree"), [(1.0, 1), (1.0, 2), (2.0, 2), (0.5, 3)])
def test_normalised_apart_isd_leaves_the_datas_map(sd: float, degree: int) -> None:
    family, gram = shared(sd, degree)
    anchor, apart = G.jacobian(family, G.anchor_error, family.case), G.weight_apart(family.case)
    alone = G.jacobian(family, G.ERRORS["iSD"], family.case)
    assert float(G.spectrum(alone + anchor, gram)[-1]) < -0.5
    assert float(G.spectrum(alone + apart * anchor, gram)[-1]) > 1e-3
    critical = G.critical_weight(alone, anchor, gram)
    assert apart < critical < G.sufficient_weight(family.case)
    assert float(G.spectrum(alone + 1.02 * critical * anchor, gram)[-1]) < 0
    assert float(G.spectrum(alone + 0.98 * critical * anchor, gram)[-1]) > 0


@pytest.mark.parametrize(("sd", "degree"), [(1.0, 2), (2.0, 3)])
def test_a_true_gradient_needs_no_least_weight(sd: float, degree: int) -> None:
    family, gram = shared(sd, degree)
    anchor, esd = (G.jacobian(family, error, family.case) for error in (G.anchor_error, G.ERRORS["ESD"]))
    close(esd, esd.T)
    assert float(G.spectrum(esd + 1e-3 * anchor, gram)[-1]) < -1e-5


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_the_identity_attracts_in_every_polynomial_family(degree: int) -> None:
    """Eigenvalues 0 and -k with no anchor at all, on any data, whereas the data's own map may repel."""
    setting = case(1.0, 0.0)
    family = G.Shared(setting, G.contraction(0.0, 0.0), degree)
    found = G.spectrum(G.jacobian(family, G.ERRORS["iSD"], setting), parts(family)[0])
    expected = [-float(k) if k > 1 else 0.0 for k in range(1, degree + 1) for _ in range(2 * (degree - k + 1))]
    expected += [0.0] * (family.size - len(expected))
    close(found, torch.tensor(sorted(expected), dtype=F64), atol=1e-7)
    own = G.jacobian(shared(1.0, degree)[0], G.ERRORS["iSD"], setting)
    assert float(G.spectrum(own, shared(1.0, degree)[1])[-1]) > 1e-3


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.4])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_one_slope_moves_by_a_quadratic(slope: float, weight: float) -> None:
    """da/dtau = -curvature a^2 - weight (size a - pull) is the update of N = a x."""
    setting = case(0.5, 0.0)
    family, one = G.Shared(setting, G.contraction(0.0, 0.0), 1), G.OneSlope.of(setting)
    parameters = torch.tensor([slope, 0.0], dtype=F64)
    moved = sum(
        share * G.update(family, error, setting, parameters)
        for share, error in ((1.0, G.ERRORS["iSD"]), (weight, G.anchor_error))
    )
    assert float(moved[0]) == pytest.approx(
        -one.curvature * slope**2 - weight * (one.size * slope - one.pull), abs=1e-12
    )
    settled = one.settled(0.3)
    assert -one.curvature * settled**2 - 0.3 * (one.size * settled - one.pull) == pytest.approx(0, abs=1e-12)
    apart = one.settled_apart()
    assert one.settled(one.weight_apart(apart)) == pytest.approx(apart)


@every_path
def test_the_anchors_own_loss_is_the_librarys_at_the_exact_map(path: str) -> None:
    setting = case(path=path)
    batch, weight = quadrature(setting)
    flow_map = setting.data.flow_map(setting.path, setting.preconditioning)
    loss = (weight * OBJECTIVES["iSD"](flow_map, batch).terms["anchor"]).sum()
    assert G.irreducible_loss(setting) == pytest.approx(float(loss))
    assert G.weight_apart(setting) == pytest.approx(0.01 / (float(loss) + 0.01))
