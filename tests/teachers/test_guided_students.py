"""Students of foreign networks that take guidance as an input: at first it counts for nothing."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.networks.condition import Condition
from fewstep.teachers.diffusers import DiffusersConfig, DiffusersNetwork, load_diffusers
from fewstep.teachers.edm import load_edm
from fewstep.teachers.edm_networks import EDMNetwork
from tests.support.edm_files import TINY as TINY_EDM
from tests.support.edm_files import save_edm
from tests.support.foreign import TINY, save_foreign

pytest.importorskip("diffusers")


def guidance(strengths: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor([[math.log(each), 0.1, 0.9] for each in strengths], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["UNet2DModel", "UNet2DConditionModel", "SD3Transformer2DModel"])
@pytest.mark.parametrize("lora", [0, 2])
def test_a_guided_student_starts_as_the_unguided_teacher_bit_for_bit(
    kind: str, lora: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever strength it is given; once the projection has moved, the strength counts."""
    folder = tmp_path_factory.mktemp("teacher")
    save_foreign(folder, kind)
    tiny, teacher = TINY[kind], load_diffusers(folder, TINY[kind].shape)
    assert teacher.config is not None
    config = teacher.config.network
    assert isinstance(config, DiffusersConfig)
    student = replace(config, lora=lora).build(tiny.shape, teacher.num_classes, guided=True)
    assert isinstance(teacher.network, DiffusersNetwork)
    if lora:
        student.share_base(teacher.network)
    student.take(teacher.network, str(folder))
    cond = tiny.condition(2)
    x, t, s = torch.randn(2, *tiny.shape), torch.tensor([700.0, 300.0]), torch.tensor([300.0, 10.0])
    expected = teacher.network(x, t, s, cond)
    guided = replace(cond, guidance=guidance((4.0, 1.5)))
    assert torch.equal(student(x, t, s, guided), expected)
    moved = student.two_times.new_parameters()
    with torch.no_grad():
        for parameter in moved:
            parameter.add_(0.1)
    assert not torch.allclose(student(x, t, s, guided), student(x, t, s, replace(cond, guidance=guidance((1.5, 4.0)))))
    assert torch.equal(
        student(x, t, s, cond), student(x, t, s, replace(cond, guidance=torch.tensor([[0, 0, 1.0]] * 2)))
    )


@pytest.mark.parametrize("kind", sorted(TINY_EDM))
def test_a_guided_student_of_edm_starts_as_the_unguided_teacher_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Whatever strength it is given; once the projection has moved, the strength counts."""
    save_edm(tmp_path / "network.pkl", kind)
    teacher = load_edm(tmp_path / "network.pkl")
    assert teacher.config is not None
    assert isinstance(teacher.network, EDMNetwork)
    student = teacher.config.network.build(teacher.sample_shape, teacher.num_classes, guided=True)
    assert isinstance(student, EDMNetwork)
    student.take(teacher.network, kind)
    labels = torch.tensor([2, 0])
    x, t, s = torch.randn(2, *teacher.sample_shape), torch.tensor([0.5, 0.9]), torch.tensor([0.2, 0.4])
    cond = Condition(labels, guidance=guidance((4.0, 1.5)))
    assert torch.equal(student(x, t, s, cond), teacher.network(x, t, s, Condition(labels)))
    with torch.no_grad():
        for parameter in student.two_times.new_parameters():
            parameter.add_(0.1)
    other = replace(cond, guidance=guidance((1.5, 4.0)))
    assert not torch.allclose(student(x, t, s, cond), student(x, t, s, other))
    assert student.base_digest() == teacher.network.base_digest()


def test_a_network_with_its_own_input_of_a_strength_takes_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Flux's usual strength where none is given; no second input is made for it."""
    folder = tmp_path_factory.mktemp("teacher")
    save_foreign(folder, "FluxTransformer2DModel")
    tiny = TINY["FluxTransformer2DModel"]
    teacher = load_diffusers(folder, tiny.shape)
    assert teacher.takes_guidance
    assert not teacher.guided
    x, t, cond = torch.randn(2, *tiny.shape), torch.tensor([0.7, 0.3]), tiny.condition(2)

    def found(given: Condition) -> torch.Tensor:
        outputs: torch.Tensor = teacher.network(x, t, t, given)
        return outputs

    torch.testing.assert_close(found(replace(cond, guidance=guidance((3.5, 3.5)))), found(cond), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found(replace(cond, guidance=guidance((1.0, 1.0)))), found(cond), rtol=1e-4)
    assert teacher.config is not None
    student = teacher.config.network.build(tiny.shape, 0, guided=True)
    assert teacher.network.state_dict().keys() == student.state_dict().keys()
