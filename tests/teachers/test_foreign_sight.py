"""Foreign networks that are shown what a skip lets through: at first the teacher, with adapters or not."""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.preconditioning.covariance import PrincipalComponents
from fewstep.flow.preconditioning.skip import SkipPreconditioning
from fewstep.networks.base import NetworkConfig, TeacherNetworkConfig, fit_stored, stored_state
from fewstep.networks.mlp import MLPConfig
from fewstep.teachers.second_time import TwoTimesNetwork, merged_flow_map, save_adapters
from fewstep.teachers.sight import SkipSight
from fewstep.utils.errors import ConfigError
from fewstep.utils.serialization import from_json, to_json
from fewstep.utils.weights import read_weights
from tests.support.cases import noise
from tests.support.foreign import EDM_KINDS, TINY, read_teacher


def seeing(teacher: FlowMap, settings: TeacherNetworkConfig) -> tuple[FlowMap, TwoTimesNetwork]:
    """A student with a skip of the Gaussian's map, over the teacher's own jumps, whose network sees it."""
    assert teacher.config is not None
    size = math.prod(teacher.sample_shape)
    mean, vectors = 0.3 * noise(*teacher.sample_shape, seed=2), torch.linalg.qr(noise(size, 3, seed=3))[0]
    covariance = PrincipalComponents(mean, vectors, torch.tensor([4.0, 2.0, 1.0]).double(), 0.1)
    skip = SkipPreconditioning(teacher.preconditioning, covariance, teacher.path)
    config = replace(teacher.config, preconditioning=skip, network=settings.beside(teacher.config.network))
    student = from_json(type(config), to_json(config), "config").build().eval()
    network = student.network
    assert isinstance(network, TwoTimesNetwork)
    assert isinstance(teacher.network, TwoTimesNetwork)
    if settings.lora:
        network.share_base(teacher.network)
    network.take(teacher.network, "teacher")
    return student, network


def moved_sight(network: TwoTimesNetwork) -> SkipSight:
    """What takes the skip, away from zero."""
    sight = network.two_times.sight
    assert sight is not None
    with torch.no_grad():
        for parameter in sight.parameters():
            parameter.add_(0.3)
    return sight


def times(teacher: FlowMap, x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = teacher.path.t_min, teacher.path.t_max
    return torch.full(x.shape[:1], low + 0.7 * (high - low)), torch.full(x.shape[:1], low + 0.2 * (high - low))


@pytest.mark.parametrize("lora", [0, 2], ids=["whole", "adapters"])
@pytest.mark.parametrize("kind", [*TINY, *EDM_KINDS])
def test_a_student_that_sees_its_skip_starts_as_the_teacher(kind: str, lora: int, tmp_path: Path) -> None:
    """To the last bit; its own layers get gradients, and once they have moved the denoiser still sees nothing."""
    teacher, cond = read_teacher(kind, tmp_path)
    student, network = seeing(teacher, TeacherNetworkConfig(lora=lora, sees_skip=True))
    sight = network.two_times.sight
    assert sight is not None
    x = torch.randn(2, *teacher.sample_shape)
    t, s = times(teacher, x)
    plain = teacher.denoise(x, t, cond)
    with torch.no_grad():
        assert torch.equal(student.output(x, t, s, cond), plain)
    student.jump(x, t, s, cond).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in sight.parameters())
    moved_sight(network)
    with torch.no_grad():
        torch.testing.assert_close(student.denoise(x, t, cond), plain)
        assert not torch.allclose(student.output(x, t, s, cond), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["UNet2DModel", "FluxTransformer2DModel", "adm", "edm2"])
def test_its_derivative_passes_through_what_it_sees(kind: str, tmp_path: Path) -> None:
    """Convolutions, tokens, and weights of unit magnitude."""
    teacher, cond = read_teacher(kind, tmp_path)
    student, network = seeing(teacher.double(), TeacherNetworkConfig(sees_skip=True))
    moved_sight(network.double())
    cond = replace(cond, prompts=None)
    x = torch.randn(2, *teacher.sample_shape, dtype=torch.float64)
    v, (t, s) = torch.randn_like(x), (time.double() for time in times(teacher, x))
    _, slope = student.with_tangent(x, t, s, cond, (v, None, None))
    h = 1e-5
    with torch.no_grad():
        ahead, behind = (student.output(x + sign * h * v, t, s, cond) for sign in (1, -1))
    torch.testing.assert_close(slope.detach(), (ahead - behind) / (2 * h), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["UNet2DModel", "adm"])
def test_a_copy_sees_by_itself_and_blocks_may_be_computed_anew(kind: str, tmp_path: Path) -> None:
    """A slow average keeps what it saw with; gradients are the same without kept activations."""
    teacher, cond = read_teacher(kind, tmp_path)
    student, network = seeing(teacher, TeacherNetworkConfig(sees_skip=True))
    sight = moved_sight(network)
    x = torch.randn(2, *teacher.sample_shape)
    t, s = times(teacher, x)
    average, before = copy.deepcopy(student), student.jump(x, t, s, cond).detach()
    gradients = []
    for anew in (False, True):
        if anew:
            network.checkpoint_blocks()
        network.zero_grad()
        student.jump(x, t, s, cond).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        for parameter in sight.parameters():
            parameter.zero_()
        assert torch.equal(average.jump(x, t, s, cond), before)
        assert not torch.allclose(student.jump(x, t, s, cond), before)


def test_the_gate_is_of_the_times_themselves_in_bf16(tmp_path: Path) -> None:
    """Not of times rounded to steps of four."""
    teacher, _ = read_teacher("UNet2DModel", tmp_path)
    network = seeing(teacher, TeacherNetworkConfig(sees_skip=True))[1]
    sight = network.two_times.sight
    assert sight is not None
    with torch.no_grad():
        sight.gate.weight.add_(0.1)
        x = torch.randn(2, *teacher.sample_shape)
        seen, t, s = torch.randn_like(x), torch.tensor([997.0, 501.0]), torch.tensor([499.0, 3.0])
        exact = network.two_times.gated(torch.zeros_like(x), seen, t, s)
        with torch.autocast("cpu", torch.bfloat16):
            found = network.two_times.gated(torch.zeros_like(x).bfloat16(), seen, t, s)
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["UNet2DModel", "adm"])
def test_what_it_learned_to_see_is_saved_and_merged(kind: str, tmp_path: Path) -> None:
    """In the file of the second time, beside the adapters that PEFT reads; a merged model sees too."""
    teacher, cond = read_teacher(kind, tmp_path)
    student, network = seeing(teacher, TeacherNetworkConfig(lora=2, sees_skip=True))
    with torch.no_grad():
        for parameter in network.two_times.new_parameters():
            parameter.add_(0.1)
    save_adapters(network, tmp_path / "adapters")
    kept = read_weights(tmp_path / "adapters" / "second_time.safetensors")
    assert {"sight.beside.weight", "sight.gate.weight", "sight.gate.bias"} <= kept.keys()
    assert not any("sight" in name for name in read_weights(tmp_path / "adapters" / "pytorch_lora_weights.safetensors"))
    x = torch.randn(2, *teacher.sample_shape)
    t, s = times(teacher, x)
    expected = student.jump(x, t, s, cond)
    torch.testing.assert_close(merged_flow_map(student).jump(x, t, s, cond), expected)
    other, fresh = seeing(teacher, TeacherNetworkConfig(lora=2, sees_skip=True))
    assert not torch.allclose(other.jump(x, t, s, cond), expected)
    fit_stored(fresh, stored_state(network), "a file")
    torch.testing.assert_close(other.jump(x, t, s, cond), expected)
    assert network.base_digest() == teacher.network.base_digest()  # type: ignore[operator]


@dataclass(frozen=True)
class Blind(NetworkConfig):
    """A network of one's own, without a place for it."""

    def build(self, *given: Any) -> Any:
        raise NotImplementedError


def test_a_network_without_a_place_for_it_is_refused() -> None:
    """In one line, by name; fewstep's own have one."""
    settings = TeacherNetworkConfig(sees_skip=True)
    assert settings.beside(MLPConfig()) == MLPConfig(sees_skip=True)
    with pytest.raises(ConfigError, match=r"Blind has no sees_skip: leave --network\.sees-skip out"):
        settings.beside(Blind())
