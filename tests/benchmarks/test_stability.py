"""The stability study: its cells can be trained, its own objectives are what they say, its tables count rightly."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.stability import __main__ as tables
from benchmarks.stability import measure, plan
from benchmarks.stability.plan import ISDApart, TimeUnitError
from fewstep.data.sources import load_dataset
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import Trig
from fewstep.flow.preconditioning.jumps import TrigPreconditioning
from fewstep.flow.preconditioning.network_scaling import UnitScaling
from fewstep.networks.mlp import MLPConfig
from fewstep.objectives import ISD, Batch, Losses
from fewstep.utils.random import Draws
from fewstep.utils.serialization import to_json
from tests.support.objectives import changed, made


def test_every_cell_of_the_plan_has_a_configuration() -> None:
    cells = list(plan.plan())
    for cell in cells:
        config = plan.configuration(cell, "runs/some" if cell.initial == "flow matching" else "")
        assert config.training.images == plan.STUDIES[cell.dataset, cell.network].steps * config.training.batch_size
        to_json(config)
    assert max(cell.lr for cell in cells) / min(cell.lr for cell in cells) == pytest.approx(30)
    names = {cell.objective for cell in cells if cell.group == "base"}
    assert {"iSD", "iSD-T", "MeanFlow", "ESD", "LSD", "PSD", "shortcut", "CT", "ECT", "sCT"} <= names


def test_a_cell_is_trained_and_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At four moments, in 1, 2 and 4 calls; the last has the diagonal's own ODE too."""
    cell = plan.Cell("base", "iSD")
    short = replace(plan.STUDIES["digits", "mlp"], steps=8, batch=4)
    monkeypatch.setitem(plan.STUDIES, ("digits", "mlp"), short)
    figures = {"frechet": 4.0, "accuracy": 0.9, "spread": 1.0, "within": 0.2}
    reference: Any = SimpleNamespace(
        dataset=load_dataset(short.data), extractor=SimpleNamespace(name="none"), measure=lambda *given: dict(figures)
    )
    found = measure.train_cell(cell, plan.configuration(cell, ""), reference, tmp_path)
    moments = [(step, nfe) for step in (2, 4, 6, 8) for nfe in (1, 2, 4)]
    assert [(each["step"], each["nfe"]) for each in found["curve"]] == [*moments, (8, "ode")]
    assert (found["diverged"], found["narrow"], found["frechet_ode"]) == (False, True, 4.0)


def losses(objective: Any) -> Losses:
    torch.manual_seed(0)
    network = MLPConfig(width=16, depth=1, embedding_width=16).build((1, 2, 2), 0, False).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    flow_map = FlowMap(Trig(), TrigPreconditioning(), network, UnitScaling(1.0))
    draws = Draws(0, 0, torch.arange(32))
    batch = Batch(torch.randn(32, 1, 2, 2, dtype=torch.float64), None, draws)
    found: Losses = objective(flow_map, batch)
    return found


def test_a_time_unit_of_one_is_no_error() -> None:
    base = ISD(label_dropout=0.0)
    exact = losses(base).loss
    assert torch.allclose(losses(replace(base, derivative=TimeUnitError(1.0))).loss, exact, rtol=1e-9)  # type: ignore[arg-type]
    assert float((losses(replace(base, derivative=TimeUnitError())).loss / exact - 1).detach().abs().max()) > 1e-3  # type: ignore[arg-type]


def test_terms_apart_each_weigh_themselves() -> None:
    base = made(ISD, label_dropout=0.0, weight_eps=0.5)
    joint, apart = losses(base), losses(ISDApart(base))
    anchor, distill = joint.logs["anchor"], joint.logs["distill"]
    assert torch.allclose(apart.loss, anchor / (anchor + 0.5) + distill / (distill + 0.5), rtol=1e-9)
    unweighted = changed(base, weight_power=0.0)
    assert torch.allclose(losses(ISDApart(unweighted)).loss, losses(unweighted).loss, rtol=1e-9)


def row(**changes: Any) -> dict[str, Any]:
    cell = dict(plan.Cell("base", "iSD").__dict__)
    figures = {
        "diverged": False,
        "degenerate": False,
        "narrow": False,
        "classless": False,
        "spread_1": 1.0,
        "accuracy_1": 0.9,
    }
    figures |= {"frechet_1": 4.0, "frechet_2": 2.0, "frechet_4": 1.0, "grad_q50": 1.0, "grad_q99": 2.0}
    return cell | figures | {"steps": 8, "batch": 4, "samples": 16, "curve": []} | changes


@pytest.mark.parametrize(
    ("spread", "accuracy", "degenerate", "classless"),
    [
        (1.0, 0.9, False, False), (0.2, 0.9, True, False), (4.5, 0.1, True, True), (1.0, 0.15, False, True),
        (0.3, 0.25, False, False),
    ],
)  # fmt: skip
def test_what_counts_as_a_failure(spread: float, accuracy: float, degenerate: bool, classless: bool) -> None:
    found = tables.judged(row(spread_1=spread, accuracy_1=accuracy))
    assert (found["degenerate"], found["classless"]) == (degenerate, classless)
    gone = tables.judged(row(diverged=True, spread_1=None, accuracy_1=None))
    assert not gone["degenerate"]
    assert not gone["classless"]
    assert not gone["narrow"]


@pytest.mark.parametrize(
    ("objective", "within", "narrow"),
    [("PSD", 0.2, True), ("PSD", 0.3, False), ("PSD", None, None), ("flow matching", 0.1, False)],
)
def test_a_map_near_the_means_of_the_classes_is_narrow(
    objective: str, within: float | None, narrow: bool | None
) -> None:
    assert tables.judged(row(objective=objective, within_1=within))["narrow"] is narrow


def test_changed_settings_are_compared_seed_by_seed() -> None:
    cells = [row(seed=seed, frechet_2=2.0 + seed) for seed in (0, 1)]
    cells += [row(seed=seed, derivative="finite-difference", frechet_2=2.0 * (2.0 + seed)) for seed in (0, 1, 2)]
    table = tables.paired_table(tables.at(cells), tables.at(cells, derivative="finite-difference"))
    assert "| 2.00 (2.00-2.00) |" in table
    assert table.endswith("| 0 / 3 |")


def test_cost_to_a_quality_counts_runs_that_never_reach_it() -> None:
    reaching = [{"step": step, "nfe": 2, "frechet": value} for step, value in ((4, 20.0), (8, 4.0))]
    cells = [row(curve=reaching), row(seed=1, curve=[reaching[0]])]
    assert 4 * 2.5 < float(tables.cost_to(cells[:1], 2.5)) <= 8 * 2.5
    assert tables.cost_to(cells, 2.5) == "not in 1 runs"


def test_the_digest_follows_what_is_trained_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = plan.Cell("base", "iSD")
    first, started = plan.settings(cell), plan.settings(replace(cell, initial="flow matching"))
    own = plan.configuration

    def otherwise(cell: Any, initial: str) -> Any:
        config = own(cell, initial)
        training = replace(config.training, log_images=7)
        return replace(config, training=training, evaluation=replace(config.evaluation, samples=7))

    monkeypatch.setattr(plan, "configuration", otherwise)
    assert plan.settings(cell) == first  # how it logs is no other run
    monkeypatch.setattr(plan, "SAMPLE_SEED", 1)
    assert plan.settings(cell) != first
    monkeypatch.undo()
    longer = replace(plan.OPTIMIZERS["adamw"], beta1=0.8)
    monkeypatch.setitem(plan.OPTIMIZERS, "adamw", longer)
    changed = plan.settings(replace(cell, optimizer="muon", initial="flow matching"))
    monkeypatch.undo()
    assert changed != plan.settings(replace(cell, optimizer="muon", initial="flow matching"))  # its start is another
    assert started != first


def test_stored_cells_are_found_again() -> None:
    rows = plan.GRID.rows()
    assert len(plan.GRID.stored()) == len(rows) == sum(map(len, plan.GRID.stored().values())) > 400
