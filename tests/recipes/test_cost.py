"""The cost of training counted from settings: against the network itself, and against what a step evaluates."""

import pytest
import torch

from benchmarks.cost.step import floor_passes
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import DrawnGuidance, FixedGuidance, NoGuidance
from fewstep.flow.paths import EDM, Linear
from fewstep.flow.preconditioning.jumps import EulerPreconditioning, LinearPreconditioning
from fewstep.flow.preconditioning.network_scaling import EDMScaling
from fewstep.networks.dit import DiTConfig
from fewstep.networks.layers import carries_tangent
from fewstep.networks.mlp import MLPConfig
from fewstep.objectives import CTM, ISD, Batch, Companions, DiagonalMatching, MeanFlow, TeacherSteps
from fewstep.recipes import AT_SCALE, RECIPES, TEACHERS_AT_SCALE, recipe
from fewstep.recipes.cost import Cost, cost_lines, count, student_cost, training_cost
from fewstep.recipes.peaks import PEAKS, Peak, peak_of
from fewstep.utils.errors import ConfigError
from fewstep.utils.parts import kind_name
from fewstep.utils.random import Draws
from tests.support.objectives import made


@pytest.mark.parametrize("guided", [False, True])
def test_parameters_and_flops_are_those_of_the_layers(guided: bool) -> None:
    """A transformer of width w, gated width h, on n tokens of k numbers; 64 features of each time."""
    w, h, n, k, depth, classes = 48, 96, 24, 12, 2, 5
    config = DiTConfig(width=w, depth=depth, heads=3, patch=2, mlp_ratio=3.0)
    parameters, flops = count(config, (3, 8, 12), classes, guided)
    block = 4 * (w + 1) * w + 2 * (w // 3) + (w + 1) * 2 * h + (h + 1) * w + (w + 1) * 6 * w + 2 * w
    embedding = 2 * (65 * w + (w + 1) * w) + (classes + 1) * w + guided * (4 * w + (w + 1) * w)
    ends = (k + 1) * w + n * w + w + (w + 1) * 2 * w + (w + 1) * k
    assert parameters == depth * block + embedding + ends
    block = n * w * (4 * w + 3 * h) + 2 * n**2 * w + 6 * w**2
    embedding = 2 * (64 * w + w**2) + guided * (3 * w + w**2)
    assert flops == 2 * (depth * block + 2 * n * k * w + 2 * w**2 + embedding)


@pytest.mark.parametrize("derivative", ["exact", "finite-difference"])
@pytest.mark.parametrize("diagonal", [0.0, 0.75])
@pytest.mark.parametrize("omega", [1.0, 2.0])
def test_passes_are_the_floor_that_steps_are_held_to(derivative: str, diagonal: float, omega: float) -> None:
    """Its count of evaluations is held to that floor by tests/benchmarks/test_step.py."""
    objective = made(
        ISD, kind=derivative, flow_matching_ratio=diagonal, guidance=FixedGuidance(omega), label_dropout=0.2
    )
    assert objective.forward_passes()[0] == pytest.approx(floor_passes(objective))


def test_passes_of_other_objectives() -> None:
    drawn = made(ISD, guidance=DrawnGuidance(), label_dropout=0.1, kind="finite-difference")
    assert DiagonalMatching().forward_passes() == (3, 0)
    assert drawn.forward_passes()[0] == pytest.approx(8.9)
    with pytest.raises(ConfigError, match="the evaluations of MeanFlow are not counted"):
        MeanFlow().forward_passes()


@pytest.mark.parametrize("derivative", ["exact", "finite-difference"])
def test_passes_under_bf16_are_what_autocast_lets_through(derivative: str) -> None:
    """Forward passes of the whole batch by the type they come in, and two backward ones of 2 each."""
    config = DiTConfig(width=32, depth=1, heads=2, patch=4)
    network = config.build((1, 8, 8), 0, False)
    seen: dict[torch.dtype, float] = {torch.bfloat16: 0.0, torch.float32: 0.0}

    def count(module: torch.nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        seen[out.dtype] += (1 + carries_tangent(*given[:3])) * len(out) / 8

    network.register_forward_hook(count)
    objective = made(ISD, kind=derivative, flow_matching_ratio=0.0, guidance=NoGuidance())
    draws = Draws(3, 0, torch.arange(8))
    batch = Batch(draws.normal(0, (1, 8, 8)), None, draws)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        losses = objective(FlowMap(Linear(), LinearPreconditioning(), network), batch)
    assert losses.loss.requires_grad
    assert objective.forward_passes(bf16=True) == (sum(seen.values()) + 2 * 2, seen[torch.float32])


@pytest.mark.parametrize("compare", ["data-end", "jump-end"])
def test_passes_of_ctm_are_what_a_step_evaluates(compare: str) -> None:
    """Forward passes of the student, its average and the teacher; 2 backward of each with gradient, 1 through the
    average, and 1 more to balance by.
    """
    config = MLPConfig(width=8, depth=1, embedding_width=8)
    path, seen = EDM(), [0.0]

    def count(module: torch.nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        seen[0] += len(out) / 8

    maps = []
    for _ in range(3):
        network = config.build((1, 4, 4), 0, False)
        network.register_forward_hook(count)
        maps.append(FlowMap(path, EulerPreconditioning(path), network, EDMScaling(0.5, path)))
    objective = made(CTM, compare=compare, steps=TeacherSteps(points=500, longest=1), sigma_data=0.5)
    draws = Draws(3, 0, torch.arange(8))
    batch = Batch(draws.normal(0, (1, 4, 4)), None, draws)
    objective(maps[0], batch, Companions(teacher=maps[1], ema_target=maps[2].requires_grad_(False)))
    backward = 2 * 2 + (1 + 1 if compare == "data-end" else 0)
    assert objective.forward_passes() == (pytest.approx(seen[0] + backward, abs=1.0), 0.0)


def test_hours_at_a_peak() -> None:
    cost = Cost(parameters=10, forward=3_000, passes=2.5, images=4_000_000)
    assert cost.flops == 3e10
    assert cost.hours(Peak(1e6, 1e5), utilisation=0.5) == pytest.approx(3e10 / 5e5 / 3600)
    assert cost.hours(Peak(1e6, 1e5)) == pytest.approx(cost.hours(Peak(1e6, 1e5), 0.2) / 2)
    half = Cost(parameters=10, forward=3_000, passes=2.5, images=4_000_000, wide=0.5)
    assert half.hours(Peak(1e6, 1e5), 1.0) == pytest.approx(1.2e10 * (2 / 1e6 + 0.5 / 1e5) / 3600)
    assert "(an assumption)" in " ".join(cost_lines(cost))


def test_recipes_on_latents_have_a_cost() -> None:
    """ImageNet's published steps: 600,000 of 256 samples against 400,000; XL against B."""
    on_latents = {name for name in RECIPES if kind_name(type(recipe(name).data.source)) == "latents"}
    assert on_latents <= {*AT_SCALE, *TEACHERS_AT_SCALE}
    costs = {name: training_cost(recipe(name), data.shape, data.classes) for name, data in AT_SCALE.items()}
    assert costs["imagenet256-dit-b4"].images == 400_000 * 256
    assert costs["imagenet256-dit-xl1"].flops > 20 * costs["imagenet256-dit-b4"].flops
    assert costs["celebahq256-dit-b4"].passes == 9
    assert costs["celebahq256-dit-b4"].wide == 3
    assert training_cost(recipe("digits"), (1, 8, 8), 10).flops < 1e15


def test_students_of_known_teachers_have_a_cost() -> None:
    """The published sizes of EDM's DDPM++ and of the U-Net of Stable Diffusion 1.5; adapters are a few percent."""
    pytest.importorskip("diffusers")
    sizes = {}
    for name, known in TEACHERS_AT_SCALE.items():
        cost = student_cost(recipe(name), known.network, known.shape, known.classes)
        sizes[name] = cost.parameters / 1e6
        assert cost.images == recipe(name).training.images
    assert sizes["distil-edm"] == pytest.approx(55.7, rel=0.02)
    assert 860 < sizes["distil-sd-lora"] < 860 * 1.06


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A10", "A10"), ("NVIDIA L4", "L4"), ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA B200", "B200"),
    ],
)  # fmt: skip
def test_devices_are_known_by_their_names(device: str, name: str) -> None:
    assert peak_of(device) is PEAKS[name]


@pytest.mark.parametrize("device", ["CPU", "NVIDIA L400", "NVIDIA GeForce GTX 1080", ""])
def test_others_are_not(device: str) -> None:
    assert peak_of(device) is None


def test_each_peak_orders_its_types() -> None:
    for name, peak in PEAKS.items():
        assert peak.bf16 > peak.tf32 >= peak.float32, name
    mixed = PEAKS["H100"].seconds(989e12, 67e12)
    assert mixed == pytest.approx(2.0)
    assert PEAKS["H100"].seconds(0, 494e12, tf32=True) == pytest.approx(1.0)
    assert Peak(2.0, 1.0).seconds(0, 3.0, tf32=True) == 3.0
