"""What saves memory changes no result: activations computed anew, moments in 8 bits; and the peak that is said."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.base import Dataset
from fewstep.flow.flow_map import FlowMap
from fewstep.networks.base import Network, NetworkConfig
from fewstep.networks.condition import Condition
from fewstep.networks.dit import DiTConfig
from fewstep.objectives import CTM, ISD
from fewstep.recipes import recipe
from fewstep.recipes.config import OptimizerConfig
from fewstep.teachers.diffusers import load_diffusers
from fewstep.teachers.edm import load_edm
from fewstep.training import RunFolder
from fewstep.training.loop import Trainer
from fewstep.training.memory import memory_words, peak_memory
from fewstep.training.optimizers import Optimizers
from fewstep.training.settings import Callbacks
from fewstep.training.setup import checkpoint_blocks
from fewstep.training.teacher import SlowAverage
from fewstep.utils.errors import ConfigError, MissingExtraError
from tests.support import edm_files
from tests.support.foreign import TINY as TINY_FOREIGN
from tests.support.foreign import save_foreign
from tests.support.objectives import made
from tests.support.tiny import RUNTIME, TINY


def read(kind: str, folder: Path) -> tuple[FlowMap, Condition]:
    if kind in TINY_FOREIGN:
        pytest.importorskip("diffusers")
        save_foreign(folder, kind)
        return load_diffusers(folder, TINY_FOREIGN[kind].shape), TINY_FOREIGN[kind].condition(4)
    edm_files.save_edm(folder / "n.pkl", kind)
    return load_edm(folder / "n.pkl"), Condition(torch.tensor([0, 1, 2, 0]))


@contextmanager
def kept() -> Iterator[dict[int, int]]:
    """Bytes of what is kept for the backward pass, by where it lies."""
    found: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield found


def gradients(flow_map: FlowMap, cond: Condition) -> tuple[Tensor, list[Tensor], int]:
    """The loss of a jump, its gradients, and the bytes that its graph keeps."""
    flow_map.requires_grad_(True).zero_grad()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, *flow_map.sample_shape, generator=draw)
    t, s = torch.full((4,), 0.7 * flow_map.path.t_max), torch.full((4,), 0.3 * flow_map.path.t_max)
    with kept() as bytes_:
        loss = flow_map.output(x, t, s, cond).square().mean()
    loss.backward()
    return loss.detach(), [p.grad for p in flow_map.parameters() if p.grad is not None], sum(bytes_.values())


@pytest.mark.parametrize("kind", ["UNet2DModel", "DiTTransformer2DModel", "SD3Transformer2DModel", "ddpmpp", "edm2"])
def test_checkpointed_blocks_give_the_same_loss_and_gradients_and_keep_less(kind: str, tmp_path: Path) -> None:
    """Where the second time enters within blocks too, and in a copy of the network as averages are."""
    flow_map, cond = read(kind, tmp_path)
    network: Any = flow_map.network
    for parameter in network.two_times.new_parameters():
        nn.init.normal_(parameter, std=0.1)
    loss, found, whole = gradients(flow_map, cond)
    found = [value.clone() for value in found]
    network.checkpoint_blocks()
    for each in (flow_map, SlowAverage(flow_map, 0.9).flow_map):
        again, values, less = gradients(each, cond)
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-6)
        for own, other in zip(values, found, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
        assert less < 0.8 * whole


class Own(Network):
    """Of the user's, without blocks."""

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        return x


def test_exact_derivatives_and_other_networks_are_refused_by_name(tmp_path: Path) -> None:
    flow_map, _ = read("ddpmpp", tmp_path)
    config = recipe("distil-diffusers")
    with pytest.raises(ConfigError, match="ISD takes its exact derivative"):
        checkpoint_blocks(replace(config, objective=ISD()), flow_map)
    checkpoint_blocks(replace(config, objective=CTM()), flow_map)
    flow_map.network = Own((1, 8, 8), 0, guided=False)
    with pytest.raises(ConfigError, match="Own keeps its activations"):
        checkpoint_blocks(replace(config, objective=CTM()), flow_map)


@pytest.mark.parametrize("kind", ["exact", "finite-difference"])
@pytest.mark.parametrize("network", [TINY.network, DiTConfig(width=16, depth=2, heads=2, patch=2)])
def test_a_run_without_activations_learns_the_same(
    network: NetworkConfig, kind: str, digits: Dataset, tmp_path: Path
) -> None:
    config = replace(TINY, network=network, objective=made(ISD, kind=kind, flow_matching_ratio=0.5))
    weights = []
    for spared in (False, True):
        runtime = replace(RUNTIME, gradient_checkpointing=spared)
        with Trainer(config, digits, RunFolder(tmp_path / str(spared)), runtime, Callbacks()) as trainer:
            for _ in range(3):
                trainer.take_step()
            weights.append([value.detach().clone() for value in trainer.learner.flow_map.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_the_peak_is_of_what_was_taken() -> None:
    """It never falls, and grows by what is taken beyond it."""
    before = peak_memory(torch.device("cpu"))
    taken = torch.ones(int(before * 2**18) + 2**22)  # as much again as there was at most, and 16 MiB
    after = peak_memory(torch.device("cpu"))
    assert after > before + 10
    del taken
    assert peak_memory(torch.device("cpu")) >= after
    assert memory_words(torch.device("cpu")).startswith(f"peak memory {after:,.0f} MiB (resident)"[:14])


def test_eight_bits_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(
        MissingExtraError, match=r"adamw8bit needs bitsandbytes: pip install bitsandbytes \(the extra \[bnb\]\)"
    ):
        Optimizers(nn.Linear(2, 2), OptimizerConfig(name="adamw8bit"))


def test_eight_bits_learn_and_go_on_where_they_were() -> None:
    """Near AdamW after some steps; a state that is stored and read gives the same next step, to the last bit."""
    pytest.importorskip("bitsandbytes")

    def made(name: Any) -> tuple[nn.Module, Optimizers]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 8))
        return module, Optimizers(module, OptimizerConfig(name=name, lr=1e-2, warmup_images=0))

    def step(module: nn.Module, optimizers: Optimizers, number: int) -> float:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(number))
        loss = (module(x) - x[:, :8]).square().mean()
        optimizers.zero_grad()
        loss.backward()
        optimizers.step(1, 0.0)
        return float(loss.detach())

    losses = {}
    for name in ("adamw", "adamw8bit"):
        module, optimizers = made(name)
        losses[name] = [step(module, optimizers, number) for number in range(30)]
    assert losses["adamw8bit"][-1] == pytest.approx(losses["adamw"][-1], rel=0.2)
    assert losses["adamw8bit"][-1] < 0.5 * losses["adamw8bit"][0]
    assert any(value.dtype == torch.uint8 for value in optimizers.tensors().values())

    other, again = made("adamw8bit")
    other.load_state_dict(module.state_dict())
    again.load({key: value.clone() for key, value in optimizers.tensors().items()}, "here")
    assert step(module, optimizers, 30) == step(other, again, 30)
    for own, copied in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(own, copied)
