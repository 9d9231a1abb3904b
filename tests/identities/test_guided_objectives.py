"""Guidance, fixed and drawn, label dropout and split batches, for all objectives that train a map of two times."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.flow.closed_form import GaussianData, GaussianOutput
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import DrawnGuidance, FixedGuidance, TrainingGuidance, dropped
from fewstep.flow.paths import EDM, Linear, Path, Trig
from fewstep.flow.preconditioning.base import Preconditioning
from fewstep.flow.preconditioning.jumps import EulerPreconditioning, LinearPreconditioning, TrigPreconditioning
from fewstep.networks.base import Network
from fewstep.networks.condition import NULL_LABEL, Condition
from fewstep.objectives import (
    CD,
    CT,
    CTM,
    ECT,
    ESD,
    ISD,
    LSD,
    PSD,
    SCD,
    SCT,
    Batch,
    Companions,
    MeanFlow,
    Objective,
    Shortcut,
    Tangent,
    TeacherSteps,
)
from fewstep.objectives.distillation import teacher_denoiser
from fewstep.utils.errors import ConfigError
from tests.support.batches import draws, labelled_batch, part
from tests.support.cases import F64, Callback, close, labelled_map, noise, random_network, scalings
from tests.support.objectives import changed, made

COUNT = 40_000
SPREAD = 0.5
CENTRES, NULL = torch.tensor([[-1.0], [0.8]], dtype=F64), 0.2
GUIDANCE: dict[str, TrainingGuidance] = {"fixed": FixedGuidance(2.0), "drawn": DrawnGuidance(4.0, full=1.0)}
GUIDED: dict[str, Any] = {
    "meanflow": made(MeanFlow, flow_matching_ratio=0.0, weight_power=0.0, label_dropout=0.0),
    "meanflow's diagonal": made(MeanFlow, flow_matching_ratio=1.0, weight_power=0.0, label_dropout=0.0),
    "esd": made(ESD, flow_matching_ratio=0.0, label_dropout=0.0),
    "isd": made(ISD, flow_matching_ratio=0.0, weight_power=0.0, label_dropout=0.0),
    "isd's diagonal": made(ISD, flow_matching_ratio=1.0, weight_power=0.0, label_dropout=0.0),
    "lsd": made(LSD, flow_matching_ratio=1.0, label_dropout=0.0),
    "psd": made(PSD, flow_matching_ratio=1.0, label_dropout=0.0),
    "shortcut": Shortcut(bootstrap=0.0, target_decay=None, label_dropout=0.0),
    "scd": SCD(tangent=Tangent(normalise=False)),
}


class GuidedOracle(Network):
    """The exact guided map of two labelled Gaussians of one width, and a Gaussian for the null label.

    Velocities of such Gaussians are linear in their means: the guided one is that of the mean null + omega (c - null).
    omega: None takes the strength of the condition, to the power `response`. theta (2, B, 1) moves the outputs of
    class 1 where the whole batch is evaluated with gradient.
    """

    def __init__(
        self, path: Path, preconditioning: Preconditioning, omega: float | None, theta: Tensor, response: float = 1.0
    ) -> None:
        super().__init__((1,), 2, guided=omega is None)
        self.path, self.preconditioning, self.theta = path, preconditioning, theta
        self.omega, self.response = omega, response

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        assert cond is not None
        assert cond.labels is not None
        assert (cond.guidance is None) is not self.guided
        fixed = torch.tensor([[self.omega or 1.0]], dtype=F64)
        omega = fixed if cond.guidance is None else (self.response * cond.guidance[:, :1]).exp()
        known = (cond.labels >= 0)[:, None]
        mean = torch.where(known, NULL + omega * (CENTRES[cond.labels.clamp(min=0)] - NULL), NULL)
        exact: Tensor = GaussianOutput(GaussianData(mean, SPREAD), self.path, self.preconditioning)(x, t, s)
        if len(x) < self.theta.shape[1] or not torch.is_grad_enabled():
            return exact
        return exact + (cond.labels == 1)[:, None] * (self.theta[0] + self.theta[1] * x)


def guided_scores(objective: Objective, path: Path, preconditioning: Preconditioning, *strength: Any) -> Tensor:
    """z-scores of the expected gradient at the guided oracle; strength: its omega, and response."""
    theta = torch.zeros(2, COUNT, 1, dtype=F64, requires_grad=True)
    omega, *response = strength
    flow_map = FlowMap(path, preconditioning, GuidedOracle(path, preconditioning, omega, theta, *response))
    teacher = FlowMap(path, preconditioning, GuidedOracle(path, preconditioning, 1.0, theta.detach()))
    labels = torch.arange(COUNT) % 2
    batch = Batch(CENTRES[labels] + SPREAD * noise(COUNT, 1, seed=6), labels, draws(COUNT))
    losses = objective(flow_map, batch, Companions(teacher=teacher))
    found = torch.autograd.grad(losses.loss.sum(), theta)[0].squeeze(-1)[:, labels == 1]
    return found.mean(1) / (found.std(1).clamp(min=1e-9) / math.sqrt(COUNT / 2))


@pytest.mark.parametrize("kind", GUIDANCE)
@pytest.mark.parametrize("name", GUIDED)
def test_guidances_expected_gradient_is_zero_at_the_guided_oracle(name: str, kind: str) -> None:
    """And not at the unguided one; a network that takes the strength is right for every strength at once."""
    right, wrong = ((2.0,), (1.0,)) if kind == "fixed" else ((None, 1.0), (None, 0.0))
    objective = replace(GUIDED[name], guidance=GUIDANCE[kind])
    assert objective.guided == (kind == "drawn")
    for path, preconditioning in ((Linear(), LinearPreconditioning()), (Trig(0.7), TrigPreconditioning())):
        assert float(guided_scores(objective, path, preconditioning, *right).abs().max()) < 4
        assert float(guided_scores(objective, path, preconditioning, *wrong).abs().max()) > 8
        if kind == "drawn":  # without guidance such a network is told that omega is 1
            assert float(guided_scores(GUIDED[name], path, preconditioning, *right).abs().max()) < 4


def oracles(omega: float) -> FlowMap:
    """The exact map of the guided Gaussians."""
    path = EDM()
    kind = EulerPreconditioning()
    return FlowMap(path, kind, GuidedOracle(path, kind, omega, torch.zeros(2, 1, 1, dtype=F64)))


@pytest.mark.parametrize("omega", [1.0, 2.0])
def test_a_guided_teacher_is_the_formulas(omega: float) -> None:
    """D_null + omega (D - D_null), which for Gaussians of one width is exact; omega 1 changes no bit."""
    x, t, labels = noise(8, 1, seed=2), torch.linspace(0.1, 20.0, 8, dtype=F64), torch.arange(8) % 3 - 1
    cond = Condition(labels, torch.tensor([[math.log(omega), 0.0, 1.0]], dtype=F64).expand(8, 3))
    found = teacher_denoiser(EDM(), oracles(1.0))(x, t, cond)
    close(found, oracles(omega).denoise(x, t, Condition(labels)), rtol=1e-12)
    if omega == 1:
        assert torch.equal(found, oracles(1.0).denoise(x, t, Condition(labels)))


@pytest.mark.parametrize("objective", [CD, CTM])
def test_a_guided_teacher_is_met_by_the_guided_map(objective: type[CD] | type[CTM]) -> None:
    """To the solver's error along the grid, and exactly where the denoising loss looks; the unguided map is far off."""
    labels = torch.arange(256) % 2
    batch = Batch(CENTRES[labels] + SPREAD * noise(256, 1, seed=6), labels, draws(256))
    distil = objective(guidance=FixedGuidance(2.0), steps=TeacherSteps(points=80, u="adjacent"))
    if isinstance(distil, CTM):
        distil = replace(distil, balance=False, sigma_data=SPREAD)
    right, wrong = (
        distil(oracles(omega), batch, Companions(teacher=oracles(1.0), ema_target=oracles(omega)))
        for omega in (2.0, 1.0)
    )
    assert float(right.logs["consistency"].mean()) < 1e-3 * float(wrong.logs["consistency"].mean())
    if isinstance(distil, CTM):
        assert float(right.logs["denoising"].max()) < 1e-20
        assert float(wrong.logs["denoising"].mean()) > 1e-3


@pytest.mark.parametrize("name", GUIDED)
def test_drawn_guidance_needs_a_network_that_takes_it(name: str) -> None:
    objective, teacher = replace(GUIDED[name], guidance=DrawnGuidance()), Companions(teacher=labelled_map())
    with pytest.raises(ConfigError, match="guided=True"):
        objective(labelled_map(), labelled_batch(), teacher)


ALL: list[Any] = [
    made(MeanFlow, flow_matching_ratio=0.5),
    made(MeanFlow, flow_matching_ratio=0.25, guidance=FixedGuidance(2.0, 0.2, 0.9), kind="finite-difference"),
    made(ESD, flow_matching_ratio=0.5, guidance=DrawnGuidance()),
    made(LSD, flow_matching_ratio=0.5, guidance=DrawnGuidance(), label_dropout=0.4),
    made(LSD, flow_matching_ratio=0.25, kind="finite-difference", norm="pseudo-huber"),
    made(PSD, u="midpoint", flow_matching_ratio=0.5, guidance=FixedGuidance(2.0)),
    made(PSD, u="uniform", flow_matching_ratio=0.5, guidance=DrawnGuidance(), weight_power=1.0),
    Shortcut(bootstrap=0.5, guidance=FixedGuidance(2.0)),
    Shortcut(bootstrap=0.5, guidance=DrawnGuidance(), target_decay=None),
    CT(label_dropout=0.3),
    ECT(label_dropout=0.3),
    SCT(label_dropout=0.3),
    SCD(guidance=DrawnGuidance(), label_dropout=0.3),
    SCD(guidance=FixedGuidance(3.0)),
]


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_losses_do_not_depend_on_how_a_batch_is_split(objective: Objective) -> None:
    flow_map, batch = labelled_map(objective.guided), replace(labelled_batch(), images=5000)
    companions = Companions(teacher=labelled_map(), ema_target=labelled_map(objective.guided))
    whole = objective(flow_map, batch, companions)
    assert bool((whole.loss > 0).all())
    for index in (torch.arange(4), torch.arange(4, 8), torch.tensor([6, 1, 3])):
        own = replace(part(batch, index), images=5000)
        close(objective(flow_map, own, companions).loss, whole.loss[index])
        assert own.images == batch[index].images
        assert torch.equal(own.x0, batch[index].x0)


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_labels_are_dropped_with_the_objectives_probability(objective: Any) -> None:
    """Every evaluation with a graph sees the batch's labels with the same ones dropped."""
    dropping, seen = changed(objective, label_dropout=0.4, **unguided(objective)), []
    network = random_network((2,), 3)

    def output(x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        seen.append((cond.labels, torch.is_grad_enabled()))
        return network(x, t, s, cond)

    flow_map = FlowMap(Linear(), LinearPreconditioning(), Callback(output), scalings(Linear())["unit"])
    batch = labelled_batch(400)
    dropping(flow_map, batch, Companions(teacher=labelled_map(), ema_target=labelled_map()))
    expected = torch.where(dropped(0.4, batch.draws), NULL_LABEL, batch.labels)  # type: ignore[arg-type]
    share = float((expected == NULL_LABEL).double().mean())
    assert share == pytest.approx(0.4, abs=0.08)
    assert dropping.label_dropout == 0.4
    calls = [labels for labels, graph in seen if graph and labels is not None and len(labels) % 400 == 0]
    assert all(torch.equal(labels[:400], expected) for labels in calls)
    halves = [labels for labels, graph in seen if graph and labels is not None and len(labels) % 400]
    found = sum(int((labels == NULL_LABEL).sum()) for labels in halves)
    total = sum(len(labels) for labels in halves)
    assert calls or halves
    assert not total or found / total == pytest.approx(share, abs=0.1)


def unguided(objective: Any) -> dict[str, Any]:
    """Guidance that leaves the network as it is, where the objective takes any."""
    return {"guidance": FixedGuidance(1.0)} if not isinstance(objective, CT | ECT | SCT) else {}
