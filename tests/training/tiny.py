"""Runs of ten steps, and what the tests compare of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.config import OptimizerConfig, RunConfig, TrainingConfig
from fewstep.flowmap import FlowMap
from fewstep.guidance import FixedGuidance
from fewstep.networks import MLPConfig, UNetConfig
from fewstep.objectives import ISD, DiagonalMatching
from fewstep.training import Machine, RunFolder

MACHINE = Machine(cpu=True, threads=1, quiet=True)
TINY = RunConfig(
    recipe="tiny",
    network=MLPConfig(width=16, depth=1, embedding_width=16),
    objective=ISD(diagonal=0.5, guidance=FixedGuidance(omega=1.3)),
    optimizer=OptimizerConfig(lr=5e-3, warmup_images=100),
    training=TrainingConfig(
        images=320, batch_size=32, ema_power=(0.1,), ema_decay=(0.9,),
        log_images=64, checkpoint_images=96, sample_images=0,
    ),
)  # fmt: skip
"""Ten steps, checkpoints after 3, 6, 9 and 10."""

KINDS: dict[str, RunConfig] = {
    "adamw": TINY,
    "muon": replace(TINY, optimizer=replace(TINY.optimizer, name="muon", decay="cosine")),
    "bf16": replace(TINY, training=replace(TINY.training, precision="bf16", flip=True)),
    "dropout": replace(
        TINY,
        network=UNetConfig(width=8, multipliers=(1,), blocks=1, attention=(), embedding_width=16, dropout=0.5),
        objective=DiagonalMatching(),
    ),
}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time of writing."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def stored_tensors(run: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint: raw weights, averages, optimiser state."""
    folder = RunFolder(run).last_checkpoint()
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.stem}/{key}": value for file in files for key, value in load_file(file).items()}


def assert_same_run(run: Path, other: Path) -> None:
    """Bit-identical newest checkpoints of the same step, and a log with each line once."""
    assert RunFolder(run).last_checkpoint().name == RunFolder(other).last_checkpoint().name
    first, second = stored_tensors(run), stored_tensors(other)
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert different == []
    steps = [[record["step"] for record in RunFolder(each).read_log()] for each in (run, other)]
    assert steps[0] == steps[1]


class Killed(BaseException):
    """Stands for anything that stops a process in the middle."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> None:
    """Let `owner.name` work `calls` times and raise Killed after that."""
    original, made = getattr(owner, name), []

    def stopping(*args: Any, **options: Any) -> Any:
        made.append(name)
        if len(made) > calls:
            raise Killed
        return original(*args, **options)

    monkeypatch.setattr(owner, name, stopping)


def noise_and_times(flow_map: FlowMap) -> tuple[Tensor, Tensor, Tensor]:
    """Six points with times (t, s) across the path's range."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, *flow_map.sample_shape, generator=generator)
    t = torch.linspace(0.5, 1.0, 6, dtype=torch.float64) * flow_map.path.t_max
    return x, t, 0.3 * t
