"""LSD, PSD and shortcut models: zero at exact maps, what is frozen, sizes and times of the jumps."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import EDM, Linear
from fewstep.flow.preconditioning.analytic import AnalyticPreconditioning
from fewstep.flow.preconditioning.jumps import LinearPreconditioning
from fewstep.objectives import ESD, LSD, PSD, Batch, Companions, Losses, Objective, Shortcut
from fewstep.objectives.base import STREAM_S, STREAM_T
from fewstep.objectives.shortcut import STREAM_SIZE
from fewstep.utils.errors import ConfigError
from tests.support.batches import LATE, draws, small_batch
from tests.support.cases import F64, PATHS, Callback, close, every_pair, gaussian, noise, pair, random_map, slope
from tests.support.gradients import assert_anchored, gradients
from tests.support.objectives import changed, made
from tests.support.statistics import wavy

OFF = {"flow_matching_ratio": 0.0, "label_dropout": 0.0}
BARE = made(ESD, **OFF)
JUMPS = Shortcut(steps=8, bootstrap=1.0, target_decay=None, label_dropout=0.0)
OBJECTIVES = {
    "lsd": made(LSD, **OFF),
    "uniform": made(PSD, u="uniform", **OFF),
    "midpoint": made(PSD, u="midpoint", **OFF),
}  # type: ignore[arg-type]


def sizes(batch: Batch, steps: int) -> Tensor:
    """k of each sample, whose short jumps are 2^-(k+1) of the clock."""
    return batch.draws.integers(STREAM_SIZE, steps.bit_length() - 1)


@every_pair
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_the_error_is_zero_at_exact_maps(objective: Objective, path_name: str, name: str) -> None:
    path, preconditioning = pair(path_name, name)
    losses = objective(gaussian().flow_map(path, preconditioning), small_batch(64))
    assert float(losses.logs["distill"].sqrt().max()) < 1e-8
    wrong = objective(random_map(path_name, name), small_batch(64))
    assert float(wrong.logs["distill"].sqrt().max()) > 1e-3


@every_pair
def test_a_shortcut_is_exact_at_exact_maps_but_for_the_smallest_jumps(path_name: str, name: str) -> None:
    path, preconditioning = pair(path_name, name)
    batch = small_batch(64)
    found = JUMPS(gaussian().flow_map(path, preconditioning), batch).logs["distill"].sqrt()
    smallest = sizes(batch, 8) == 2
    assert float(found[~smallest].max()) < 1e-8
    assert float(found[smallest].max()) > 1e-6


@pytest.mark.parametrize(("path_name", "name"), [("linear", "linear"), ("trig", "trig"), ("edm", "euler")])
def test_the_smallest_jumps_are_euler_steps(path_name: str, name: str) -> None:
    """Their error over the long jump falls as their size: the steps that the diagonal takes are of order 1."""
    path, preconditioning = pair(path_name, name)
    flow_map, batch, steps, errors = gaussian().flow_map(path, preconditioning), small_batch(400), (64, 128, 256), []
    for count in steps:
        found = replace(JUMPS, steps=count)(flow_map, batch).logs["distill"]
        errors.append(float(found[sizes(batch, count) == count.bit_length() - 2].mean().sqrt()))
    assert slope([1 / count for count in steps], errors) == pytest.approx(1, abs=0.4)


@pytest.mark.parametrize("objective", [LSD(), PSD(), replace(JUMPS, bootstrap=0.0)], ids=["lsd", "psd", "shortcut"])
@pytest.mark.parametrize(("path_name", "name"), [("linear", "linear"), ("edm", "euler")])
def test_the_anchors_expected_gradient_is_zero_at_the_oracle(objective: LSD, path_name: str, name: str) -> None:
    anchored = changed(objective, times=LATE, label_dropout=0.0)
    if not isinstance(objective, Shortcut):
        anchored = changed(anchored, flow_matching_ratio=1.0)
    assert_anchored(anchored, path_name, name, moved=0.5)


def setting(objective: Objective, path_name: str, name: str) -> tuple[FlowMap, FlowMap, Batch, Losses, Tensor]:
    """A random map, a copy without gradients, the losses, and x_t."""
    flow_map, batch = random_map(path_name, name), small_batch()
    frozen = copy.deepcopy(flow_map).requires_grad_(False)
    losses = objective(flow_map, batch, Companions(ema_target=frozen))
    return flow_map, frozen, batch, losses, flow_map.path.interpolate(batch.x0, batch.noise(), losses.t)


some_pairs = pytest.mark.parametrize(("path_name", "name"), [("linear", "linear"), ("trig", "trig"), ("edm", "euler")])


@some_pairs
@pytest.mark.parametrize("derivative", ["exact", "finite-difference"])
def test_lsds_gradient_flows_through_the_derivative_alone(path_name: str, name: str, derivative: str) -> None:
    """That of |d_s X - v(X, s)|^2 with v and X of frozen weights, d_s X by a difference of the whole jump."""
    objective = changed(OBJECTIVES["lsd"], kind=derivative)
    flow_map, frozen, _, losses, x = setting(objective, path_name, name)
    t, s = losses.t, losses.s
    h = 1e-5 * flow_map.path.time_scale(s).clamp(max=1) * (t - s).clamp(max=1)
    moved = flow_map.jump(x, t, s + h) - flow_map.jump(x, t, s - h)
    error = moved / (2 * h)[:, None] - frozen.velocity(frozen.jump(x, t, s), s)
    exact = derivative == "exact"
    close(losses.loss, error.square().mean(1), rtol=1e-5 if exact else 5e-2, atol=1e-6 if exact else 1e-2)
    got, expected = (gradients(loss.sum(), flow_map) for loss in (losses.loss, error.square().mean(1)))
    assert float((got - expected).norm()) < (1e-5 if exact else 5e-2) * float(expected.norm())


@some_pairs
@pytest.mark.parametrize("u", ["uniform", "midpoint"])
def test_psds_gradient_flows_through_the_long_jump_alone(path_name: str, name: str, u: str) -> None:
    objective = OBJECTIVES[u]
    flow_map, frozen, batch, losses, x = setting(objective, path_name, name)
    t, s = losses.t, losses.s
    middle = objective.between(flow_map.path, batch)  # type: ignore[attr-defined]
    goal = frozen.jump(frozen.jump(x, t, middle), middle, s)
    error = (flow_map.jump(x, t, s) - goal) / (t - s)[:, None]
    close(losses.loss, error.square().mean(1))
    close(gradients(losses.loss.sum(), flow_map), gradients(error.square().mean(1).sum(), flow_map))


@some_pairs
@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_shortcuts_gradient_flows_through_the_long_jump_alone(path_name: str, name: str, decay: float | None) -> None:
    objective = changed(JUMPS, target_decay=decay)
    flow_map, frozen, batch, losses, x = setting(objective, path_name, name)
    t, u, s = objective.draw_times(flow_map.path, batch)
    smallest = sizes(batch, 8) == 2
    at_x = frozen.output(x, t, torch.where(smallest, t, u))
    middle = frozen.apply_jump(x, at_x, t, u)
    goal = frozen.apply_jump(middle, frozen.output(middle, u, torch.where(smallest, u, s)), u, s)
    error = (flow_map.jump(x, t, s) - goal) / (t - s)[:, None]
    close(losses.loss, error.square().mean(1))
    close(gradients(losses.loss.sum(), flow_map), gradients(error.square().mean(1).sum(), flow_map))


def test_a_shortcuts_slow_average_takes_the_short_jumps() -> None:
    flow_map, batch, objective = random_map(), small_batch(), changed(JUMPS, target_decay=0.99)
    exact = gaussian().flow_map(flow_map.path, flow_map.preconditioning)
    assert objective.target_decay == 0.99
    assert JUMPS.target_decay is None
    own, other = (objective(flow_map, batch, Companions(ema_target=model)).loss for model in (flow_map, exact))
    close(own, JUMPS(flow_map, batch).loss)
    assert float((own - other).abs().min().detach()) > 1e-6
    with pytest.raises(ConfigError, match="average"):
        objective(flow_map, batch)


@pytest.mark.parametrize("path", [Linear(), EDM()], ids=["linear", "edm"])
def test_a_shortcuts_times_are_multiples_of_their_sizes(path: Linear) -> None:
    batch, objective = Batch(noise(6000, 1), None, draws(6000)), Shortcut(steps=16, bootstrap=0.25)
    t, u, s = objective.draw_times(path, batch)
    off = t != s
    assert int(off.sum()) == 1500
    assert torch.equal(t[~off], path.time_from_unit(batch.draws.uniform(STREAM_T))[~off])
    size = 0.5 ** sizes(batch, 16).double()[off]
    assert torch.equal(size.unique(), torch.tensor([0.125, 0.25, 0.5, 1.0], dtype=F64))
    grid = path.time_from_unit(torch.arange(17, dtype=F64) / 16)
    n = [torch.argmin((time[off][:, None] - grid).abs(), 1) for time in (t, u, s)]
    for place, time in zip(n, (t, u, s), strict=True):
        close(grid[place], time[off])
    assert torch.equal(n[0] - n[2], (16 * size).long())
    assert torch.equal(n[0] + n[2], 2 * n[1])
    assert bool((n[2] % (16 * size).long() == 0).all())
    assert {int(k) for k in n[2][size == 0.125]} == set(range(0, 16, 2))


def test_psds_middle_lies_between() -> None:
    batch = Batch(noise(2000, 1), None, draws(2000))
    for path in (Linear(), EDM()):
        first, second = batch.draws.uniform(STREAM_T), batch.draws.uniform(STREAM_S)
        t, s = (path.time_from_unit(end) for end in (torch.maximum(first, second), torch.minimum(first, second)))
        u = PSD(u="uniform").between(path, batch)
        assert bool(((s < u) & (u < t)).all())
        close(PSD(u="midpoint").between(path, batch), path.time_from_unit((first + second) / 2))
    share = ((PSD(u="uniform").between(Linear(), batch) - second) / (first - second)).double()
    assert float(share.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(share.std()) == pytest.approx(12**-0.5, abs=0.02)


def test_without_the_anchor_a_collapsed_map_is_perfect() -> None:
    """N = 0 is the identity: it composes, solves both equations, and is no map of the data (math.md §5.2)."""
    flow_map, batch = gaussian().flow_map(Linear(), LinearPreconditioning()), small_batch()
    flow_map.network = Callback(lambda x, t, s, cond: 0 * x)
    for objective in (*OBJECTIVES.values(), BARE, JUMPS):
        losses = objective(flow_map, batch)
        assert float(losses.logs["distill"].max()) == 0
        if objective is not BARE:
            assert float(losses.mean()) == 0
    for anchored in (LSD(), PSD(), replace(JUMPS, bootstrap=0.25), BARE):
        assert float(anchored(flow_map, batch).mean()) > 0.1


@pytest.mark.parametrize(
    "wrong", [{"steps": 12}, {"steps": 1}, {"bootstrap": 1.2}, {"target_decay": 1.0}, {"weight_eps": 0.0}]
)
def test_shortcut_refuses_nonsense(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        made(Shortcut, **wrong)


@pytest.mark.parametrize("path_name", ["linear", "edm"])
@pytest.mark.parametrize("objective", [*OBJECTIVES.values(), BARE, JUMPS], ids=[*OBJECTIVES, "esd", "shortcut"])
def test_about_an_origin_the_error_is_zero_too(objective: Objective, path_name: str) -> None:
    """Analytic preconditioning, whose coefficients are tables and whose jumps have a third term (math.md §3.6)."""
    path, batch = PATHS[path_name], small_batch(64)
    flow_map = gaussian().flow_map(path, AnalyticPreconditioning(wavy(0.3), "backward", path))
    found = objective(flow_map, batch).logs["distill"].sqrt()
    assert float(found[sizes(batch, 8) != 2].max()) < 1e-6
