"""Forward mode is tried before it is trained on: a layer that cannot, or lets its tangent fall, gets differences."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.data.base import Dataset
from fewstep.flow.closed_form import MixtureData
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import EDM, LinearPathConfig
from fewstep.flow.preconditioning.estimation import EstimationSettings, estimate_statistics
from fewstep.flow.preconditioning.tangents import DenoiserTangents
from fewstep.objectives import EMD, ESD, ISD, LMD, LSD, PSD, SCT, MeanFlow, Objective
from fewstep.training import RunFolder, train_run
from fewstep.training.probe import derivatives, fault, needs_probe, with_derivatives
from fewstep.utils.errors import FewstepWarning
from tests.support.batches import labelled_batch
from tests.support.cases import F64, labelled_map, mixture, noise, slope
from tests.support.foreign_layers import Layer, WithLayerConfig, sine
from tests.support.objectives import made
from tests.support.tiny import RUNTIME, TEACHERLESS, TINY, assert_same_run, killed_after

DIFFERENTIATING: list[Any] = [MeanFlow(), ISD(), ESD(), LSD(), SCT(), EMD(), LMD()]
SAID = "forward-mode derivatives do not serve this network"


def layer_run(layer: Layer, objective: Objective = TINY.objective) -> Any:
    own = TINY.network
    network = WithLayerConfig(own.width, own.depth, embedding_width=own.embedding_width, layer=layer)  # type: ignore[attr-defined]
    return replace(TINY, network=network, objective=objective)


@pytest.mark.parametrize("objective", DIFFERENTIATING, ids=lambda each: type(each).__name__)
def test_an_objectives_derivatives_are_found_and_changed_wherever_they_lie(objective: Objective) -> None:
    assert needs_probe(objective)
    changed = with_derivatives(objective, "finite-difference")
    assert [each.kind for each in derivatives(changed)] == ["finite-difference"]
    assert with_derivatives(changed, "exact") == objective
    assert not needs_probe(changed)
    assert not needs_probe(PSD())


@pytest.mark.parametrize("objective", DIFFERENTIATING, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("layer", ["no-formula", "falling", "sound"])
def test_a_layer_is_told_from_one_that_serves(objective: Objective, layer: Layer) -> None:
    network = layer_run(layer).network.build((2,), 3, False).double()
    plain = labelled_map()
    flow_map = FlowMap(plain.path, plain.preconditioning, network, plain.scaling)
    reason = fault(objective, flow_map, labelled_batch(2))
    expected = {"no-formula": "jvp", "falling": r"off by \d+ %", "sound": "^$"}
    assert re.search(expected[layer], reason), reason


@pytest.mark.parametrize("bf16", [False, True])
def test_own_networks_serve(bf16: bool) -> None:
    """Under bf16 too, whose rounding is no fault."""
    plain = labelled_map()
    flow_map = FlowMap(plain.path, plain.preconditioning, plain.network.float(), plain.scaling)
    batch = labelled_batch(2)
    assert fault(ISD(), flow_map, replace(batch, x0=batch.x0.float()), bf16) == ""


def test_a_run_says_what_it_takes_instead_and_goes_on_with_it(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line at the first start, none when it goes on; the weights are those of the finite difference."""
    config = layer_run("no-formula")
    with pytest.warns(FewstepWarning, match=SAID) as said:
        killed_after(4, config, digits, tmp_path / "run", monkeypatch)
    assert len(said) == 1
    state = json.loads((RunFolder(tmp_path / "run").last_checkpoint() / "state.json").read_text())
    assert state["derivative"] == "finite-difference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_run(config, digits, RunFolder(tmp_path / "run"), RUNTIME)
        asked = replace(config, objective=made(ISD, **settings_of(TINY.objective), kind="finite-difference"))
        train_run(asked, digits, RunFolder(tmp_path / "asked"), RUNTIME)
    assert_same_run(tmp_path / "run", tmp_path / "asked")


def settings_of(objective: Any) -> dict[str, Any]:
    return {"pairs": objective.pairs, "guidance": objective.guidance}


@pytest.mark.parametrize("layer", ["no-formula", "falling"])
def test_statistics_of_a_teacher_without_forward_mode_are_by_differences(layer: Layer) -> None:
    """Those of the same teacher that has it, to their own error; and what was taken is kept with them."""
    data, settings = mixture(), EstimationSettings(points=12, samples=64, shrink=False)
    x0 = data.sample(torch.rand(256, dtype=F64, generator=torch.Generator().manual_seed(0)), noise(256, 2))

    def denoiser(own: Layer) -> Any:
        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return sine(data.denoise(EDM(), x, t), own)

        return denoise

    exact = estimate_statistics(denoiser("sound"), x0, settings=settings)
    with pytest.warns(FewstepWarning, match=SAID):
        found = estimate_statistics(denoiser(layer), x0, settings=settings)
    assert (exact.derivative, found.derivative) == ("exact", "finite-difference")
    torch.testing.assert_close(found.l, exact.l, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.s, exact.s, rtol=5e-3, atol=5e-3)


def test_differences_of_a_denoiser_are_of_order_two() -> None:
    data: MixtureData = mixture()
    y, tau = noise(8, 2, seed=3), torch.logspace(-2, 1.5, 8, dtype=F64)
    u, probe = noise(8, 2, seed=4), noise(8, 2, seed=5)
    ends, errors, steps = (0.002, 80.0), [], [0.08, 0.04]

    def denoise(y: Tensor, tau: Tensor) -> Tensor:
        return data.denoise(EDM(), y, tau)

    exact = DenoiserTangents(denoise, ends)
    for step in steps:
        own = DenoiserTangents(denoise, ends, "finite-difference", step)
        wrong = [
            own.change(y, tau, u) - exact.change(y, tau, u),
            own.along(y, tau, probe)[1] - exact.along(y, tau, probe)[1],
        ]
        errors.append(float(torch.cat(wrong).abs().max()))
    assert slope(steps, errors) == pytest.approx(2, abs=0.3)


def test_an_analytic_student_gets_its_statistics_by_differences(digits: Dataset, tmp_path: Path) -> None:
    """Its own untrained network's, refreshed: the run trains, whatever its layer lacks."""
    own = layer_run("no-formula")
    base = TEACHERLESS["isd-linear"]
    config = replace(base, network=own.network, model=replace(base.model, path=LinearPathConfig()))
    with pytest.warns(FewstepWarning, match=SAID):
        result = train_run(config, digits, RunFolder(tmp_path / "run"), RUNTIME)
    assert result.step == 10
