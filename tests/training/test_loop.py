"""The loop: batches, averages, optimisers, precision, divergence, limits, loading."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fewstep
from fewstep.data.base import Dataset
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import DrawnGuidance, FixedGuidance
from fewstep.networks.mlp import MLPConfig
from fewstep.objectives import ALONE, ISD, Batch, Companions, Losses, Objective
from fewstep.recipes.config import OptimizerConfig, TrainingConfig
from fewstep.sampling.pipeline import Pipeline
from fewstep.training import Callbacks, RunFolder, build, train_run
from fewstep.training.loop import Trainer
from fewstep.training.optimizers import Optimizers, schedule
from fewstep.training.parallel import split_batch
from fewstep.training.setup import check_context
from fewstep.training.step import TrainStep
from fewstep.utils.errors import ConfigError, FewstepWarning, TrainingDivergedError
from fewstep.utils.random import Draws
from tests.support.tiny import (
    KINDS,
    RUNTIME,
    TINY,
    noise_and_times,
    snapshot,
    stored_tensors,
)


@pytest.mark.parametrize("micro_batch", [8, 5, 31])
def test_accumulation_gives_the_weights_of_the_whole_batch(
    micro_batch: int, unbroken: Callable[[str], Path], digits: Dataset, tmp_path: Path
) -> None:
    """5 and 31 do not divide the share of 32: smaller parts of equal size are taken."""
    train_run(TINY, digits, RunFolder(tmp_path), replace(RUNTIME, micro_batch=micro_batch))
    whole, parts = stored_tensors(unbroken("adamw")), stored_tensors(tmp_path)
    weights = [key for key in whole if not key.startswith("optimizer")]
    assert max(float((whole[key] - parts[key]).abs().max()) for key in weights) < 1e-5
    assert split_batch(32, 1, micro_batch)[1] * micro_batch >= 32


def test_a_batch_whose_labels_are_all_dropped_trains(digits: Dataset, tmp_path: Path) -> None:
    """Nothing is left to guide: small batches meet it by chance, a dropout of 1 always."""
    config = replace(TINY, objective=ISD(label_dropout=1.0, guidance=FixedGuidance(omega=1.3)))
    assert train_run(config, digits, RunFolder(tmp_path), RUNTIME).step == 10


@pytest.mark.parametrize(
    ("guidance", "said"),
    [
        (FixedGuidance(omega=1.3), r"training guidance \(--objective\.guidance\.omega 1 turns it off\) has no effect"),
        (DrawnGuidance(), "training guidance has no effect"),
        (FixedGuidance(omega=1.0), None),
    ],
)
def test_guidance_without_classes_is_said(
    guidance: FixedGuidance | DrawnGuidance, said: str | None, digits: Dataset
) -> None:
    config = replace(TINY, objective=ISD(guidance=guidance))
    flow_map = build(config, digits).flow_map
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_context(config, digits, flow_map)
        plain = load_dataset(DataConfig(source="digits", labels=False))
        if said is None:
            check_context(config, plain, flow_map)
        else:
            with pytest.warns(FewstepWarning, match=rf"^digits has no classes or prompts to guide to: {said}$"):
                check_context(config, plain, flow_map)


@pytest.mark.parametrize(
    ("batch_size", "processes", "micro_batch", "expected"),
    [(256, 1, 0, (256, 1)), (256, 2, 0, (128, 1)), (256, 2, 32, (128, 4)), (30, 1, 8, (30, 5)), (7, 1, 3, (7, 7))],
)
def test_the_batch_is_shared_out(batch_size: int, processes: int, micro_batch: int, expected: tuple[int, int]) -> None:
    assert split_batch(batch_size, processes, micro_batch) == expected


@pytest.mark.parametrize(
    ("batch_size", "processes", "micro_batch", "message"),
    [
        (3, 4, 0, "a batch of 3 is smaller than the 4 processes"),
        (10, 4, 0, "a batch of 10 does not split over 4"),
        (8, 1, -1, "micro_batch is -1"),
    ],
)
def test_batches_that_do_not_split_are_refused(batch_size: int, processes: int, micro_batch: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_batch(batch_size, processes, micro_batch)


@dataclass(frozen=True)
class Poisoned(Objective):
    """iSD until one step, where the loss, or the gradient alone, is NaN."""

    step: int
    what: str

    @property
    def guided(self) -> bool:
        return False

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        losses = ISD()(flow_map, batch)
        if batch.draws.step != self.step:
            return losses
        zero = sum(parameter.sum() for parameter in flow_map.parameters()) * 0
        return replace(losses, loss=losses.loss + (math.nan if self.what == "loss" else zero.abs().sqrt()))


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("step", [1, 5])
def test_a_value_that_is_not_finite_stops_the_run(what: str, step: int, digits: Dataset, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    config = replace(TINY, objective=Poisoned(step, what))  # type: ignore[arg-type]
    trainer = Trainer(config, digits, run, RUNTIME, Callbacks())
    for _ in range(step):
        trainer.take_step()
        if trainer.clock.due(config.training.checkpoint_images):
            trainer.save()
    before = snapshot(run.root)
    last = "step-00000003" if step > 3 else "there is no checkpoint yet"
    times = r"batch times t in \[0\.\d+, 0\.\d+\], s in \[\S+, 0\.\d+\]"
    with pytest.raises(TrainingDivergedError, match=rf"step {step + 1}: .*nan.*{times}.*{last}"):
        trainer.run_to_end()
    after = snapshot(run.root)
    assert after == before | {"log.jsonl": after["log.jsonl"]}
    assert run.read_log()[-2]["step"] == step  # what had gathered since the last line is not lost


def stored_weights(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of the weights and averages in memory."""
    averages = {
        f"{ema.name}/{key}": value.clone() for ema in trainer.learner.emas for key, value in ema.weights.items()
    }
    return averages | {key: value.clone() for key, value in trainer.learner.flow_map.network.state_dict().items()}


def test_several_averages_are_kept_and_stored(digits: Dataset, tmp_path: Path) -> None:
    """The constant average follows its formula, computed here from the weights of every step."""
    config = replace(TINY, training=replace(TINY.training, ema_power=(0.05, 0.2), ema_decay=(0.5,)))
    trainer = Trainer(config, digits, RunFolder(tmp_path), RUNTIME, Callbacks())
    average = {key: value.double() for key, value in trainer.learner.flow_map.network.state_dict().items()}
    for step in range(1, 7):
        trainer.take_step()
        beta = min(0.5, (1 + step) / (10 + step))
        for key, value in trainer.learner.flow_map.network.state_dict().items():
            average[key] = beta * average[key] + (1 - beta) * value.double()
    trainer.save()
    trainer.release()
    folder = RunFolder(tmp_path).last_checkpoint()
    stored = load_file(folder / "ema-constant-0.5.safetensors")
    assert all(torch.allclose(stored[key].double(), value, atol=1e-6) for key, value in average.items())
    again = Trainer(config, digits, RunFolder(tmp_path), RUNTIME, Callbacks())
    assert [ema.name for ema in again.learner.emas] == ["power-0.05", "power-0.2", "constant-0.5"]
    assert all(torch.equal(value, stored_weights(trainer)[key]) for key, value in stored_weights(again).items())
    first, second = again.learner.emas[0].weights, again.learner.emas[1].weights
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_learning_rate_schedules_are_the_stated_functions() -> None:
    constant = OptimizerConfig(warmup_images=1000)
    assert [schedule(constant, images, 0.5) for images in (250, 1000, 5000)] == [0.25, 1, 1]
    cosine = replace(constant, warmup_images=0, decay="cosine")
    assert [schedule(cosine, 1, share) for share in (0, 1 / 3, 0.5, 1, 1.2)] == pytest.approx([1, 0.75, 0.5, 0, 0])
    root = replace(constant, decay="rsqrt", decay_images=2000)
    assert [schedule(root, images, 0.5) for images in (500, 2000, 8000, 18_000)] == pytest.approx(
        [0.5, 1, 1 / 2, 1 / 3]
    )


def test_the_schedule_reaches_every_optimizer(digits: Dataset, tmp_path: Path) -> None:
    config = replace(KINDS["muon"], optimizer=OptimizerConfig("muon", lr=1e-3, matrix_lr=4e-3, warmup_images=640))
    trainer = Trainer(config, digits, RunFolder(tmp_path), RUNTIME, Callbacks())
    for _ in range(5):
        trainer.take_step()
    rates = [group["lr"] for part in trainer.learner.optimizers.parts for group in part.optimizer.param_groups]
    assert rates == pytest.approx([1e-3 / 4, 4e-3 / 4])
    trainer.write_log()
    assert RunFolder(tmp_path).read_log()[-1]["lr"] == pytest.approx(1e-3 / 4)


def test_muon_takes_the_matrices_of_the_trunk(digits: Dataset) -> None:
    """Each trunk matrix moves by Muon's orthogonal step: all its singular values are about equal."""
    flow_map = build(TINY, digits).flow_map
    optimizers = Optimizers(flow_map.network, OptimizerConfig("muon", lr=1e-9, matrix_lr=1e-2, warmup_images=0))
    before = {key: value.clone() for key, value in flow_map.network.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for parameter in flow_map.network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizers.step(1, 0.0)
    moved = {key: value - before[key] for key, value in flow_map.network.named_parameters()}
    large = [key for key, value in moved.items() if float(value.detach().abs().max()) > 1e-6]
    assert large == ["blocks.0.first.weight", "blocks.0.last.weight"]
    for key in large:
        singular = torch.linalg.svdvals(moved[key].detach())
        assert float(singular.max() / singular.min()) < 2.5


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_learns(name: str, digits: Dataset, tmp_path: Path) -> None:
    """The error of the anchor starts at the data's and the noise's variance and falls."""
    config = replace(
        TINY,
        network=MLPConfig(width=64, depth=1, embedding_width=16),
        optimizer=OptimizerConfig(name, lr=1e-2, matrix_lr=1e-2, warmup_images=0),  # type: ignore[arg-type]
        training=TrainingConfig(
            images=3200, batch_size=64, log_images=64, checkpoint_images=3200, sample_images=0, seed=3
        ),
    )
    train_run(config, digits, RunFolder(tmp_path), RUNTIME)
    anchors = [record["anchor"] for record in RunFolder(tmp_path).read_log()]
    assert len(anchors) == 50
    assert anchors[0] > 1.2
    assert sum(anchors[-10:]) / 10 < 0.6 * anchors[0]


def test_bf16_computes_the_same_gradient_coarsely(digits: Dataset) -> None:
    """Guidance evaluates the network without gradient first; the pass with gradient must keep it."""
    flow_map = build(TINY, digits).flow_map
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in flow_map.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    images, labels = digits.train.fetch(torch.arange(64))
    batch = Batch(images, labels, Draws(0, 0, torch.arange(64)))
    gradients = []
    for bf16 in (False, True):
        flow_map.zero_grad()
        loss, *_ = TrainStep(flow_map, TINY.objective, bf16)(batch)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in flow_map.parameters() if p.grad is not None]))
    assert gradients[0].shape == gradients[1].shape
    assert float(torch.cosine_similarity(gradients[0], gradients[1], dim=0)) > 0.99
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-4)


def test_bf16_keeps_float32_weights(unbroken: Callable[[str], Path]) -> None:
    tensors = stored_tensors(unbroken("bf16"))
    assert {value.dtype for key, value in tensors.items() if "optimizer" not in key} == {torch.float32}
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())


@pytest.mark.filterwarnings("ignore:the run ended before its learning rate")
def test_the_time_limit_stops_the_run(digits: Dataset, tmp_path: Path) -> None:
    config = replace(TINY, training=replace(TINY.training, images=10**9, seconds=0.3, checkpoint_images=10**9))
    result = train_run(config, digits, RunFolder(tmp_path), RUNTIME)
    assert 0.3 <= result.seconds < 10
    assert 1 <= result.step < 10**7
    before = snapshot(tmp_path)
    assert train_run(config, digits, RunFolder(tmp_path), RUNTIME).step == result.step
    assert snapshot(tmp_path) == before


def test_the_watcher_sees_the_average_and_leaves_the_weights(digits: Dataset, tmp_path: Path) -> None:
    seen: list[tuple[int, Tensor, bool]] = []

    def watch(pipeline: Pipeline, step: int) -> None:
        flow_map = pipeline.flow_map
        seen.append((step, next(flow_map.parameters()).detach().clone(), flow_map.training))

    config = replace(TINY, training=replace(TINY.training, sample_images=160))
    trainer = Trainer(config, digits, RunFolder(tmp_path), RUNTIME, Callbacks(watch))
    trainer.run_to_end()
    assert [step for step, _, _ in seen] == [5, 10]
    key = next(iter(dict(trainer.learner.flow_map.network.named_parameters())))
    assert torch.equal(seen[-1][1], trainer.learner.emas[0].weights[key])
    assert not torch.equal(seen[-1][1], dict(trainer.learner.flow_map.network.named_parameters())[key])
    assert [training for _, _, training in seen] == [False, False]
    assert trainer.learner.flow_map.training


def test_load_gives_the_map_of_the_first_average(digits: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(TINY, digits, RunFolder(tmp_path), RUNTIME, Callbacks())
    trainer.run_to_end()
    loaded = fewstep.load(tmp_path).flow_map
    with torch.no_grad():
        found = loaded.jump(*noise_and_times(loaded))
        raw = trainer.learner.flow_map.jump(*noise_and_times(loaded))
        trainer.learner.flow_map.network.load_state_dict(trainer.learner.emas[0].weights)
        assert torch.equal(found, trainer.learner.flow_map.jump(*noise_and_times(loaded)))
    assert not torch.equal(found, raw)
    assert not loaded.training


def test_a_saved_model_comes_back_exactly(unbroken: Callable[[str], Path], tmp_path: Path) -> None:
    pipeline = fewstep.load(unbroken("dropout"))
    pipeline.save_pretrained(tmp_path / "model")
    flow_map = pipeline.flow_map
    for other in (Pipeline.from_pretrained(tmp_path / "model"), fewstep.load(tmp_path / "model")):
        again = other.flow_map
        assert (other.config, again.config) == (pipeline.config, flow_map.config)
        weights = flow_map.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in again.state_dict().items())
        with torch.no_grad():
            assert torch.equal(again.jump(*noise_and_times(again)), flow_map.jump(*noise_and_times(again)))
    assert callable(pipeline.push_to_hub)
