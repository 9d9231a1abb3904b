"""--runtime.compile: the same run, in fewer programs; what cannot be compiled is refused before the first step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.cli.main import main
from fewstep.data.base import Dataset
from fewstep.flow.flow_map import FlowMap
from fewstep.networks import attention
from fewstep.networks.base import NetworkConfig, Shape
from fewstep.networks.dit import DiTConfig
from fewstep.networks.mlp import MLP, MLPConfig
from fewstep.objectives import ISD
from fewstep.recipes.config import RunConfig
from fewstep.training import RunFolder, build, compiling, train_run
from fewstep.training.compiling import CompiledPasses, check_compiling
from fewstep.utils.errors import ConfigError
from tests.support.tiny import RUNTIME, TINY, noise_and_times, stored_tensors

COMPILED = replace(RUNTIME, compile=True)
ISD_ALONE = replace(TINY, objective=ISD())


def has_compiler() -> bool:
    try:
        check_compiling(MLPConfig().build((2,), 0, False), torch.device("cpu"))
    except ConfigError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs as torch.compile cuts them out, which no C++ compiler then makes anything of: that takes a minute."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch.compiler.reset()


@needs_compiler
def test_a_compiled_run_is_the_same_run(
    traced: None, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Losses and all that checkpoints hold; guidance's own passes, of another number each time, are no programs."""
    made: list[CompiledPasses] = []

    class Noted(CompiledPasses):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(compiling, "CompiledPasses", Noted)
    train_run(TINY, digits, RunFolder(tmp_path / "written"), RUNTIME)
    assert not made
    train_run(TINY, digits, RunFolder(tmp_path / "compiled"), replace(COMPILED, quiet=False))
    assert "compiling the network" in capfd.readouterr().err
    assert sorted((kind, rows) for kind, rows, *_ in made[0].known) == [("output", 32), ("tangent", 16)]
    written, compiled = (RunFolder(tmp_path / name).read_log() for name in ("written", "compiled"))
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in written], abs=1e-5)
    assert all(line["compiled"] for line in compiled)
    assert not any("compiled" in line for line in written)
    first, second = stored_tensors(tmp_path / "written"), stored_tensors(tmp_path / "compiled")
    assert list(first) == list(second)
    torch.testing.assert_close(second, first, rtol=0, atol=1e-5)


@needs_compiler
def test_a_run_goes_on_compiled_or_not(
    traced: None, digits: Dataset, tmp_path: Path, unbroken: Callable[[str], Path]
) -> None:
    longer = replace(TINY, training=replace(TINY.training, images=192))
    train_run(longer, digits, RunFolder(tmp_path), COMPILED)
    train_run(TINY, digits, RunFolder(tmp_path), RUNTIME)
    torch.testing.assert_close(stored_tensors(tmp_path), stored_tensors(unbroken("adamw")), rtol=0, atol=1e-5)


@needs_compiler
def test_a_compiled_tangent_of_attention_goes_by_in_tiles(
    traced: None, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of sixteen queries at once, to the numbers of the one that is not compiled."""
    network = DiTConfig(width=8, depth=1, heads=1, patch=2)
    flow_map = build(replace(ISD_ALONE, network=network), digits).flow_map
    with torch.no_grad():
        for parameter in flow_map.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    x, t, s = noise_and_times(flow_map)
    whole, seen = attention._weights, set[int]()

    def weights(q: Tensor, k: Tensor) -> Tensor:
        seen.add(q.shape[-2])
        return whole(q, k)

    def gradients() -> list[Tensor]:
        along = torch.ones_like(x), torch.ones_like(t), None
        output, moved = flow_map.with_tangent(x, t, s, None, along)
        loss = output.square().mean()
        return [moved, *torch.autograd.grad(loss, [*flow_map.parameters()], materialize_grads=True)]

    wanted, passes = gradients(), CompiledPasses()
    monkeypatch.setattr(attention, "TILE", 40)
    monkeypatch.setattr(attention, "_weights", weights)
    with flow_map.using(passes):
        passes.learn([gradients, gradients])  # type: ignore[list-item]
        seen.clear()
        torch.compiler.reset()
        found = gradients()
    assert seen == {2}
    for own, usual in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, usual, rtol=1e-4, atol=1e-6)


@needs_compiler
def test_programs_of_a_compiler_give_the_same_losses(digits: Dataset) -> None:
    """Of the network with a tangent and without, by inductor; gradients of terms are taken from a graph that stays."""
    torch.compiler.reset()
    flow_map = build(replace(ISD_ALONE, network=MLPConfig(width=8, depth=1, embedding_width=8)), digits).flow_map
    x, t, s = noise_and_times(flow_map)
    passes = CompiledPasses()

    def losses(flow_map: FlowMap) -> tuple[Tensor, list[Tensor]]:
        v = flow_map.velocity(x, t)
        output, moved = flow_map.with_tangent(x, t, s, None, (v.detach(), torch.ones_like(t), None))
        loss = (output - (output + moved).detach()).square().mean() + v.square().mean()
        parameters = list(flow_map.parameters())
        first = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        again = torch.autograd.grad(loss, parameters, materialize_grads=True)
        torch.testing.assert_close(first, again, rtol=0, atol=0)
        return loss.detach(), list(again)

    with torch.no_grad():
        for parameter in flow_map.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))

    def step() -> None:
        with flow_map.using(passes):
            losses(flow_map)

    passes.learn([step, step])
    assert {kind for kind, *_ in passes.known} == {"output", "tangent"}
    with flow_map.using(passes):
        compiled = losses(flow_map)
    torch.testing.assert_close(compiled, losses(flow_map), rtol=1e-5, atol=1e-5)


class Asking(MLP):
    """Looks at its input, which no one program can."""

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: object = None) -> Tensor:
        assert float(t.sum()) >= 0
        return super().forward(x, t, s, None)


class AskingConfig(MLPConfig):
    def build(self, shape: Shape, num_classes: int, guided: bool, observation: Shape = ()) -> Asking:
        return Asking(self, shape, num_classes, guided, observation)


@needs_compiler
@pytest.mark.parametrize(
    ("network", "said"),
    [
        (AskingConfig(width=8, depth=1, embedding_width=8), r"Asking with DiagonalMatching cannot be compiled \(.+\)"),
        (
            DiTConfig(width=16, depth=1, heads=2, patch=4, checkpoint=True),
            "DiT without its activations cannot be compiled",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    network: NetworkConfig, said: str, traced: None, digits: Dataset, tmp_path: Path
) -> None:
    from fewstep.objectives import DiagonalMatching

    config = RunConfig("refused", network=network, objective=DiagonalMatching(), training=TINY.training)
    with pytest.raises(ConfigError, match=rf"^--runtime.compile: {said}: leave it out$"):
        train_run(config, digits, RunFolder(tmp_path / "run"), COMPILED)
    assert not (tmp_path / "run").exists()


def test_a_machine_without_a_compiler_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._inductor import cpp_builder

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    cpp_builder.cpp_compiler_search.cache_clear()
    words = ["train", "digits", "--runtime.compile", "--runtime.cpu", "--out", str(tmp_path / "run")]
    try:
        assert main(words) == 2
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()
    last = capsys.readouterr().err.strip().splitlines()
    assert last == ["fewstep: --runtime.compile needs a C++ compiler, such as g++: install one, or leave it out"]
    assert not (tmp_path / "run").exists()
