"""FLOPs of a step: counted without changing it, by type, and told in log, bar and report."""

import io
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import fewstep
from fewstep.data.base import Dataset
from fewstep.evaluation.report.run import report
from fewstep.networks.dit import DiTConfig
from fewstep.objectives import DiagonalMatching
from fewstep.recipes.cost import count
from fewstep.training import RunFolder, train_run
from fewstep.training.flops import StepCost, flops_words
from fewstep.training.loop import Trainer
from fewstep.training.settings import Callbacks
from fewstep.utils.errors import ConfigError
from fewstep.utils.recompute import Anew
from tests.support.tiny import KINDS, RUNTIME, TINY, assert_same_run

CPU = torch.device("cpu")


def test_products_count_by_their_type() -> None:
    x, w = torch.randn(8, 16), torch.randn(16, 4, requires_grad=True)
    cost = StepCost(CPU)
    with cost.counting():
        (x @ w).sum().backward()  # and x^T g
        with torch.autocast("cpu", torch.bfloat16):
            _ = x @ w.detach()
        with Anew():
            _ = x @ w
    cost.counted()
    with cost.counting():
        _ = x @ w
    assert (cost.step.wide, cost.step.half) == (2 * 2 * 8 * 16 * 4, 2 * 8 * 16 * 4)


def test_attention_counts_alike_in_each_form() -> None:
    found = []
    for form in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        q, k, v = (torch.randn(2, 3, rows, 8) for rows in (5, 7, 7))
        cost = StepCost(CPU)
        with cost.counting(), sdpa_kernel(form):
            scaled_dot_product_attention(q, k, v)
        found.append(cost.step.total)
    assert found == [2 * 2 * (2 * 3 * 5 * 7 * 8)] * 2


def test_a_step_of_flow_matching_is_three_passes(digits: Dataset, tmp_path: Path) -> None:
    """But for gradients of what comes in, which nobody needs; and with blocks computed anew no more."""
    network = DiTConfig(width=32, depth=2, heads=2, patch=2)
    passes = []
    for each in (network, replace(network, checkpoint=True)):
        config = replace(TINY, network=each, objective=DiagonalMatching())
        with Trainer(config, digits, RunFolder(tmp_path / str(each.checkpoint)), RUNTIME, Callbacks()) as trainer:
            trainer.take_step()
            first = trainer.cost.step.total
            trainer.take_step()
            assert trainer.cost.step.total == first
            passes.append(first / 32 / count(each, digits.shape, digits.num_classes, False)[1])
    assert 2.8 < passes[0] < 3.2
    assert passes[1] == passes[0]


@pytest.mark.parametrize("kind", ["adamw", "bf16"])
def test_counting_changes_no_weight(
    kind: str, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run(KINDS[kind], digits, RunFolder(tmp_path / "counted"), RUNTIME)
    monkeypatch.setattr("fewstep.training.loop.StepCost", lambda device, *_: StepCost(device, wanted=False))
    train_run(KINDS[kind], digits, RunFolder(tmp_path / "not"), RUNTIME)
    assert_same_run(tmp_path / "counted", tmp_path / "not")
    assert "flops_per_second" in RunFolder(tmp_path / "counted").read_log()[0]
    assert "flops_per_second" not in RunFolder(tmp_path / "not").read_log()[0]


def test_a_compiled_step_is_counted_as_it_is_written(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.training.compiling.BACKEND", "aot_eager")
    monkeypatch.setattr("fewstep.training.compiling._check_compiler", lambda: None)
    found = []
    for runtime in (RUNTIME, replace(RUNTIME, compile=True)):
        with Trainer(TINY, digits, RunFolder(tmp_path / str(len(found))), runtime, Callbacks()) as trainer:
            trainer.take_step()
            found.append(trainer.cost.step)
    assert found[0].total > 0
    assert found[0] == found[1]


def test_log_bar_and_report_tell_speed_wait_memory_and_flops(digits: Dataset, tmp_path: Path) -> None:
    run, told = RunFolder(tmp_path / "run"), io.StringIO()
    with redirect_stderr(told):
        train_run(TINY, digits, run, replace(RUNTIME, quiet=False, peak_tflops=2.0))
    for line in run.read_log():
        assert line["utilisation"] == pytest.approx(line["flops_per_second"] / 2e12, abs=1e-4)
        assert {"images_per_second", "data_wait", "peak_memory_mib"} <= line.keys()
    assert "images/s" in told.getvalue()
    assert "of peak FLOP/s" in told.getvalue()
    assert " GiB" in told.getvalue()
    assert "10 steps" in (page := report(run).read_text())
    for words in ("images/s", "of peak FLOP/s", "% of the time in wait for data", "peak memory"):
        assert words in page


def test_without_a_known_peak_flops_are_told_by_themselves() -> None:
    cost = StepCost(CPU)
    with cost.counting():
        _ = torch.zeros(10, 100) @ torch.zeros(100, 1000)
    assert cost.at(1.0) == {}
    cost.counted()
    assert cost.at(1500.0) == {"flops_per_second": 3e9}
    assert flops_words(cost.at(1500.0)) == "3 GFLOP/s"
    assert flops_words({"flops_per_second": 412.0}) == "412 FLOP/s"
    assert flops_words(StepCost(CPU).at(1.0)) == ""
    assert flops_words({"flops_per_second": 4e14, "utilisation": 0.404}) == "40% of peak FLOP/s"


@pytest.mark.parametrize("peak", [-1.0, float("nan"), float("inf")])
def test_a_peak_that_is_none_is_refused(peak: float) -> None:
    with pytest.raises(ConfigError, match="peak_tflops is"):
        fewstep.Runtime(peak_tflops=peak)
