"""Students of teachers in formats of elsewhere, for one GPU (docs/tutorials/distil-your-own.md). `fewstep recipes`
computes their cost from these settings and a known teacher's size; none has been run here.
"""

import json
from dataclasses import dataclass, replace

from fewstep.data.sources import DataConfig, LatentsSource
from fewstep.flow.guidance import FixedGuidance
from fewstep.flow.preconditioning.analytic import AnalyticPreconditioningConfig
from fewstep.networks.base import NetworkConfig, TeacherNetworkConfig
from fewstep.objectives import CTM, TeacherSteps
from fewstep.recipes.config import EvaluationConfig, OptimizerConfig, RunConfig, StatisticsConfig, TrainingConfig
from fewstep.recipes.distillation import distil_diffusers
from fewstep.teachers.diffusers import DiffusersConfig
from fewstep.teachers.edm_networks import SongUNetConfig

_SD = {
    "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768, "in_channels": 4, "layers_per_block": 2, "out_channels": 4, "sample_size": 64,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip


@dataclass(frozen=True)
class KnownTeacher:
    """What a recipe's cost is computed for: a teacher's network, and the shape and classes of its samples."""

    network: NetworkConfig
    shape: tuple[int, ...]
    classes: int


TEACHERS_AT_SCALE = {
    "distil-edm": KnownTeacher(SongUNetConfig(128, (2, 2, 2), 4, (16,)), (3, 32, 32), 10),
    "distil-sd-lora": KnownTeacher(DiffusersConfig("UNet2DConditionModel", json.dumps(_SD)), (4, 64, 64), 0),
}
"""By recipe: EDM's DDPM++ on CIFAR-10 with classes, and the U-Net of Stable Diffusion 1.5."""


def distil_edm() -> RunConfig:
    """CTM with Analytic-Precond from a network pickle of EDM or EDM2: `--teacher FILE.pkl`, with its data.

    Needs the data that the teacher was trained on, of its shape and classes: digits where you name none. The teacher
    walks at most three cells of its grid of 18 a step. The cost is computed for CIFAR-10's DDPM++; not run here.
    """
    base = distil_diffusers()
    return replace(
        base,
        recipe="distil-edm",
        model=replace(base.model, preconditioning=AnalyticPreconditioningConfig()),
        objective=CTM(steps=TeacherSteps(points=18, solver="heun", longest=3), target_decay=0.999),
        optimizer=OptimizerConfig(lr=4e-4, warmup_images=128_000),
        training=_lasting(steps=50_000, batch_size=256),
        evaluation=EvaluationConfig(samples=10_000, steps=(1, 2, 4)),
        statistics=StatisticsConfig(points=120, samples=256),
    )


def distil_sd_lora() -> RunConfig:
    """CTM from Stable Diffusion 1.5, or a model of its kind, by adapters of rank 64: `--teacher FOLDER`, in bf16.

    Needs latents with prompts, by `fewstep encode` (`--data.root LATENTS`), and `--runtime.gradient-checkpointing` with
    `--runtime.micro-batch` where memory is short. The teacher is guided at 7.5, which the student has distilled in.
    Jumps are compared where they end. Computed for latents of 4x64x64; not run here.
    """
    base = distil_diffusers()
    steps = TeacherSteps(points=18, solver="euler", longest=2)
    return replace(
        base,
        recipe="distil-sd-lora",
        data=DataConfig(LatentsSource()),
        network=TeacherNetworkConfig(lora=64),
        objective=CTM(steps=steps, target_decay=0.99, compare="jump-end", guidance=FixedGuidance(omega=7.5)),
        optimizer=OptimizerConfig(lr=1e-4, warmup_images=32_000),
        training=replace(_lasting(steps=10_000, batch_size=64), precision="bf16"),
        evaluation=EvaluationConfig(samples=1000, steps=(1, 2, 4)),
    )


def _lasting(steps: int, batch_size: int) -> TrainingConfig:
    images = steps * batch_size
    return TrainingConfig(
        images=images, batch_size=batch_size, log_images=100 * batch_size, checkpoint_images=images // 20,
        sample_images=images // 20,
    )  # fmt: skip
