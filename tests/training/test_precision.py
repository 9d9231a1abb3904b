"""Precision of a run: what bf16 covers, what stays in float32, TF32, and the name of what overflows."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.engine.questions import NETWORKS, batch_on, cases, maps
from fewstep.data.base import Dataset
from fewstep.flow.derivatives import Derivative
from fewstep.flow.guidance import NoGuidance
from fewstep.networks import attention_kernel
from fewstep.networks.layers import LinearLayer
from fewstep.objectives import Companions, Objective
from fewstep.training import Callback, Moment, RunFolder, train_run
from fewstep.training.loop import Trainer
from fewstep.training.settings import Callbacks
from fewstep.utils.errors import TrainingDivergedError
from fewstep.utils.precision import float32_products, rounding
from tests.support.tiny import KINDS, RUNTIME, TINY, stored_tensors

CASES = [objective for objective, _ in cases(NoGuidance())]


def with_derivative(objective: Any, kind: str) -> Objective:
    return replace(objective, derivative=Derivative(kind))  # type: ignore[no-any-return, arg-type]


def types_seen(objective: Objective) -> set[torch.dtype]:
    """Of what the layers of blocks give, under bf16; losses and gradients are finite and in float32."""
    student, teacher = maps("DiT", objective.guidance)
    seen: set[torch.dtype] = set()
    for model in (student, teacher):
        for layer in model.network.get_submodule("blocks").modules():
            if isinstance(layer, LinearLayer):
                layer.register_forward_hook(lambda _, inputs, out: seen.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        loss = objective(student, batch_on("cpu"), Companions(teacher=teacher, ema_target=student)).mean()
    loss.backward()
    assert bool(loss.isfinite())
    assert {p.grad.dtype for p in student.parameters() if p.grad is not None} == {torch.float32}
    return seen


@pytest.mark.parametrize("objective", CASES, ids=lambda each: type(each).__name__)
def test_bf16_covers_each_objective_but_for_differences(objective: Objective) -> None:
    assert "DiT" in NETWORKS
    if "derivative" not in {field.name for field in fields(objective)}:
        assert types_seen(objective) == {torch.bfloat16}
        return
    assert types_seen(with_derivative(objective, "exact")) == {torch.bfloat16}
    assert types_seen(with_derivative(objective, "finite-difference")) == {torch.bfloat16, torch.float32}


def test_weights_averages_and_moments_stay_in_float32(digits: Dataset, tmp_path: Path) -> None:
    with Trainer(KINDS["bf16"], digits, RunFolder(tmp_path), RUNTIME, Callbacks()) as trainer:
        trainer.take_step()
        kept = [*trainer.learner.files().values(), *(ema.weights for ema in trainer.learner.averages)]
        assert {value.dtype for tensors in kept for value in tensors.values()} == {torch.float32}
        assert {p.grad.dtype for p in trainer.learner.flow_map.parameters() if p.grad is not None} == {torch.float32}


def test_stored_tensors_are_of_full_width(digits: Dataset, tmp_path: Path) -> None:
    train_run(KINDS["bf16"], digits, RunFolder(tmp_path), RUNTIME)
    assert {value.dtype for value in stored_tensors(tmp_path).values()} == {torch.float32}


def flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_and_kernel_are_as_the_run_says_and_tf32_never_in_differences(
    tf32: bool, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[bool, bool]] = set()
    within: set[tuple[bool, bool]] = set()
    kernels: set[bool] = set()

    class Looking(Callback):
        def step(self, moment: Moment) -> None:
            seen.add(flags())
            kernels.add(attention_kernel._wanted)

    from fewstep.flow import derivatives

    slope = derivatives.parabola_slope

    def looking(*args: Any) -> Tensor:
        within.add(flags())
        return slope(*args)

    monkeypatch.setattr(derivatives, "parabola_slope", looking)
    before = flags()
    config = replace(TINY, objective=with_derivative(TINY.objective, "finite-difference"))
    train_run(
        config,
        digits,
        RunFolder(tmp_path),
        replace(RUNTIME, tf32=tf32, attention_kernel=tf32),
        Callbacks(also=(Looking(),)),
    )
    assert seen == {(tf32, tf32)}
    assert kernels == {tf32}
    assert attention_kernel._wanted
    assert within == {(False, False)}
    assert flags() == before


def fails() -> None:
    with float32_products(tf32=not flags()[0]):
        assert rounding() == flags()[0]
        raise ZeroDivisionError


def test_flags_come_back_after_an_error() -> None:
    before = flags()
    with pytest.raises(ZeroDivisionError):
        fails()
    assert flags() == before


def message(digits: Dataset, folder: Path, spoil: Any) -> str:
    """With which a run stops whose trainer was spoilt after its first step."""
    with Trainer(TINY, digits, RunFolder(folder), RUNTIME, Callbacks()) as trainer:
        trainer.take_step()
        spoil(trainer)
        trainer.take_step()
        with pytest.raises(TrainingDivergedError) as found:
            trainer.read()
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("layer", ["blocks.0.last.weight", "input.bias"])
def test_the_layer_whose_gradient_overflows_is_named(layer: str, digits: Dataset, tmp_path: Path) -> None:
    def spoil(trainer: Trainer) -> None:
        trainer.learner.flow_map.network.get_parameter(layer).register_hook(lambda gradient: gradient * math.inf)

    found = message(digits, tmp_path, spoil)
    assert "step 2: loss " in found
    assert f"the gradient of {layer} is not finite, of 1 tensors in " in found
    assert "loss nan" not in found


def test_of_several_layers_the_one_nearest_to_the_end_is_named(digits: Dataset, tmp_path: Path) -> None:
    def spoil(trainer: Trainer) -> None:
        for name in ("input.weight", "blocks.0.first.weight"):
            trainer.learner.flow_map.network.get_parameter(name).register_hook(lambda gradient: gradient * math.nan)

    assert "the gradient of blocks.0.first.weight is not finite, of 2 tensors in " in message(digits, tmp_path, spoil)


def test_the_derivative_is_named_where_it_overflows(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    along = Derivative.along

    def infinite(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        output, derivative = along(*args, **options)
        return output, derivative * math.inf

    found = message(digits, tmp_path, lambda _: monkeypatch.setattr(Derivative, "along", infinite))
    assert "not finite: the derivative dN/dt" in found
    assert "the anchor" not in found.partition("left its range")[0]


def test_a_loss_names_its_term(digits: Dataset, tmp_path: Path) -> None:
    def spoil(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.learner.flow_map.network.get_parameter("output.bias").fill_(math.nan)

    assert "not finite: the derivative dN/dt, the network's output, " in message(digits, tmp_path, spoil)
