"""Flow maps from a teacher: zero loss at its exact map on every path, and where its velocity counts."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep.flow.derivatives import Derivative
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import FixedGuidance
from fewstep.flow.paths import Linear
from fewstep.flow.preconditioning.analytic import AnalyticPreconditioning
from fewstep.flow.preconditioning.base import Preconditioning
from fewstep.flow.preconditioning.jumps import EulerPreconditioning, LinearPreconditioning
from fewstep.networks.condition import NULL_LABEL, Condition
from fewstep.objectives import EMD, LMD, Batch, Companions, MeanFlow, eulerian_error
from fewstep.objectives.scm import TeacherVelocity
from fewstep.utils.errors import ConfigError
from tests.support.batches import draws, labelled_batch
from tests.support.cases import (
    PAIRS,
    PATHS,
    SD,
    close,
    gaussian,
    labelled_map,
    noise,
    preconditionings,
    random_map,
    random_network,
)
from tests.support.gradients import gradients
from tests.support.objectives import changed, made
from tests.support.statistics import wavy

COUNT = 32
BARE: dict[str, Any] = {"weight_power": 0.0, "flow_matching_ratio": 0.25}
PLAIN = made(EMD, **BARE, normalise=False)
OBJECTIVES: dict[str, Any] = {
    "emd": PLAIN, "emd-normalised": made(EMD, **BARE), "emd-own": replace(PLAIN, velocity="own"),
    "lmd": made(LMD, **BARE),
}  # fmt: skip
MAPS = [*PAIRS, *((name, "analytic") for name in PATHS)]


def batch() -> Batch:
    return Batch(0.4 + SD * noise(COUNT, 3), None, draws(COUNT))


def preconditioning(path_name: str, name: str) -> Preconditioning:
    path = PATHS[path_name]
    return AnalyticPreconditioning(wavy(), "backward", path) if name == "analytic" else preconditionings(path)[name]


def taught_by(path_name: str, mean: float = 0.4) -> Companions:
    path = PATHS[path_name]
    return Companions(teacher=gaussian(mean).flow_map(path, EulerPreconditioning(path)))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("each", MAPS, ids="-".join)
def test_the_loss_is_zero_at_the_teachers_exact_map_and_not_at_anothers(objective: Any, each: tuple[str, str]) -> None:
    """The teacher's path may be another; one of other data gives a loss, of samples with s = t and of the others."""
    path, own = PATHS[each[0]], preconditioning(*each)
    exact = gaussian().flow_map(path, own)
    others = {"edm": "edm", "linear": "trig", "trig": "edm", "vp": "vp"}
    losses = objective(exact, batch(), taught_by(others[each[0]]))
    assert float(losses.loss.abs().max()) < 1e-7
    wrong = objective(exact, batch(), taught_by(others[each[0]], mean=0.9))
    assert float(wrong.logs["anchor"].max()) > 1e-3
    assert (float(wrong.logs["distill"].max()) > 1e-3) == (objective.__dict__.get("velocity") != "own")


@pytest.mark.parametrize("kind", [PLAIN, made(LMD, **BARE)], ids=["emd", "lmd"])
def test_a_finite_difference_serves_too(kind: Any) -> None:
    """Its error is of order 2 in the step: its square of order 4."""
    exact = gaussian().flow_map(Linear(), LinearPreconditioning())
    found = []
    for step in (0.04, 0.02):
        derivative = Derivative("finite-difference", step)
        within = {"tangent": replace(kind.tangent, derivative=derivative)} if isinstance(kind, EMD) else {}
        objective = changed(kind, **(within or {"derivative": derivative}))
        found.append(float(objective(exact, batch(), taught_by("linear")).logs["distill"].sqrt().mean()))
    assert 2.5 < found[0] / found[1] < 6


@pytest.mark.parametrize("endpoint_share", [0.0, 1.0])
@pytest.mark.parametrize("kind", [EMD, LMD])
def test_jumps_to_the_very_end_have_a_target(kind: Any, endpoint_share: float) -> None:
    """At sigma = 0 a teacher that denoises has no velocity: the next that it has stands for it."""
    exact = gaussian().flow_map(Linear(), LinearPreconditioning())
    objective = made(kind, **BARE, endpoint_share=endpoint_share)
    for name in PATHS:
        assert float(objective(exact, batch(), taught_by(name)).loss.max()) < 1e-3


def test_the_linear_target_is_the_papers() -> None:
    """AYF-EMD: N - sg(v_teacher - r (t - s) dN/dt), divided by its rms + c; loss and gradient agree."""
    student, companions = FlowMap(Linear(), LinearPreconditioning(), random_network()), taught_by("linear")
    warming = made(EMD, flow_matching_ratio=0.0, warm_up_images=1000)
    own = replace(batch(), images=300)
    losses = warming(student, own, companions)
    t, s = losses.t, losses.s
    x = own.x0 + t[:, None] * (own.noise() - own.x0)
    v = gaussian().velocity(Linear(), x, t)
    output, d_output = Derivative().along(student, x, v, t, s, Condition())
    step = (v - output - 0.3 * (t - s)[:, None] * d_output).detach()
    step = step / (step.square().mean(1).sqrt() + 0.1)[:, None]
    expected = (output - (output.detach() + step)).square().mean(1)
    close(losses.loss, expected)
    close(*(gradients(loss.sum(), student) for loss in (losses.loss, expected)), rtol=1e-8)


@pytest.mark.parametrize("each", PAIRS, ids="-".join)
def test_neither_warmed_up_nor_normalised_it_is_meanflow_with_the_teachers_velocity(each: tuple[str, str]) -> None:
    student, own = random_map(*each), batch()
    t, s = (student.path.time_from_unit(torch.full((COUNT,), u, dtype=torch.float64)) for u in (0.7, 0.2))
    teacher = TeacherVelocity(student.path, gaussian().flow_map(student.path, preconditioning(*each)))
    x = student.path.interpolate(own.x0, own.noise(), t)
    v = gaussian().velocity(student.path, x, t)
    output, d_output = MeanFlow().derivative.along(student, x, v, t, s, Condition())
    expected = eulerian_error(student, x, v, output, d_output, t, s).error
    close(PLAIN.off_diagonal(student, teacher, own, t, s).error, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", [EMD, LMD])
def test_the_teacher_gets_no_gradient_and_the_student_its_own(kind: Any) -> None:
    student, teacher = random_map(), random_map()
    made(kind, **BARE)(student, batch(), Companions(teacher=teacher)).mean().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(p.grad is not None for name, p in student.named_parameters() if "labels" not in name)


@pytest.mark.parametrize("kind", [EMD, LMD])
def test_a_guided_teacher_is_followed(kind: Any) -> None:
    """Strength 3 is another target for samples with a label, and none for those without."""
    student, companions, own = labelled_map(), Companions(teacher=labelled_map()), labelled_batch(COUNT)
    bare = replace(own, labels=torch.full_like(own.labels, NULL_LABEL))
    for data, differs in ((own, True), (bare, False)):
        plain, guided = (
            made(kind, **BARE, guidance=guidance)(student, data, companions).loss
            for guidance in (FixedGuidance(1.0), FixedGuidance(3.0))
        )
        assert bool(torch.equal(plain, guided)) != differs


def test_the_models_own_velocity_alone_is_no_teacher() -> None:
    """Without samples at s = t nothing ties it to the teacher."""
    assert not made(EMD, velocity="own", flow_matching_ratio=0.0).anchored
    assert made(EMD, flow_matching_ratio=0.0).anchored
    assert made(EMD, velocity="own").anchored
    with pytest.raises(ConfigError, match="velocity"):
        made(EMD, velocity="model")
    with pytest.raises(ConfigError, match="--teacher"):
        EMD()(random_map(), batch())
