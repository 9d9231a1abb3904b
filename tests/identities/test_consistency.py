"""CT, ECT, sCT and sCD: curricula, bias that falls with the grid, the published tangent, what is frozen."""

import copy
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep.flow.derivatives import Derivative, DerivativeKind
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import EDM, Linear, Trig
from fewstep.flow.preconditioning.jumps import (
    BCMPreconditioning,
    CMPreconditioning,
    EulerPreconditioning,
    LinearPreconditioning,
    TrigPreconditioning,
)
from fewstep.flow.preconditioning.network_scaling import EDMInputScaling
from fewstep.flow.times import LogNormalTimes, edm_grid
from fewstep.networks.condition import Condition
from fewstep.networks.unet import UNetConfig
from fewstep.objectives import CT, ECT, SCD, SCT, Batch, Companions, Tangent, eulerian_residual
from fewstep.objectives.losses import normalised
from fewstep.utils.errors import ConfigError
from tests.support.batches import LATE, OneTime, draws, small_batch
from tests.support.cases import (
    F64,
    PATHS,
    SD,
    close,
    every_pair,
    gaussian,
    noise,
    pair,
    random_map,
    random_network,
    scalings,
    slope,
)
from tests.support.gradients import assert_anchored, expected_gradient, gradients
from tests.support.objectives import made

BARE = Tangent(normalise=False)
some_pairs = pytest.mark.parametrize(
    ("path_name", "name"), [("edm", "euler"), ("edm", "bcm"), ("trig", "trig"), ("linear", "linear")]
)


@some_pairs
def test_the_bias_of_adjacent_points_falls_with_their_distance(path_name: str, name: str) -> None:
    """The expected gradient at the oracle is of order 1 in t - u; at a map of other data it stays."""
    path, preconditioning = pair(path_name, name)
    ct = made(CT, times=OneTime(0.8), first=50, last=400, duration=400, kind="l2")
    found = [expected_gradient(ct, path, preconditioning, images) for images in (0, 100, 200, 300)]
    assert slope([1 / 50, 1 / 100, 1 / 200, 1 / 400], found) == pytest.approx(1, abs=0.25)
    assert expected_gradient(ct, path, preconditioning, 300, shift=0.5) > 10 * found[-1]
    ect = made(ECT, times=OneTime(0.8), stage_images=1, kind="l2", stages=20)
    stages = (4, 5, 6, 7)
    found = [expected_gradient(ect, path, preconditioning, a) for a in stages]
    assert slope([2.0**-a for a in stages], found) == pytest.approx(1, abs=0.25)
    assert expected_gradient(ect, path, preconditioning, stages[-1], shift=0.5) > 10 * found[-1]


@every_pair
def test_scts_expected_gradient_is_zero_at_the_oracle(path_name: str, name: str) -> None:
    """Where the tangent is not normalised, which bends what the mean of the conditional velocity keeps straight."""
    assert_anchored(SCT(times=LATE, tangent=BARE), path_name, name, moved=0.5)


@every_pair
@pytest.mark.parametrize("teachers_path", ["own", "foreign"])
def test_scds_error_is_zero_at_exact_maps(path_name: str, name: str, teachers_path: str) -> None:
    path, preconditioning = pair(path_name, name)
    data, foreign = gaussian(), path if teachers_path == "own" else EDM(1e-6, 1e9)
    teacher = Companions(teacher=data.flow_map(foreign, EulerPreconditioning(foreign)))
    for tangent in (Tangent(), BARE):
        losses = SCD(times=LATE, tangent=tangent)(data.flow_map(path, preconditioning), small_batch(64), teacher)
        assert float(losses.loss.sqrt().max()) < 1e-7
        wrong = SCD(times=LATE, tangent=tangent)(
            gaussian(1.2).flow_map(path, preconditioning), small_batch(64), teacher
        )
        assert float(wrong.loss.sqrt().max()) > 1e-3
        assert torch.equal(losses.s, torch.full_like(losses.s, path.t_min))


@pytest.mark.parametrize("images", [0, 25, 100])
def test_the_trig_tangent_is_the_published_one(images: int) -> None:
    """g = -cos^2 t (N - v) - r cos t sin t (x + dN/dt), r = min(1, images/50), and N_target = N + g/(rms g + 0.1)."""
    path = Trig(SD)
    flow_map = FlowMap(path, TrigPreconditioning(), random_network(), scalings(path)["unit"])
    batch, tangent = replace(small_batch(), images=images), Tangent(warm_up_images=50)
    t = SCT(times=LATE).times.quantile(path, batch.draws.uniform(11))
    x, v = path.interpolate(batch.x0, batch.noise(), t), path.conditional_velocity(batch.x0, batch.noise(), t)
    output, d_output = Derivative().along(flow_map, x, v, t, torch.zeros_like(t), Condition())
    cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
    g = -(cos**2) * (output - v) - min(1.0, images / 50) * cos * sin * (x + d_output)
    for each, expected in (
        (tangent, g / (g.square().mean(1).sqrt() + 0.1)[:, None]),
        (replace(tangent, normalise=False), g),
    ):
        target = (output + expected).detach()
        losses = SCT(times=LATE, tangent=each)(flow_map, batch)
        close(losses.loss, (output - target).square().mean(1))
        grads = [gradients(loss.sum(), flow_map) for loss in (losses.loss, one_more(flow_map, x, t, target))]
        close(*grads)


def one_more(flow_map: FlowMap, x: Tensor, t: Tensor, target: Tensor) -> Tensor:
    return (flow_map.output(x, t, torch.zeros_like(t)) - target).square().mean(1)


@some_pairs
@pytest.mark.parametrize("derivative", ["exact", "finite-difference"])
def test_scds_gradient_flows_through_the_output_alone(path_name: str, name: str, derivative: DerivativeKind) -> None:
    flow_map, batch = random_map(path_name, name), small_batch()
    path, frozen = flow_map.path, copy.deepcopy(flow_map).requires_grad_(False)
    teacher = gaussian().flow_map(path, flow_map.preconditioning)
    tangent = made(Tangent, normalise=False, kind=derivative)
    losses = SCD(times=LATE, tangent=tangent)(flow_map, batch, Companions(teacher=teacher))
    t, s = losses.t, losses.s
    x = path.interpolate(batch.x0, batch.noise(), t)
    v = teacher.velocity(x, t)
    terms = Derivative(derivative).along(frozen, x, v, t, s, Condition())
    residual = eulerian_residual(frozen, x, v, *terms, t, s)
    _, g, _, g_t = flow_map.preconditioning.derivatives(t, s)
    inside = flow_map.preconditioning.target_in_network
    ahead, step = (torch.ones_like(t), -g_t) if inside else (g, s - t)
    error = ahead[:, None] * (flow_map.output(x, t, s) - terms[0]) - step[:, None] * residual
    close(losses.loss, error.square().mean(1), rtol=1e-8)
    close(gradients(losses.loss.sum(), flow_map), gradients(error.square().mean(1).sum(), flow_map), rtol=1e-7)


@some_pairs
@pytest.mark.parametrize("objective", [CT(first=20), ECT(), CT(target_decay=0.9), ECT(target_decay=0.9)])
def test_the_target_of_adjacent_points_is_frozen(objective: CT | ECT, path_name: str, name: str) -> None:
    """Taken by the model's own weights, or by their slow average, from the same noise."""
    flow_map, batch = random_map(path_name, name), small_batch()
    frozen = copy.deepcopy(flow_map).requires_grad_(False)
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter.mul_(1.0 if objective.target_decay is None else 1.1)
    losses = objective(flow_map, batch, Companions(ema_target=frozen))
    t, u = objective.neighbours(flow_map.path, batch)
    s, eps = losses.s, batch.noise()
    x, x_u = flow_map.path.interpolate(batch.x0, eps, t), flow_map.path.interpolate(batch.x0, eps, u)
    error = flow_map.jump(x, t, s) - frozen.jump(x_u, u, s)
    huber = (torch.sqrt(error.square().sum(1) + 0.03**2) - 0.03) / math.sqrt(3)
    close(losses.loss, huber / (t - u))
    close(gradients(losses.loss.sum(), flow_map), gradients((huber / (t - u)).sum(), flow_map))


def test_missing_companions_are_named() -> None:
    flow_map, batch = random_map(), small_batch()
    for objective in (CT(target_decay=0.9), ECT(target_decay=0.9)):
        with pytest.raises(ConfigError, match="average"):
            objective(flow_map, batch)
    assert SCD().needs_teacher
    with pytest.raises(ConfigError, match="--teacher"):
        SCD()(flow_map, batch)


@pytest.mark.parametrize("path_name", PATHS)
def test_neighbours_are_neighbours_and_cover_the_grid(path_name: str) -> None:
    path, objective = PATHS[path_name], CT(times=LogNormalTimes(-1.1, 2.0), first=6, last=24, duration=90)
    for images, cells in ((0, 6), (30, 12), (89, 24), (1000, 24)):
        batch = Batch(noise(20_000, 1), None, draws(20_000), images)
        t, u = objective.neighbours(path, batch)
        drawn = objective.times.quantile(path, batch.draws.uniform(11))
        rising = edm_grid(path, cells).flip(0)
        n, m = torch.searchsorted(rising, t), torch.searchsorted(rising, u)
        assert torch.equal(n, m + 1)
        inside = (drawn > rising[0]) & (drawn < rising[-1])
        assert bool(((u <= drawn) & (drawn < t))[inside].all())
        assert sorted(set(n.tolist())) == list(range(1, cells + 1))


def test_at_t_min_easy_consistency_has_no_loss_and_no_trap() -> None:
    """A draw held at t_min has no point below it: the loss is 0 and the gradient finite."""
    flow_map, batch = random_map("edm", "euler"), small_batch()
    losses = ECT(times=LogNormalTimes(-20.0, 0.1))(flow_map, batch)
    assert bool((losses.t == EDM().t_min).all())
    assert float(losses.loss.abs().max().detach()) == 0
    assert bool(gradients(losses.loss.sum(), flow_map).isfinite().all())


def test_both_points_see_the_same_dropout() -> None:
    """With one mask neighbours differ by little; the masks themselves are drawn anew every time."""
    network = UNetConfig(8, (1,), 1, (), head_width=4, embedding_width=8, dropout=0.5).build((1, 4, 4), 0, False)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    flow_map = FlowMap(EDM(), EulerPreconditioning(), network.double(), scalings(EDM())["edm"]).train()
    batch = Batch(noise(8, 1, 4, 4), None, draws(8))
    close_by = made(CT, times=OneTime(1.0), first=20_000, last=20_000, kind="l2")
    values = [float(close_by(flow_map, batch).logs["consistency"].mean().sqrt()) for _ in range(2)]
    assert max(values) < 1e-2
    assert values[0] != values[1]


@given(images=st.integers(0, 10**9), more=st.integers(0, 10**9), first=st.integers(1, 50), factor=st.integers(1, 200))
def test_doubling_is_monotone_and_ends_at_the_last(images: int, more: int, first: int, factor: int) -> None:
    last, duration = first * factor, 10**8
    grid = CT(first=first, last=last, duration=duration)
    cells = [grid.cells(n) for n in (0, images, images + more, duration, 10**10)]
    assert cells[0] == first
    assert cells[1] <= cells[2]
    assert cells[3] == cells[4] == last


def test_doubling_is_the_published_schedule() -> None:
    """10 to 1280: eight equal stages (iCT)."""
    stages = [CT(first=10, last=1280, duration=800).cells(n) for n in (0, 99, 100, 399, 400, 699, 700, 800, 5000)]
    assert stages == [10, 10, 20, 80, 160, 640, 1280, 1280, 1280]


def test_doubling_between_numbers_that_are_no_powers_of_two_apart() -> None:
    """10 to 1500: log2 of 150 and 1 more are 8.23 stages, of which eight are 97.2 of 100 images."""
    grid = CT(first=10, last=1500, duration=100)
    for images in range(101):
        stage = 0
        while images * (math.log2(150) + 1) / 100 >= stage + 1:
            stage += 1
        assert grid.cells(images) == min(10 * 2**stage, 1500)
    assert [grid.cells(n) for n in (87, 97, 98)] == [1280, 1280, 1500]


def test_the_ratio_of_easy_consistency_is_the_published_one() -> None:
    tau = torch.tensor([0.0, 0.5, 3.0, math.inf], dtype=F64)
    objective = ECT(q=2, stage_images=100, stages=4, k=8.0, b=1.0)
    ratios = [objective.ratio(tau, n) for n in (0, 99, 100, 250, 300, 10_000)]
    for ratio, a in zip(ratios, (1, 1, 2, 3, 4, 4), strict=True):
        close(ratio, (1 - (1 + 8 / (1 + torch.exp(tau))) / 2**a).clamp(min=0))
    assert all(bool((after >= before).all()) for before, after in pairwise(ratios))
    assert float(ratios[0][0]) == 0
    assert float(ratios[0][-1]) == 0.5


def test_warm_up_rises_from_zero_to_one() -> None:
    assert [Tangent(warm_up_images=200).warmed_up(n) for n in (0, 50, 100, 200, 900)] == [0, 0.25, 0.5, 1, 1]
    assert Tangent().warmed_up(0) == 1


def test_normalised_tangents_have_a_size_below_one() -> None:
    tangent = torch.cat([noise(2, 2, 3), 1e6 * noise(2, 2, 3), torch.zeros(1, 2, 3, dtype=F64)])
    size = tangent.square().mean((1, 2)).sqrt()
    close(normalised(tangent, 0.1).square().mean((1, 2)).sqrt(), size / (size + 0.1))


def test_cm_preconditioning_trains_by_adjacent_points_on_its_own_path_alone() -> None:
    batch = small_batch()
    flow_map = FlowMap(EDM(), CMPreconditioning(SD), random_network(), EDMInputScaling(SD))
    for objective in (CT(), ECT()):
        assert bool(objective(flow_map, batch).loss.isfinite().all())
    for path in (Linear(), EDM(0.01, 80.0)):
        with pytest.raises(ConfigError, match="CM preconditioning"):
            CT()(FlowMap(path, CMPreconditioning(SD), random_network()), batch)
    with pytest.raises(ConfigError, match="velocity"):
        SCT()(flow_map, batch)
    with pytest.raises(ConfigError, match="pi/2"):
        ECT()(FlowMap(EDM(), TrigPreconditioning(), random_network()), batch)


def test_bcm_and_euler_with_edms_scaling_are_one_objective() -> None:
    """They are the same map, and every loss and gradient of consistency training is a function of it."""
    batch, network = small_batch(), random_network()
    maps = [
        FlowMap(EDM(), EulerPreconditioning(), network, scalings(EDM())["edm"]),
        FlowMap(EDM(), BCMPreconditioning(SD), network, EDMInputScaling(SD)),
    ]
    for objective in (CT(), ECT(), SCT(), SCT(tangent=Tangent(warm_up_images=10))):
        losses = [objective(each, batch).loss for each in maps]
        close(*losses, rtol=1e-7)
        close(*(gradients(loss.sum(), each) for loss, each in zip(losses, maps, strict=True)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CT(first=0),
        lambda: CT(last=5),
        lambda: CT(target_decay=1.0),
        lambda: ECT(q=1),
        lambda: ECT(stages=0),
        lambda: ECT(label_dropout=2.0),
        lambda: Tangent(constant=0.0),
        lambda: Tangent(warm_up_images=-1),
        lambda: SCT(label_dropout=-0.5),
    ],
)
def test_settings_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


def test_all_run_in_float32() -> None:
    flow_map = FlowMap(Linear(), LinearPreconditioning(), random_network().float())
    batch = Batch(noise(16, 3).float(), None, draws(16))
    teacher = Companions(teacher=FlowMap(Linear(), LinearPreconditioning(), random_network().float()))
    for objective in (CT(), ECT(), SCT(), SCD()):
        loss = objective(flow_map, batch, teacher).loss
        assert loss.dtype == torch.float32
        assert bool(loss.isfinite().all())
