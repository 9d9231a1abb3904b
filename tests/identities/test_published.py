"""Published losses of iSD-T and MeanFlow, written out from their formulas: loss and gradient of a batch agree."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import FixedGuidance
from fewstep.flow.paths import Linear, Trig
from fewstep.flow.preconditioning.jumps import LinearPreconditioning, TrigPreconditioning
from fewstep.flow.preconditioning.network_scaling import IdentityScaling, UnitScaling
from fewstep.networks.condition import NULL_LABEL, Condition
from fewstep.objectives import ISD, Batch, MeanFlow
from fewstep.recipes import recipe
from tests.support.batches import draws
from tests.support.cases import F64, close, noise, random_network
from tests.support.gradients import gradients
from tests.support.objectives import changed, made

COUNT, SIZE, STEP = 64, 6, 0.005
LABELS = torch.arange(COUNT) % 3


def batch() -> Batch:
    return Batch(0.4 + 0.6 * noise(COUNT, SIZE), LABELS, draws(COUNT))


def mean_square(error: Tensor) -> Tensor:
    return (error**2).sum(1) / SIZE


def kept_labels(own: Batch) -> Tensor:
    """A tenth of the labels is null."""
    return torch.where(own.draws.uniform(43) < 0.1, NULL_LABEL, LABELS)


def central_difference(flow_map: FlowMap, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
    """(N(x + h v, t + h, s) - N(x - h v, t - h, s)) / 2h, h = 0.005, without gradient."""
    with torch.no_grad():
        ahead, behind = (flow_map.output(x + h * v, t + h, s, cond) for h in (STEP, -STEP))
        return (ahead - behind) / (2 * STEP)


def inside(t: Tensor, s: Tensor, end: float) -> Tensor:
    """Where the published code's central difference stays within the jump."""
    return (t + STEP <= end) & (t - STEP >= s) & (t - s > 3 * STEP)


def test_the_loss_of_dit_b4() -> None:
    """Trig path; v* = v_null + 5 (v - v_null) on every sample; (loss + 0.01)^-1; N - sg(N + cos d (v - N) - ...)."""
    own, objective, path = batch(), recipe("imagenet256-dit-b4").objective, Trig()
    flow_map = FlowMap(path, TrigPreconditioning(), random_network((SIZE,), 3), UnitScaling(1.0))
    losses = objective(flow_map, own)
    t, s, eps, cond = losses.t, losses.s, own.noise(), Condition(kept_labels(own))
    assert int((cond.labels == NULL_LABEL).sum()) > 2  # type: ignore[union-attr]
    cos, sin = t.cos()[:, None], t.sin()[:, None]
    x, v = cos * own.x0 + sin * eps, cos * eps - sin * own.x0
    null = flow_map.output(x, t, t, Condition(torch.full_like(LABELS, NULL_LABEL))).detach()
    own_v, output = flow_map.output(x, t, t, cond), flow_map.output(x, t, s, cond)
    d_output = central_difference(flow_map, x, own_v.detach(), t, s, cond)
    gap = (t - s)[:, None]
    target = (output + gap.cos() * (own_v - output) - gap.sin() * (x + d_output)).detach()
    total = mean_square(own_v - (null + 5 * (v - null))) + mean_square(output - target)
    compare(losses.loss, total / (total.detach() + 0.01), flow_map, inside(t, s, math.pi / 2))


def test_the_loss_of_dit_xl1() -> None:
    """Linear path; cos(pi t/2) (|v - v*|^2 + 1 - cos(v, v*) + sqrt(|N - N_target|^2 + 25) - 5), strengths drawn."""
    own, objective = batch(), recipe("imagenet256-dit-xl1").objective
    network = random_network((SIZE,), 3, guided=True)
    flow_map = FlowMap(Linear(), LinearPreconditioning(), network, IdentityScaling())
    losses = objective(flow_map, own)
    t, s, eps = losses.t, losses.s, own.noise()
    low, high = own.draws.uniform(41) / 2, (1 + own.draws.uniform(42)) / 2
    acts = (t >= low) & (t <= high)
    assert 0 < int(acts.sum()) < COUNT
    log_omega = torch.where(acts, own.draws.uniform(40) * math.log(8), 0.0)
    fed = torch.stack([log_omega, low, high], 1)
    cond, without = Condition(kept_labels(own), fed), Condition(torch.full_like(LABELS, NULL_LABEL), fed)
    x, v = (1 - t)[:, None] * own.x0 + t[:, None] * eps, eps - own.x0
    null = flow_map.output(x, t, t, without).detach()
    wanted = torch.where(acts[:, None], null + log_omega.exp()[:, None] * (v - null), v)
    own_v, output = flow_map.output(x, t, t, cond), flow_map.output(x, t, s, cond)
    d_output = central_difference(flow_map, x, own_v.detach(), t, s, cond)
    target = own_v.detach() - (t - s)[:, None] * d_output
    cosine = (own_v * wanted).sum(1) / (own_v.norm(dim=1) * wanted.norm(dim=1))
    anchor = mean_square(own_v - wanted) + 1 - cosine
    distill = torch.sqrt(mean_square(output - target) + 25) - 5
    compare(losses.loss, torch.cos(math.pi * t / 2) * (anchor + distill), flow_map, inside(t, s, 1.0))


def compare(actual: Tensor, expected: Tensor, flow_map: FlowMap, rows: Tensor) -> None:
    """Loss and gradient of the samples away from the ends, to 1e-6."""
    assert int(rows.sum()) > COUNT / 2
    close(actual[rows], expected[rows], rtol=1e-6)
    close(*(gradients(loss[rows].sum(), flow_map) for loss in (actual, expected)), rtol=1e-6, atol=1e-8)


def test_the_loss_of_meanflow() -> None:
    """S / (sg S + 0.001), S the sum of squares of u - (v - (t - s)(J_u v + d_t u)); flow matching where s = t."""
    own = replace(batch(), labels=None)
    flow_map = FlowMap(Linear(), LinearPreconditioning(), random_network((SIZE,)), IdentityScaling())
    losses = made(MeanFlow, eps_of_sum=True)(flow_map, own)
    t, s, eps = losses.t, losses.s, own.noise()
    x, v = (1 - t)[:, None] * own.x0 + t[:, None] * eps, eps - own.x0
    output, tangent = torch.func.jvp(lambda x, t: flow_map.output(x, t, s), (x, t), (v, torch.ones_like(t)))
    total = ((output - (v - (t - s)[:, None] * tangent).detach()) ** 2).sum(1)
    compare(losses.loss, total / (total.detach() + 0.001), flow_map, torch.ones(COUNT, dtype=torch.bool))


def test_null_rows_are_guided_where_that_is_asked_for() -> None:
    """They change what a batch teaches: without labels every target is pushed from the model's own velocity."""
    own = replace(batch(), labels=torch.full((COUNT,), NULL_LABEL))
    flow_map = FlowMap(Linear(), LinearPreconditioning(), random_network((SIZE,), 3), IdentityScaling())
    plain, spared, guided = (
        made(ISD, guidance=guidance, weight_power=0.0)(flow_map, own).loss
        for guidance in (FixedGuidance(1.0), FixedGuidance(5.0), FixedGuidance(5.0, null_rows=True))
    )
    assert torch.equal(plain, spared)
    assert float((plain - guided).abs().min().detach()) > 1e-4


@pytest.mark.parametrize("rows", [slice(0, 8), slice(8, COUNT)])
def test_the_weight_by_time_is_the_samples_own(rows: slice) -> None:
    own, flow_map = batch(), FlowMap(Linear(), LinearPreconditioning(), random_network((SIZE,), 3), IdentityScaling())
    plain = made(ISD, weight_power=0.0)
    once, weighted = plain(flow_map, own), changed(plain, time_weight="cosine")(flow_map, own)
    close(weighted.loss[rows], (torch.cos(0.5 * math.pi * once.t) * once.loss)[rows])
    assert once.t.dtype == F64
