"""What the log says of gradients: their parts, quantiles, and what left its range before a run diverged."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep.data.base import Dataset
from fewstep.training import RunFolder, train_run
from fewstep.training.gradient_stats import FACTOR, REMEMBERED, Recent, term_norms
from fewstep.training.log import StepValues, Window
from fewstep.training.loop import Callbacks, Trainer
from fewstep.utils.errors import TrainingDivergedError
from tests.support.tiny import RUNTIME, TINY


def test_term_norms_are_the_norms_of_the_parts_of_the_gradient() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    first, second = layer(x).square().mean(), layer.weight.sum()
    found = term_norms({"first": first, "second": second, "none": torch.zeros(())}, list(layer.parameters()))
    for name, term in (("first", first), ("second", second)):
        gradients = torch.autograd.grad(term, list(layer.parameters()), retain_graph=True, allow_unused=True)
        expected = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
        assert float(found[name]) == pytest.approx(expected, rel=1e-12)
    assert float(found["none"]) == 0.0
    (first + second).backward()  # the graphs are still there


def test_running_quantiles_forget_what_is_long_past() -> None:
    recent = Recent()
    for step in range(3 * REMEMBERED):
        recent.add(step, {"grad_norm": math.inf if step == 2500 else float(step)})
    found = recent.quantiles("grad_norm")
    assert found[0.5] == pytest.approx(2.5 * REMEMBERED, rel=1e-2)
    assert found[0.99] == pytest.approx(2.99 * REMEMBERED, rel=1e-2)
    assert recent.quantiles("unknown") == {}


def test_the_quantity_that_stays_out_of_range_longest_is_named() -> None:
    recent = Recent()
    for step in range(100):
        derivative = 1.0 if step < 90 else 50.0 * 2.0 ** (step - 90)
        passing = 500.0 if step == 40 else 2.0
        recent.add(step, {"derivative_rms": derivative, "anchor": passing, "loss": 1.0 if step < 95 else math.nan})
    found = recent.first_to_leave()
    assert found is not None
    assert (found.name, found.step, found.median) == ("derivative_rms", 90, 1.0)
    assert found.value > FACTOR * found.median
    assert "derivative_rms left its range first, at step 90" in str(found)


def test_slow_growth_is_not_taken_for_the_usual() -> None:
    """Tenfold in 100 steps from the 300th on: it leaves its range at 400, though most steps are beyond by the end."""
    recent = Recent()
    for step in range(900):
        recent.add(step, {"target_rms": 10.0 ** (max(0, step - 300) / 100), "falling": 10.0 ** (-step / 100)})
    found = recent.first_to_leave()
    assert found is not None
    assert found.name == "target_rms"
    assert 400 <= found.step <= 460


def test_nothing_is_named_while_all_is_in_range() -> None:
    recent = Recent()
    for step in range(50):
        recent.add(step, {"loss": 1.0 + 0.1 * (step % 7)})
    assert recent.first_to_leave() is None
    recent.add(50, {"loss": math.nan})
    found = recent.first_to_leave()
    assert found is not None
    assert (found.name, found.step) == ("loss", 50)


def test_the_log_holds_the_anatomy(digits: Dataset, tmp_path: Path) -> None:
    config = replace(TINY, optimizer=replace(TINY.optimizer, clip=1e-3))
    train_run(config, digits, RunFolder(tmp_path / "run"), RUNTIME)
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    for key in ("derivative_rms", "target_rms", "prediction_rms", "grad_norm_anchor", "grad_norm_distill"):
        assert record[key] > 0
    assert record["clipped"] == 1.0
    assert record["grad_norm_q50"] <= record["grad_norm_q90"] <= record["grad_norm_q99"]
    # Both terms' gradients add up to the whole: no norm exceeds the sum of the other and the total.
    trainer = Trainer(config, digits, RunFolder(tmp_path / "other"), RUNTIME, Callbacks())
    losses = config.objective(trainer.learner.flow_map, trainer.batch(0, 32))
    parameters = list(trainer.learner.flow_map.parameters())
    parts = term_norms({name: term.mean() for name, term in losses.terms.items()}, parameters)
    whole = term_norms({"loss": losses.mean()}, parameters)["loss"]
    assert abs(parts["anchor"] - parts["distill"]) <= whole + 1e-9 <= parts["anchor"] + parts["distill"] + 2e-9


def test_looking_at_the_gradient_changes_no_weight(digits: Dataset, tmp_path: Path) -> None:
    weights = []
    for i, every in enumerate((32, 10**6)):
        config = replace(TINY, training=replace(TINY.training, log_images=every))
        trainer = Trainer(config, digits, RunFolder(tmp_path / str(i)), RUNTIME, Callbacks())
        for _ in range(3):
            trainer.take_step()
        weights.append(trainer.learner.flow_map.network.state_dict())
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key])


def test_what_is_not_finite_first_is_named_and_a_part_without_a_value_is_not_counted() -> None:
    window = Window(clip=1.0)
    for step in range(1, 6):
        window.add_terms({"derivative_rms": torch.tensor([1.0, 2.0]), "anchor": torch.ones(4)})
        window.add_terms({"derivative_rms": torch.tensor([]), "anchor": 3 * torch.ones(4)})
        window.observe(StepValues(step, torch.ones(()), torch.ones(())))
    assert window.read() is None
    assert window.recent.steps[-1][1] == {"derivative_rms": 1.5, "anchor": 2.0, "loss": 1.0, "grad_norm": 1.0}
    window.add_terms({"derivative_rms": torch.tensor([1.0, math.nan]), "anchor": torch.ones(4)})
    spoilt = torch.tensor(math.nan)
    window.observe(StepValues(6, spoilt, spoilt, times=[torch.zeros(2, 4)]))
    window.observe(StepValues(7, torch.ones(()), torch.ones(())))  # that it goes on until it is read changes nothing
    diverged = window.read()
    assert diverged is not None
    assert (diverged.step, len(window.steps)) == (6, 5)
    found = window.recent.first_to_leave()
    assert found is not None
    assert (found.name, found.step) == ("derivative_rms", 6)
    assert "then nan" in str(found)


def test_a_diverging_run_says_what_left_its_range_first(digits: Dataset, tmp_path: Path) -> None:
    config = replace(TINY, optimizer=replace(TINY.optimizer, lr=1e12, clip=0.0, warmup_images=0))
    with pytest.raises(
        TrainingDivergedError, match=r"(anchor|distill|\w+_rms|loss|grad_norm) left its range first, at step [12] "
    ):
        train_run(config, digits, RunFolder(tmp_path / "run"), RUNTIME)
