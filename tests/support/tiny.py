"""Runs of ten steps, and what the tests compare of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.data.base import Dataset
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import FixedGuidance
from fewstep.flow.paths import EDMPathConfig, LinearPathConfig
from fewstep.flow.preconditioning.analytic import AnalyticPreconditioningConfig
from fewstep.flow.preconditioning.jumps import EulerPreconditioningConfig
from fewstep.flow.preconditioning.network_scaling import EDMScalingConfig
from fewstep.flow.preconditioning.skip import SkipPreconditioningConfig
from fewstep.flow.times import LogNormalTimes
from fewstep.networks.discriminator import DiscriminatorConfig
from fewstep.networks.mlp import MLPConfig
from fewstep.networks.unet import UNetConfig
from fewstep.objectives import CD, CTM, ISD, DiagonalMatching, TeacherSteps
from fewstep.recipes.config import (
    GANConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    StatisticsConfig,
    TrainingConfig,
)
from fewstep.training import RunFolder, Runtime, train_run
from fewstep.training.loop import Trainer
from tests.support.objectives import made

RUNTIME = Runtime(cpu=True, threads=1, quiet=True)
TINY = RunConfig(
    recipe="tiny",
    network=MLPConfig(width=16, depth=1, embedding_width=16),
    objective=made(ISD, flow_matching_ratio=0.5, guidance=FixedGuidance(omega=1.3)),
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

EDM_MODEL = ModelConfig(EDMPathConfig(), EulerPreconditioningConfig(), EDMScalingConfig())
TEACHER = replace(
    TINY,
    recipe="teacher",
    model=EDM_MODEL,
    objective=DiagonalMatching(times=LogNormalTimes(), measure="denoiser"),
)
DISCRIMINATOR = GANConfig(discriminator=DiscriminatorConfig(width=4), start_images=128)
"""Begins with the fifth step."""
_ANALYTIC = replace(EDM_MODEL, preconditioning=AnalyticPreconditioningConfig())
_ONCE = StatisticsConfig(points=8, samples=64)
_REFRESHED = replace(_ONCE, refresh_images=128)
_CTM = replace(
    TINY,
    recipe="student",
    model=EDM_MODEL,
    objective=CTM(steps=TeacherSteps(points=5), target_decay=0.9),
    initial="teacher",
    statistics=_ONCE,
)
STUDENTS: dict[str, RunConfig] = {
    "ctm": _CTM,
    "ctm-analytic": replace(_CTM, model=_ANALYTIC),
    "ctm-refreshed": replace(_CTM, model=_ANALYTIC, statistics=_REFRESHED),
    "ctm-skip": replace(
        _CTM,
        model=replace(EDM_MODEL, preconditioning=SkipPreconditioningConfig(components=10)),
        objective=replace(_CTM.objective, compare="jump-end"),
    ),
    "ctm-adversarial": replace(_CTM, objective=replace(_CTM.objective, gan=0.5), gan=DISCRIMINATOR),
    "cd": replace(_CTM, objective=CD(steps=TeacherSteps(points=5, u="adjacent"), target_decay=0.9)),
}
"""Runs that distil a teacher; those refreshed take new statistics after steps 4 and 8."""
TEACHERLESS: dict[str, RunConfig] = {
    "isd-edm": replace(TINY, model=_ANALYTIC, statistics=_REFRESHED),
    "isd-linear": replace(TINY, model=replace(_ANALYTIC, path=LinearPathConfig()), statistics=_REFRESHED),
}
"""Analytic preconditioning without a teacher."""


def student(kind: str, teacher: Path) -> RunConfig:
    """One of STUDENTS with its teacher, or of TEACHERLESS."""
    return replace(STUDENTS[kind], teacher=str(teacher)) if kind in STUDENTS else TEACHERLESS[kind]


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


def killed_after(steps: int, config: RunConfig, data: Dataset, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in a folder, from what is there, and be stopped in the middle after so many steps more."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, Trainer, "take_step", steps)
        with pytest.raises(Killed):
            train_run(config, data, RunFolder(root), RUNTIME)


def noise_and_times(flow_map: FlowMap) -> tuple[Tensor, Tensor, Tensor]:
    """Six points with times (t, s) across the path's range."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, *flow_map.sample_shape, generator=generator)
    t = torch.linspace(0.5, 1.0, 6, dtype=torch.float64) * flow_map.path.t_max
    return x, t, 0.3 * t
