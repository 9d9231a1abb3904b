"""On a GPU: derivatives, attention, a step in bf16, no wait for the device, exact resume, samples."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.data.base import Dataset, Samples
from fewstep.flow.derivatives import Derivative
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import FixedGuidance
from fewstep.flow.paths import Linear
from fewstep.flow.preconditioning.jumps import LinearPreconditioning
from fewstep.networks.attention import attention
from fewstep.networks.attention_kernel import kernel_installed, tangent_kernel
from fewstep.networks.condition import Condition
from fewstep.networks.dit import DiTConfig
from fewstep.objectives import ISD, Batch
from fewstep.recipes.config import OptimizerConfig, RunConfig, TrainingConfig
from fewstep.training import RunFolder, Runtime, train_run
from fewstep.training.loop import Trainer
from fewstep.training.settings import Callbacks
from fewstep.training.step import TrainStep
from fewstep.utils.forward_ad import jvp
from fewstep.utils.random import Draws
from tests.support.objectives import made
from tests.support.tiny import assert_same_run

pytestmark = pytest.mark.gpu
SHAPE, CLASSES = (4, 8, 8), 3
NETWORK = DiTConfig(width=64, depth=2, heads=4, patch=2)
RUN = RunConfig(
    recipe="on-a-gpu",
    network=NETWORK,
    objective=made(ISD, flow_matching_ratio=0.25, guidance=FixedGuidance(omega=1.5), label_dropout=0.1),
    optimizer=OptimizerConfig(warmup_images=0),
    training=TrainingConfig(
        images=96, batch_size=16, precision="bf16", sample_images=0, checkpoint_images=48, log_images=48
    ),
)
"""Six steps, a checkpoint after three."""


def latents(count: int = 64) -> Dataset:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(count, *SHAPE, generator=draw)
    samples = Samples(values, torch.arange(count) % CLASSES)
    return Dataset("latents", samples, samples, CLASSES, tuple(map(str, range(CLASSES))))


def flow_map(device: torch.device) -> FlowMap:
    torch.manual_seed(0)
    network = NETWORK.build(SHAPE, CLASSES, False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return FlowMap(Linear(), LinearPreconditioning(), network).to(device)


def batch(device: torch.device, count: int = 16) -> Batch:
    places = torch.arange(count)
    labels = places % CLASSES
    x0 = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1)).to(device)
    return Batch(x0, labels.to(device), Draws(0, 0, places.to(device)), places=places, host_labels=labels)


def test_exact_derivatives_are_those_of_differences(device: torch.device) -> None:
    model, own = flow_map(device).double(), batch(device)
    x = own.x0.double()
    t = torch.linspace(0.3, 0.9, len(x), device=device, dtype=torch.float64)
    condition, v = Condition(own.labels), torch.ones_like(x)
    exact = Derivative("exact").along(model, x, v, t, 0.3 * t, condition)[1]
    difference = Derivative("finite-difference", step=1e-3).along(model, x, v, t, 0.3 * t, condition)[1]
    assert float((exact - difference).norm()) < 1e-2 * float(exact.norm())


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q / q.shape[-1] ** 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forms_of_attention_are_equal(
    device: torch.device, dtype: torch.dtype, attached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiled and written out, outputs, tangents and gradients."""
    monkeypatch.setattr("fewstep.networks.attention.TILE", 16 * 64)
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 64, 16, generator=draw).to(device, dtype).requires_grad_() for _ in range(3)]
    along = tuple(torch.randn(2, 3, 64, 16, generator=draw).to(device, dtype) for _ in range(3))
    found = []
    for form in (attention, written_out):
        out, moved = jvp(form, tuple(inputs), along, attached)
        loss = out.float().square().sum() + (moved.float().square().sum() if attached else 0.0)
        found.append((out, moved, *torch.autograd.grad(loss, inputs)))
    near = 1e-3 if dtype is torch.float32 else 0.05
    for one, other in zip(*found, strict=True):
        assert float((one - other).detach().float().norm()) <= near * float(other.detach().float().norm())


def test_the_kernel_s_tangent_is_the_written_out_one(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu" or not kernel_installed():
        pytest.skip("jvp-flash-attention needs a GPU")
    monkeypatch.setattr("fewstep.networks.attention.TILE", 16 * 64)
    draw = torch.Generator().manual_seed(0)
    for tokens, width in ((64, 32), (96, 64), (1024, 64), (256, 128)):
        drawn = torch.randn(6, 2, tokens, 3, width, generator=draw).to(device, torch.bfloat16).transpose(2, 3)
        at, along = tuple(x.requires_grad_() for x in drawn[:3]), tuple(drawn[3:])
        found = jvp(attention, at, along, attached=False)[1]
        with tangent_kernel(False):
            tiled = jvp(attention, at, along, attached=False)[1]
        wanted = torch.func.jvp(written_out, *(tuple(x.detach().double() for x in each) for each in (at, along)))[1]
        assert not torch.equal(found, tiled)  # the kernel was taken
        assert float((found - wanted).norm()) < 0.02 * float(wanted.norm())


@pytest.mark.parametrize("kind", ["exact", "finite-difference"])
def test_a_step_in_bf16_is_near_one_in_float32(device: torch.device, kind: str) -> None:
    objective, found = made(ISD, kind=kind, flow_matching_ratio=0.25), []
    for bf16 in (False, True):
        model = flow_map(device)
        step = TrainStep(model, objective, bf16)
        loss = step(batch(device))[0]
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert {p.dtype for p in model.parameters()} == {torch.float32} == {gradient.dtype}
        found.append((float(loss), gradient))
    (loss, gradient), (rounded, other) = found
    assert rounded == pytest.approx(loss, rel=0.05)
    assert float(torch.cosine_similarity(gradient, other, dim=0)) > 0.97


@pytest.mark.parametrize("kind", ["exact", "finite-difference"])
def test_blocks_computed_anew_give_the_same(device: torch.device, kind: str) -> None:
    objective, found = made(ISD, kind=kind), []
    model = flow_map(device).double()
    own = replace(batch(device), x0=batch(device).x0.double())
    for _ in range(2):
        loss = objective(model, own).mean()
        found.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
        model.network.checkpoint_blocks()  # type: ignore[operator]
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_step_never_waits_for_the_device(device: torch.device, tmp_path: Path) -> None:
    runtime = Runtime(cpu=device.type == "cpu", quiet=True)
    with Trainer(RUN, latents(), RunFolder(tmp_path), runtime, Callbacks()) as trainer:
        trainer.learner.flow_map.train()
        for _ in range(3):
            trainer.take_step()
        if device.type == "cpu":
            pytest.skip("there is no GPU to wait for")
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.take_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("in_one_order")
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(device: torch.device, tmp_path: Path) -> None:
    runtime, data = Runtime(cpu=device.type == "cpu", quiet=True), latents()
    train_run(RUN, data, RunFolder(tmp_path / "unbroken"), runtime)
    train_run(RUN, data, RunFolder(tmp_path / "resumed"), runtime)
    train_run(RUN, data, RunFolder(tmp_path / "resumed"), replace(runtime, from_step=3))
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed")


def test_averages_on_the_cpu_are_near_those_on_the_device(device: torch.device, tmp_path: Path) -> None:
    """To the bit but for how a device rounds a product and a sum."""
    kept = []
    for on_cpu in (False, True):
        runtime = Runtime(cpu=device.type == "cpu", quiet=True, averages_on_cpu=on_cpu)
        with Trainer(RUN, latents(), RunFolder(tmp_path / str(on_cpu)), runtime, Callbacks()) as trainer:
            for _ in range(3):
                trainer.take_step()
            kept.append({key: value.cpu() for key, value in trainer.learner.emas[0].weights.items()})
    for key, value in kept[0].items():
        torch.testing.assert_close(kept[1][key], value, rtol=1e-2, atol=1e-4)


def test_samples_are_those_of_the_cpu(device: torch.device) -> None:
    """The same noise on any device, and the same jumps as far as float32 goes."""
    model = flow_map(device)
    for steps in (1, 4):
        own = fewstep.generate(model, 8, steps=steps).samples
        other = fewstep.generate(copy.deepcopy(model).cpu(), 8, steps=steps).samples
        assert own.shape == (8, *SHAPE)
        torch.testing.assert_close(own.cpu(), other, rtol=1e-2, atol=1e-3)
