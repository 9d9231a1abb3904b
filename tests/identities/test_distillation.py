"""Distillation: the grid's draws, zero residual at exact maps as the solver's order says, and where gradients flow."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import EDM
from fewstep.flow.preconditioning.analytic import AnalyticPreconditioning
from fewstep.flow.preconditioning.covariance import PrincipalComponents
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.flow.preconditioning.network_scaling import EDMScaling
from fewstep.flow.preconditioning.skip import SkipPreconditioning
from fewstep.networks.condition import Condition
from fewstep.objectives import CD, CTM, Batch, Companions, Objective, TeacherSteps
from fewstep.objectives.ctm import carried
from fewstep.objectives.distillation import jump_where_apart
from fewstep.objectives.losses import gradient_balance
from fewstep.utils.errors import ConfigError
from fewstep.utils.random import Draws
from fewstep.utils.tensors import expand
from tests.support.cases import (
    F64,
    PATHS,
    SD,
    close,
    covering,
    gaussian,
    noise,
    preconditionings,
    random_network,
    slope,
)
from tests.support.objectives import changed, made
from tests.support.statistics import wavy

COUNT = 64
MOVED = CTM(denoising=0.0)


def batch(count: int = COUNT, seed: int = 0, labels: Tensor | None = None) -> Batch:
    return Batch(0.4 + SD * noise(count, 3, seed=seed), labels, Draws(seed, 2, torch.arange(count)))


def exact_case(path_name: str, name: str = "euler") -> tuple[FlowMap, Companions]:
    """The Gaussian's exact map with that preconditioning, taught by itself."""
    path = PATHS[path_name]
    kinds = preconditionings(path) | {"analytic": AnalyticPreconditioning(wavy(), "backward", path)}
    exact = gaussian().flow_map(path, kinds[name])
    return exact, Companions(teacher=exact, ema_target=exact)


def student_case(seed: int = 0) -> tuple[FlowMap, FlowMap, Companions]:
    """A random student, its average (the same weights), and the Gaussian's exact teacher."""
    torch.manual_seed(seed)
    maps = [FlowMap(EDM(), EulerPreconditioning(), random_network(), EDMScaling(SD)) for _ in range(2)]
    teacher = gaussian().flow_map(EDM(), EulerPreconditioning())
    maps[1].requires_grad_(False)
    return maps[0], maps[1], Companions(teacher=teacher, ema_target=maps[1])


SOLVERS = {"euler": 1, "heun": 2}
"""With their orders."""
TAUGHT = {
    "cd": CD(),
    "ctm": MOVED,
    "ctm to the end": changed(MOVED, endpoint_only=True),
    "ctm where the jump ends": changed(MOVED, compare="jump-end", sigma_data=SD),
    "ctm by its own draws": changed(MOVED, steps=TeacherSteps(draws="published"), intermediate=0.5, sigma_data=SD),
}
MAPS = [
    ("edm", "euler"), ("vp", "euler"), ("edm", "analytic"), ("vp", "analytic"), ("linear", "analytic"),
    ("trig", "analytic"), ("linear", "linear"), ("trig", "trig"), ("edm", "bcm"),
]  # fmt: skip
TURNS = covering((name, *each, solver) for name in TAUGHT for each in MAPS for solver in SOLVERS)
"""Every objective on every path, with every preconditioning, and by both solvers."""


@pytest.mark.parametrize(("objective_name", "path_name", "preconditioning", "solver"), TURNS)
def test_the_residual_falls_at_exact_maps_as_the_solver_does(
    objective_name: str, path_name: str, preconditioning: str, solver: str
) -> None:
    """Nothing but the solver stands between an exact student and a loss of zero: its root falls as points^-order.

    Adjacent steps make one local error, of one order more.
    """
    objective, (exact, companions) = TAUGHT[objective_name], exact_case(path_name, preconditioning)
    sizes, errors = [], []
    for points in (20, 40):
        steps = replace(objective.steps, solver=solver, points=points)  # type: ignore[arg-type]
        losses = replace(objective, steps=steps)(exact, batch(256), companions)
        sizes.append(1 / points)
        errors.append(float(losses.loss.mean().sqrt()))
    expected = SOLVERS[solver] + (1 if objective.steps.u == "adjacent" else 0)
    assert abs(slope(sizes, errors) - expected) < 0.5
    moved = gaussian(0.9).flow_map(exact.path, exact.preconditioning)
    wrong = objective(moved, batch(256), companions)
    assert float(wrong.loss.mean().sqrt()) > 10 * errors[-1]


@pytest.mark.parametrize("u", ["drawn", "adjacent"])
@pytest.mark.parametrize("longest", [0, 3])
def test_the_grid_indices_are_in_order_and_cover_the_grid(u: str, longest: int) -> None:
    steps = TeacherSteps(points=7, u=u, longest=longest)  # type: ignore[arg-type]
    n, k, j = steps.draw(batch(20_000), endpoint_only=False)
    assert bool(((n < k) & (k <= j) & (n >= 0) & (j <= 6)).all())
    assert sorted(set(n.tolist())) == list(range(6))
    assert {(a, b) for a, b in zip(n.tolist(), j.tolist(), strict=True)} == {
        (a, b) for a in range(6) for b in range(a + 1, 7)
    }
    longest_seen = int((k - n).max())
    assert longest_seen == (1 if u == "adjacent" else longest or 6)
    assert bool((steps.draw(batch(50), endpoint_only=True)[2] == 6).all())
    counts = torch.bincount(n, minlength=6).double()
    assert float((counts - 20_000 / 6).abs().max()) < 5 * (20_000 / 6) ** 0.5


@pytest.mark.parametrize(("longest", "power"), [(0, 1.0), (7, 1.0), (0, 0.0), (7, -1.0)])
def test_published_draws_are_of_the_published_law(longest: int, power: float) -> None:
    """Walks of h cells with odds h, or a power of it; t uniform above them, s uniform below."""
    steps = TeacherSteps(points=12, longest=longest, draws="published", odds_power=power)
    draws = [step.tolist() for step in steps.draw(batch(20_000), endpoint_only=False)]
    most = longest or 11
    walks = torch.bincount(torch.tensor(draws[1]) - torch.tensor(draws[0]), minlength=most + 1)[1:].double()
    odds = torch.arange(1, most + 1).double() ** power
    close(walks / walks.sum(), odds / odds.sum(), rtol=0.2, atol=0.01)
    of_three = [(n, j) for n, k, j in zip(*draws, strict=True) if k - n == 3]
    for place, values in enumerate((range(9), None)):
        found = torch.bincount(torch.tensor([pair[place] for pair in of_three if values or pair[0] == 4]), minlength=12)
        allowed = found[values or range(7, 12)].double()
        assert int(found.sum()) == int(allowed.sum())
        close(allowed / allowed.sum(), torch.full_like(allowed, 1 / len(allowed)), rtol=0.5)
    assert set(steps.draw(batch(50), endpoint_only=True)[2].tolist()) == {11}


@pytest.mark.parametrize(
    ("steps", "short", "whole"),
    [
        (TeacherSteps(), 0.702, 0.0035),
        (TeacherSteps(draws="published"), 0.062, 0.164),
        (TeacherSteps(draws="published", odds_power=0.0), 0.185, 0.0934),
    ],
)
def test_how_many_jumps_are_short_and_how_many_go_the_whole_way(
    steps: TeacherSteps, short: float, whole: float
) -> None:
    """Shares of jumps over at most six of 17 cells, and over all; figures of docs/studies/skip.md."""
    n, _, j = steps.draw(batch(40_000), endpoint_only=False)
    for found, share in ((j - n <= 6, short), (j - n == 17, whole)):
        assert abs(float(found.double().mean()) - share) < 5 * (share / 40_000) ** 0.5


def test_intermediate_jumps_count_by_what_arrives_or_as_they_end() -> None:
    """On N(m, sd^2 I) w times the squared error at s is what reaches the data end; p undoes it in either comparison."""
    exact = gaussian().flow_map(EDM(), EulerPreconditioning())
    s, end = torch.tensor([0.002, 0.5, 3.0, 40.0], dtype=F64), torch.full((4,), 0.002, dtype=F64)
    x, moved = noise(4, 3), 1e-3 * noise(4, 3, seed=1)
    arrived = (exact.jump(x + moved, s, end) - exact.jump(x, s, end)).square().sum(1) / moved.square().sum(1)
    for p in (0.0, 0.5, 1.0):
        at_end, at_jump = (CTM(compare=place, intermediate=p, sigma_data=SD) for place in ("data-end", "jump-end"))
        close(at_end.weight_at(exact, s) * arrived, arrived ** (1 - p), rtol=1e-4)
        close(at_jump.weight_at(exact, s), arrived ** (1 - p), rtol=1e-4)


def test_errors_are_carried_by_the_gaussians_flow_map() -> None:
    covariance = PrincipalComponents(noise(3), torch.linalg.qr(noise(3, 3))[0], noise(3).square(), 0.0)
    skip = SkipPreconditioning(EulerPreconditioning(), covariance)
    flow_map, cond = FlowMap(EDM(), skip, random_network()), Condition()
    x, s, end = noise(2, 3, seed=3), torch.tensor([0.7, 20.0], dtype=F64), torch.full((2,), 0.002, dtype=F64)
    moved = skip.linear(x, s, end) + expand(skip.coefficients(s, end)[1], x) * (
        covariance.mean + covariance.scaled(x - covariance.mean, lambda lam: lam / (lam + s[:, None] ** 2))
    )
    close(carried(flow_map, x, s, end, cond), moved)
    with pytest.raises(ConfigError, match="a skip alone"):
        carried(FlowMap(EDM(), EulerPreconditioning(), random_network()), x, s, end, cond)
    with pytest.raises(ConfigError, match="jump-end"):
        CTM(carried="covariance")
    with pytest.raises(ConfigError, match="many cells"):
        TeacherSteps(u="adjacent", draws="published")
    with pytest.raises(ConfigError, match="of published draws"):
        TeacherSteps(odds_power=0.0)
    with pytest.raises(ConfigError, match="between -10 and 10"):
        TeacherSteps(draws="published", odds_power=float("nan"))


def test_the_target_and_the_teacher_get_no_gradient() -> None:
    student, slow, companions = student_case()
    for objective in (CD(), CTM(balance=False, sigma_data=SD)):
        student.zero_grad()
        objective(student, batch(), companions).mean().backward()
        assert all(
            p.grad is not None and bool(p.grad.abs().sum() > 0)
            for n, p in student.named_parameters()
            if "labels" not in n
        )
        assert all(p.grad is None for p in slow.parameters())


def test_the_gradient_passes_through_the_average_to_the_first_jump() -> None:
    """CTM's gradient is that of d(X_sg(X(x_t, t, s), s, end), goal), by finite differences in one weight."""
    student, _, companions = student_case()
    objective, data = MOVED, batch()
    weight = student.network.output.weight  # type: ignore[union-attr]
    objective(student, data, companions).mean().backward()
    got = float(weight.grad[0, 0])  # type: ignore[index]
    values = []
    for h in (1e-5, -1e-5):
        with torch.no_grad():
            weight[0, 0] += h  # type: ignore[index]
            values.append(float(objective(student, data, companions).mean()))
            weight[0, 0] -= h  # type: ignore[index]
    assert abs(got - (values[0] - values[1]) / 2e-5) < 1e-6 * max(1.0, abs(got))
    assert abs(got) > 1e-6


def test_balance_equals_the_gradient_norms_on_the_last_layer() -> None:
    student, _, companions = student_case()
    objective, data = CTM(denoising=0.5, sigma_data=SD), batch()
    losses = objective(student, data, companions)
    weight = student.network.output.weight  # type: ignore[union-attr]
    norms = []
    for part in (replace(objective, denoising=0.0), None):
        if part is not None:
            value = part(student, data, companions).mean()
        else:
            value = objective.denoising_loss(student, data, Condition()).mean()
        norms.append(torch.autograd.grad(value, weight)[0].norm())  # type: ignore[arg-type]
    close(losses.logs["balance"][0], 0.5 * norms[0] / norms[1])
    plain = replace(objective, balance=False)(student, data, companions)
    close(plain.logs["balance"], torch.full((COUNT,), 0.5, dtype=F64))


def test_balance_is_one_without_gradients_and_bounded() -> None:
    weight = torch.ones(2, dtype=F64, requires_grad=True)
    loss = (weight * 3).sum() * torch.ones(4, dtype=F64)
    with torch.no_grad():
        assert float(gradient_balance(loss.detach(), loss.detach(), weight, lambda x: x)) == 1.0
    assert float(gradient_balance(loss, 0 * loss, weight, lambda x: x)) == 1e4


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm-solver++"])
def test_a_labelled_teacher_sees_each_samples_own_label(solver: str) -> None:
    """Samples that stop early leave the batch: the labels must leave with them."""
    network = random_network(num_classes=4)
    teacher = FlowMap(EDM(), EulerPreconditioning(), network, EDMScaling(SD)).requires_grad_(False)
    labels = torch.arange(COUNT) % 4
    data, steps = batch(labels=labels), TeacherSteps(points=9, solver=solver)  # type: ignore[arg-type]
    n, k, _ = steps.draw(data, endpoint_only=False)
    x = 5 * noise(COUNT, 3)
    together = steps.walk(teacher, x, n, k, Condition(labels), teacher)
    alone = [steps.walk(teacher, x[[i]], n[[i]], k[[i]], Condition(labels[[i]]), teacher) for i in range(COUNT)]
    close(together, torch.cat(alone))


def test_a_teacher_on_another_path_gives_the_same_walk() -> None:
    """math.md §3.5: y = x/alpha at noise level tau."""
    data = gaussian()
    steps = TeacherSteps(points=9)
    n, k, _ = steps.draw(batch(), endpoint_only=False)
    x = 5 * noise(COUNT, 3)
    path = EDM(0.02, 80.0)  # all of it within the other paths' ranges
    own = data.flow_map(path, EulerPreconditioning(path))
    expected = steps.walk(own, x, n, k, Condition(), own)
    for name in ("linear", "trig", "vp"):
        foreign = data.flow_map(PATHS[name], EulerPreconditioning(PATHS[name]))
        close(steps.walk(own, x, n, k, Condition(), foreign), expected, rtol=1e-7, atol=1e-8)


def test_jump_where_apart_leaves_the_others_and_does_not_evaluate_them() -> None:
    student, _, _ = student_case()
    x, t = noise(4, 3), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
    s = torch.tensor([1.0, 0.5, 3.0, 0.1], dtype=F64)
    moved = jump_where_apart(student, x, (t, s), Condition(), s < t)
    close(moved[[0, 2]], x[[0, 2]], rtol=0, atol=0)
    close(moved[[1, 3]], student.jump(x[[1, 3]], t[[1, 3]], s[[1, 3]]))
    assert jump_where_apart(student, x, (t, t), Condition(), t < t) is x


@pytest.mark.parametrize("objective", [CD(), CTM(), made(CTM, kind="features")], ids=["cd", "ctm", "features"])
def test_missing_companions_are_named(objective: Objective) -> None:
    student, slow, companions = student_case()
    with pytest.raises(ConfigError, match="average"):
        objective(student, batch(), Companions(teacher=companions.teacher))
    with pytest.raises(ConfigError, match="--teacher"):
        objective(student, batch(), Companions(ema_target=slow))
    if objective.measures_features:
        with pytest.raises(ConfigError, match="extractor"):
            objective(student, batch(), companions)


def test_a_distance_of_features_is_the_distance_between_features() -> None:
    student, slow, companions = student_case()
    seen = Companions(companions.teacher, slow, lambda x: torch.cat([2 * x, 2 * x], 1))
    plain = changed(MOVED, kind="l2")(student, batch(), companions)
    featured = changed(MOVED, kind="features")(student, batch(), seen)
    close(featured.loss, 4 * plain.loss)


@pytest.mark.parametrize("wrong", [{"points": 1}, {"longest": -1}])
def test_a_teachers_grid_refuses_nonsense(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        TeacherSteps(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make", [lambda: CD(target_decay=1.0), lambda: CTM(target_decay=-0.1), lambda: CTM(denoising=-1.0)]
)
def test_objectives_refuse_nonsense(make: type[CTM]) -> None:
    with pytest.raises(ConfigError):
        make()
