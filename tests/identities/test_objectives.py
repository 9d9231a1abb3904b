"""Objectives: the anchor's expected gradient at oracles, draws of times and labels, weights, splitting of batches."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep.flow.closed_form import GaussianData, GaussianOutput, MixtureData
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import DrawnGuidance, FixedGuidance, dropped, guide, omega_at
from fewstep.flow.paths import EDM, Linear, Path, Trig
from fewstep.flow.preconditioning.jumps import EulerPreconditioning, LinearPreconditioning
from fewstep.flow.times import LogitNormalTimes, LogNormalTimes, UniformTimes
from fewstep.networks.condition import NULL_LABEL, Condition
from fewstep.objectives import (
    CT,
    CTM,
    ECT,
    ESD,
    ISD,
    LSD,
    PSD,
    Batch,
    DiagonalMatching,
    MeanFlow,
    Objective,
    Pairs,
    Shortcut,
    Tangent,
)
from fewstep.objectives.base import STREAM_S, STREAM_T, is_diagonal
from fewstep.objectives.losses import Weighting, error_norm
from fewstep.recipes.config import OptimizerConfig
from fewstep.utils.errors import ConfigError
from tests.support.batches import LATE, draws, labelled_batch, part
from tests.support.cases import (
    F64,
    PAIRS,
    SD,
    Callback,
    close,
    labelled_map,
    mixture,
    noise,
    pair,
    random_network,
    scalings,
)
from tests.support.gradients import COUNT, assert_anchored, z_scores
from tests.support.objectives import changed, made

ANCHOR = made(ISD, times=UniformTimes(), flow_matching_ratio=1.0, weight_power=0.0, label_dropout=0.0)


@pytest.mark.parametrize(("path_name", "name"), PAIRS)
def test_the_anchors_expected_gradient_is_zero_at_the_oracle(path_name: str, name: str) -> None:
    """And not zero when the data move by half a unit; of iSD's anchor, and at one pair a path of flow matching."""
    assert_anchored(changed(ANCHOR, times=LATE), path_name, name, moved=0.5)
    if (path_name, name) in (("edm", "bcm"), ("linear", "linear"), ("trig", "trig"), ("vp", "euler")):
        assert_anchored(DiagonalMatching(times=LATE, label_dropout=0.0), path_name, name, moved=0.5)


@pytest.mark.parametrize(
    "objective", [ANCHOR, DiagonalMatching(times=UniformTimes(), label_dropout=0.0)], ids=["isd", "matching"]
)
@pytest.mark.parametrize(("path_name", "name"), [("linear", "linear"), ("trig", "trig"), ("vp", "bcm")])
def test_the_anchor_notices_data_that_move_by_a_tenth(objective: Objective, path_name: str, name: str) -> None:
    """At uniform times, where velocities are of one size."""
    assert_anchored(objective, path_name, name, moved=0.1)


def test_the_denoisers_expected_gradient_is_zero_at_the_oracle() -> None:
    path, preconditioning = pair("edm", "bcm")
    data = GaussianData(torch.tensor([0.4, -0.3], dtype=F64), SD)
    exact, x0 = GaussianOutput(data, path, preconditioning), data.mean + SD * noise(COUNT, 2, seed=5)
    objective = DiagonalMatching(times=UniformTimes(), measure="denoiser", sigma_data=SD, label_dropout=0.0)
    assert float(z_scores(objective, path, preconditioning, exact, Batch(x0, None, draws(COUNT))).abs().max()) < 4
    moved = Batch(x0 + 0.1, None, draws(COUNT))
    assert float(z_scores(objective, path, preconditioning, exact, moved).abs().max()) > 8


def two_classes(omega: float) -> tuple[Any, Tensor, Tensor]:
    """The exact guided network, v_null + omega (v_cond - v_null), of two labelled Gaussians; x0 and labels."""
    centres = torch.tensor([[-1.0], [0.8]], dtype=F64)
    data = MixtureData(torch.tensor([0.5, 0.5], dtype=F64), centres, torch.full((2,), 0.5, dtype=F64))

    def output(x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        labels = cond.labels
        null = data.velocity(Linear(), x, t)
        conditional = GaussianData(centres[labels.clamp(min=0)], 0.5).velocity(Linear(), x, t)
        return torch.where((labels >= 0)[:, None], null + omega * (conditional - null), null)

    labels = torch.arange(COUNT) % 2
    return output, centres[labels] + 0.5 * noise(COUNT, 1, seed=6), labels


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_guided_anchors_expected_gradient_is_zero_at_the_guided_oracle(dropout: float) -> None:
    exact, x0, labels = two_classes(2.0)
    batch, path = Batch(x0, labels, draws(COUNT)), Linear()
    guided = changed(ANCHOR, guidance=FixedGuidance(2.0), label_dropout=dropout)
    assert float(z_scores(guided, path, LinearPreconditioning(), exact, batch).abs().max()) < 4
    plain = changed(ANCHOR, label_dropout=dropout)
    assert float(z_scores(plain, path, LinearPreconditioning(), exact, batch).abs().max()) > 8


OBJECTIVES = [
    made(ISD, flow_matching_ratio=0.5),
    made(ISD, kind="finite-difference", norm="pseudo-huber", label_dropout=0.5),
    made(ISD, flow_matching_ratio=0.25, guidance=FixedGuidance(2.0, 0.2, 0.9)),
    ISD(guidance=DrawnGuidance()),
    DiagonalMatching(),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_do_not_depend_on_how_a_batch_is_split(objective: Objective) -> None:
    flow_map, batch = labelled_map(objective.guided), labelled_batch()
    whole = objective(flow_map, batch)
    assert bool((whole.loss > 0).all())
    for index in (torch.arange(4), torch.arange(4, 8), torch.tensor([6, 1, 3])):
        close(objective(flow_map, part(batch, index)).loss, whole.loss[index])


def test_the_whole_gradient_is_the_anchors_plus_the_distillations() -> None:
    """The tangent's velocity is detached, the anchor's is not."""
    flow_map, batch = labelled_map(), replace(labelled_batch(), labels=None)
    objective, weights = made(ISD, weight_power=0.0, flow_matching_ratio=0.25), list(flow_map.parameters())
    losses = objective(flow_map, batch)
    actual = torch.autograd.grad(losses.loss.sum(), weights, allow_unused=True)
    eps, t, s = batch.noise(), losses.t, losses.s
    x = flow_map.path.interpolate(batch.x0, eps, t)
    v = flow_map.velocity(x, t)
    anchor = (v - (eps - batch.x0)).square().mean(1).sum()
    compared = objective.off_diagonal(flow_map, x, v.detach(), t, s, Condition())
    distill = objective.weighting.measure(compared.error)
    total = anchor + distill[s < t].sum()
    expected = torch.autograd.grad(total, weights, allow_unused=True)
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, other)


def test_diagonal_samples_have_an_anchor_alone() -> None:
    flow_map, batch = labelled_map(), labelled_batch()
    losses = made(ISD, flow_matching_ratio=0.5, weight_power=0.0)(flow_map, batch)
    on_diagonal = losses.t == losses.s
    assert int(on_diagonal.sum()) == 4
    close(losses.loss[on_diagonal].detach(), losses.logs["anchor"][on_diagonal])
    rest = losses.logs["anchor"][~on_diagonal] + losses.logs["distill"]
    close(losses.loss[~on_diagonal].detach(), rest)


def test_a_diagonal_times_law_is_not_that_of_a_maximum() -> None:
    """On the diagonal t is one draw; off it the larger of two."""
    flow_map, batch = labelled_map(), Batch(noise(4000, 2), None, draws(4000))
    objective = made(ISD, times=UniformTimes(), flow_matching_ratio=0.5)
    t, s = objective.pairs.draw(flow_map.path, batch)
    u, w = batch.draws.uniform(STREAM_T), batch.draws.uniform(STREAM_S)
    on = t == s
    assert torch.equal(t[on], u[on])
    assert torch.equal(t[~on], torch.maximum(u, w)[~on])
    assert torch.equal(s[~on], torch.minimum(u, w)[~on])


@pytest.mark.parametrize("path", [Linear(), Trig(), EDM()], ids=str)
def test_a_share_of_the_jumps_goes_to_the_data_end(path: Path) -> None:
    batch = Batch(noise(4000, 2), None, draws(4000))
    plain = Pairs(UniformTimes(), 0.5).draw(path, batch)
    t, s = Pairs(UniformTimes(), 0.5, 0.4).draw(path, batch)
    ending = (s == path.t_min) & (t > s)
    assert abs(float(ending.double().mean()) - 0.2) < 0.02  # of half of the batch
    u = batch.draws.uniform(STREAM_T)
    assert torch.equal(t[ending], UniformTimes().quantile(path, u)[ending])
    assert all(torch.equal(new[~ending], old[~ending]) for new, old in zip((t, s), plain, strict=True))
    assert bool((s <= t).all())


@pytest.mark.parametrize("kind", [ISD, MeanFlow, ESD])
def test_an_objective_takes_that_share(kind: type[ISD | MeanFlow | ESD]) -> None:
    flow_map, batch = labelled_map(), labelled_batch()
    plain, ending = (made(kind, flow_matching_ratio=0.5, endpoint_share=share)(flow_map, batch) for share in (0.0, 1.0))
    off = plain.s < plain.t
    assert bool(off.any())
    assert bool((plain.s[off] > flow_map.path.t_min).all())
    assert bool((ending.s[off] == flow_map.path.t_min).all())
    assert torch.equal(ending.s[~off], plain.s[~off])
    for share in (-0.1, 1.5):
        with pytest.raises(ConfigError, match=f"endpoint share is {share}"):
            made(kind, endpoint_share=share)


def test_the_second_term_has_the_weight_that_is_asked_for() -> None:
    flow_map, batch = labelled_map(), labelled_batch()
    once, thrice = (
        made(ISD, flow_matching_ratio=0.5, weight_power=0.0, distill=weight)(flow_map, batch) for weight in (1.0, 3.0)
    )
    off = once.s < once.t
    distilled = once.terms["distill"]
    assert bool((distilled[off] > 0).all())
    close(thrice.loss, once.loss + 2 * distilled, 1e-12)
    assert torch.equal(thrice.loss[~off], once.loss[~off])
    with pytest.raises(ConfigError, match="distill is 0"):
        ISD(distill=0.0)


@given(size=st.integers(1, 60), data=st.data(), start=st.integers(0, 10**6))
def test_the_diagonal_share_is_exact_over_any_aligned_slice(size: int, data: st.DataObject, start: int) -> None:
    """A share k/n takes k of every n samples, wherever the slice begins."""
    chosen = data.draw(st.integers(0, size))
    indices = torch.arange(start * size, (start + 1) * size)
    assert int(is_diagonal(indices, chosen / size).sum()) == chosen


def test_the_diagonal_is_a_function_of_the_index() -> None:
    whole = is_diagonal(torch.arange(1000), 0.3)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(is_diagonal(order, 0.3), whole[order])
    assert torch.equal(is_diagonal(torch.arange(10_000, 10_100), 0.3), whole[:100])


def test_the_adaptive_weight_has_no_gradient() -> None:
    flow_map, batch = labelled_map(), labelled_batch()
    weights = [p for p in flow_map.parameters() if p.ndim == 2]
    plain, weighted = (made(ISD, weight_power=power)(flow_map, batch).loss for power in (0.0, 0.7))
    weight = (plain.detach() + 0.01) ** -0.7
    close(weighted, weight * plain)
    grads = torch.autograd.grad(weighted.sum(), weights)
    for one, other in zip(grads, torch.autograd.grad((weight * plain).sum(), weights), strict=True):
        close(one, other)
    loss = torch.tensor([0.0, 0.99], requires_grad=True)
    adaptive = Weighting(weight_power=1.0, weight_eps=0.01).weight(Linear(), loss, loss, 1)
    assert not adaptive.requires_grad
    close(adaptive, torch.tensor([100.0, 1.0]), rtol=1e-6)


@given(size=st.integers(1, 6), scale=st.floats(0.1, 10))
def test_pseudo_huber_lies_between_square_and_norm(size: int, scale: float) -> None:
    error = scale * noise(4, size)
    norm = error.square().sum(1).sqrt()
    root = math.sqrt(size)
    close(error_norm(error, "pseudo-huber", 1e-9), norm / root, rtol=1e-6)
    wide = 1e3 * scale
    close(error_norm(error, "pseudo-huber", wide), norm.square() / (2 * wide) / root, rtol=1e-4)
    close(error_norm(error, "l2", wide), norm.square() / size)


def test_label_dropout_has_its_frequency_and_spares_the_rest() -> None:
    labels = torch.arange(40_000) % 7
    kept = labels.clone()
    for probability in (0.0, 0.1, 0.5, 1.0):
        left = Condition(labels).drop(dropped(probability, draws(40_000))).labels
        assert left is not None
        off = left == NULL_LABEL
        error = math.sqrt(probability * (1 - probability) / 40_000)
        assert abs(float(off.double().mean()) - probability) <= 4 * error
        assert torch.equal(left[~off], labels[~off])
    assert torch.equal(labels, kept)


@pytest.mark.parametrize("path", [Linear(), EDM()], ids=["linear", "edm"])
def test_guidance_acts_inside_its_interval_on_labelled_samples(path: Path) -> None:
    row = torch.tensor([[math.log(3.0), 0.25, 0.75]], dtype=F64)
    t = path.time_from_unit(torch.tensor([0.1, 0.25, 0.5, 0.5, 0.75, 0.9], dtype=F64))
    kept = torch.tensor([True, True, True, False, True, True])
    close(omega_at(path, row.expand(6, 3), t, kept), torch.tensor([1, 3, 3, 1, 3, 1], dtype=F64))
    ends = torch.tensor([path.t_min, path.t_max], dtype=F64)
    full = torch.tensor([[math.log(3.0), 0.0, 1.0]], dtype=F64).expand(2, 3)
    close(omega_at(path, full, ends, torch.ones(2).bool()), torch.full((2,), 3.0, dtype=F64))
    null, conditional = noise(2, 3), noise(2, 3, seed=1)
    close(guide(null, conditional, torch.tensor([1.0, 0.0], dtype=F64)), torch.stack([conditional[0], null[1]]))


def test_drawn_guidance_has_its_distribution() -> None:
    log_omega, low, high = DrawnGuidance(8.0, full=0.4).draw(draws(20_000)).unbind(1)
    whole = (low == 0) & (high == 1)
    assert float(whole.double().mean()) == pytest.approx(0.4, abs=0.015)
    assert float(log_omega.mean()) == pytest.approx(math.log(8) / 2, abs=0.03)
    assert 0 < float(log_omega.min()) < float(log_omega.max()) < math.log(8)
    assert float(low[~whole].mean()) == pytest.approx(0.25, abs=0.01)
    assert float(high[~whole].mean()) == pytest.approx(0.75, abs=0.01)
    assert 0 <= float(low.min()) < float(low.max()) <= 0.5 <= float(high.min()) < 1


def test_the_denoisers_loss_has_edms_weight() -> None:
    """(sigma^2 + sd^2)/(sigma sd)^2 |D - x0|^2."""
    path, objective = (
        EDM(),
        DiagonalMatching(times=UniformTimes(), measure="denoiser", sigma_data=SD, label_dropout=0.0),
    )
    flow_map = FlowMap(path, EulerPreconditioning(path), random_network((2,)), scalings(path)["edm"])
    batch = Batch(noise(6, 2), None, draws(6))
    losses = objective(flow_map, batch)
    t = losses.t
    x = path.interpolate(batch.x0, batch.noise(), t)
    weight = (t**2 + SD**2) / (t * SD) ** 2
    close(losses.loss, weight * (flow_map.output(x, t, t) - batch.x0).square().mean(1), rtol=1e-6)


def test_the_anchor_at_a_mixtures_oracle_is_its_conditional_variance() -> None:
    """Where the map is exact, what is left is E|v* - E[v*|x_t]|^2: less than any other map's loss."""
    data, path = mixture(), Linear()
    u = draws(20_000).uniform(70)
    x0 = data.sample(u, noise(20_000, 2, seed=8))
    batch = Batch(x0, None, draws(20_000))
    maps = [Callback(lambda x, t, s, c, b=b: data.velocity(path, x, t) * b) for b in (0.9, 1.0, 1.1)]
    low, best, high = (float(ANCHOR(FlowMap(path, LinearPreconditioning(), m), batch).mean()) for m in maps)
    assert best < min(low, high)


def test_drawn_guidance_needs_a_network_that_takes_it() -> None:
    with pytest.raises(ConfigError, match="guided=True"):
        ISD(guidance=DrawnGuidance())(labelled_map(), labelled_batch())


def test_a_denoisers_deviation_is_stated_or_measured() -> None:
    with pytest.raises(ConfigError, match="sigma_data"):
        DiagonalMatching(measure="denoiser")(labelled_map(), labelled_batch())


@pytest.mark.parametrize(
    "make",
    [
        lambda: LogitNormalTimes(std=-1.0),
        lambda: LogitNormalTimes(mean=math.nan),
        lambda: LogNormalTimes(std=0.0),
        lambda: made(ISD, weight_eps=math.inf),
        lambda: DiagonalMatching(sigma_data=-1.0),
        lambda: OptimizerConfig(lr=math.inf),
        lambda: made(ISD, step=math.nan),
    ],
)
def test_settings_out_of_their_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="positive"):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *(
            (lambda kind=kind: made(kind, weight_power=-1.0), "weight_power is -1.0")
            for kind in (ISD, MeanFlow, ESD, LSD, PSD, Shortcut)
        ),
        (lambda: made(ISD, weight_power=math.nan), "weight_power is nan"),
        (lambda: FixedGuidance(math.inf), "finite omega"),
        (lambda: DrawnGuidance(math.inf), "finite omega_max"),
        (lambda: ECT(k=math.nan), "k is nan"),
        (lambda: ECT(b=math.inf), "b is inf"),
        (lambda: CTM(denoising=math.nan), "finite and at least 0"),
        (lambda: made(ISD, norm="huber"), "norm is 'huber'; choose one of l2, pseudo-huber"),  # type: ignore[arg-type]
        (lambda: made(CT, kind="huber"), "distance is 'huber'"),  # type: ignore[arg-type]
        (lambda: made(MeanFlow, kind="fd"), "derivative is 'fd'; choose one of exact"),  # type: ignore[arg-type]
        (lambda: made(Tangent, kind="fd"), "derivative is 'fd'"),  # type: ignore[arg-type]
        (lambda: PSD(u="center"), "u is 'center'; choose one of uniform, midpoint"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
