"""Adapters: the teacher at first, on its own tensors, W + (alpha/rank) B A when merged; for every family."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.flow.flow_map import FlowMap
from fewstep.networks.base import LoRA, stored_state
from fewstep.networks.condition import Condition
from fewstep.teachers.base_weights import on_base
from fewstep.teachers.lora import base_name, merged
from fewstep.teachers.second_time import TwoTimesNetwork, merged_flow_map, save_adapters
from fewstep.utils.errors import ConfigError
from fewstep.utils.serialization import from_json, to_json
from fewstep.utils.weights import read_weights
from tests.support.foreign import EDM_KINDS, TINY, read_teacher, save_foreign

Made = Callable[[str], tuple[FlowMap, Condition]]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The teacher of a kind, and a condition of two samples; read once."""
    pytest.importorskip("diffusers")
    made: dict[str, tuple[FlowMap, Condition]] = {}

    def make(kind: str) -> tuple[FlowMap, Condition]:
        if kind not in made:
            made[kind] = read_teacher(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return make


def student_of(teacher: FlowMap, lora: LoRA) -> FlowMap:
    assert teacher.config is not None
    student = replace(teacher.config, network=teacher.config.network.with_lora(lora)).build().eval()
    network: Any = student.network
    network.share_base(teacher.network)
    network.take(teacher.network, "teacher")
    return student


def moved(flow_map: FlowMap) -> FlowMap:
    """With everything that is trained moved away from where it was."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (value for value in flow_map.parameters() if value.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return flow_map


@pytest.mark.parametrize("lora", [LoRA(2), LoRA(3, alpha=6.0, layers="all")], ids=["attention", "all"])
@pytest.mark.parametrize("kind", [*TINY, *EDM_KINDS])
@torch.no_grad()
def test_adapters_start_as_the_teacher_share_its_base_and_merge(kind: str, lora: LoRA, teacher: Made) -> None:
    """Equal to the last bit at first, on the same tensors; only adapters and the second time are trained."""
    own, cond = teacher(kind)
    student = student_of(own, lora)
    x = torch.randn(2, *own.sample_shape, generator=torch.Generator().manual_seed(0))
    t, s = torch.full((2,), 0.6 * own.path.t_max), torch.full((2,), 0.2 * own.path.t_max)
    assert torch.equal(student.output(x, t, s, cond), own.output(x, t, s, cond))

    trained = {key for key, value in student.network.named_parameters() if value.requires_grad}
    assert all(".down." in key or ".up." in key or ".project." in key or "second_time" in key for key in trained)
    state, theirs = student.network.state_dict(), own.network.state_dict()
    assert {base_name(key) for key in theirs} == set(theirs)
    shared = {key: name for key in state if (name := base_name(key)) is not None and key not in trained}
    assert len(shared) > 10
    assert all(state[key].data_ptr() == theirs[name].data_ptr() for key, name in shared.items())

    whole = merged_flow_map(moved(student))
    assert set(whole.network.state_dict()) == set(theirs) == set(merged(student.network.state_dict()))
    found = student.output(x, t, s, cond)
    torch.testing.assert_close(whole.output(x, t, s, cond), found, rtol=1e-4, atol=1e-4 * float(found.abs().max()))
    assert not torch.equal(found, own.output(x, t, s, cond))


@pytest.mark.parametrize("kind", ["DiTTransformer2DModel", "adm"])
def test_more_layers_have_adapters_where_all_are_asked_for(kind: str, teacher: Made) -> None:
    """Attention's are among them; embeddings of time, first and last layers are not."""
    own, _ = teacher(kind)
    few, more = ({key for key in student_of(own, lora).network.state_dict() if key.endswith(".up.weight")}
                 for lora in (LoRA(2), LoRA(2, layers="all")))  # fmt: skip
    assert few < more
    assert not any("embedder" in key or "map_layer" in key or "proj_out" in key or "out_conv" in key for key in more)


def test_alpha_scales_what_adapters_add(teacher: Made) -> None:
    """W + (alpha/rank) B A with the same A and B: the change of W is alpha/rank times as large."""
    own, _ = teacher("adm")
    changes = []
    for alpha in (2.0, 8.0):
        torch.manual_seed(0)
        student = moved(student_of(own, LoRA(2, alpha=alpha)))
        key = "two_times.network.dec.4x4_in0.qkv.weight"
        changes.append(merged(student.network.state_dict())[key] - own.network.state_dict()[key])
    torch.testing.assert_close(changes[1], 4 * changes[0], rtol=1e-4, atol=1e-6)


def test_files_hold_what_is_learned_alone(teacher: Made) -> None:
    """Where the base is known to lie elsewhere; whole where it is not, as in older files."""
    own, _ = teacher("ddpmpp")
    assert own.config is not None
    config = own.config.network.with_lora(LoRA(2))
    placed = on_base(config, "teacher.pkl", own.network)
    assert from_json(type(placed), to_json(placed)) == placed
    network = placed.build(own.sample_shape, own.num_classes, guided=False)
    trained = {key for key, value in network.named_parameters() if value.requires_grad}
    assert set(stored_state(network)) == trained
    whole = config.build(own.sample_shape, own.num_classes, guided=False)
    assert set(stored_state(whole)) == set(whole.state_dict())


def test_adapters_upon_adapters_are_refused(teacher: Made) -> None:
    own, _ = teacher("adm")
    assert own.config is not None
    with pytest.raises(ConfigError, match="fewstep merge"):
        own.config.network.with_lora(LoRA(2)).with_lora(LoRA(2))


def test_adapters_are_read_by_peft(teacher: Made, tmp_path: Path) -> None:
    """In a model of diffusers' own they give what merging gives."""
    diffusers = pytest.importorskip("diffusers")
    own, cond = teacher("UNet2DConditionModel")
    student = moved(student_of(own, LoRA(2, alpha=4.0)))
    network = student.network
    assert isinstance(network, TwoTimesNetwork)
    assert save_adapters(network, tmp_path) == ["pytorch_lora_weights.safetensors", "second_time.safetensors"]
    found = read_weights(tmp_path / "pytorch_lora_weights.safetensors")
    base = {key for key in found if key.endswith("lora_A.weight")}
    assert len(found) == 2 * len(base)
    assert all(key.startswith("unet.") for key in found)
    second = read_weights(tmp_path / "second_time.safetensors")
    assert len(second) == len(list(network.two_times.new_parameters()))
    pytest.importorskip("peft")
    save_foreign(tmp_path / "teacher", "UNet2DConditionModel")
    model = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "teacher" / "unet")
    model.load_lora_adapter(found, prefix="unet")
    model.eval()
    x, t = torch.randn(2, *own.sample_shape), torch.tensor([300, 600])
    whole: Any = merged_flow_map(student).network
    with torch.no_grad():
        expected = whole.two_times.network(x, t, encoder_hidden_states=cond.text).sample
        torch.testing.assert_close(model(x, t, encoder_hidden_states=cond.text).sample, expected, rtol=1e-4, atol=1e-4)
