"""Images of 256x256 in latents (studies/latents.md), with the published settings of iSD-T (2601.22679; math.md §5.3).

All need GPUs: `fewstep recipes` computes for how long. Encode your images first, then give the folder of latents with
`--data.root`. Training flips are our choice, and so is the scale of latents, one standard deviation of each channel, on
which pseudo-Huber's constant stands: the published settings that we have do not say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fewstep.data import DataConfig
from fewstep.flow.derivatives import Derivative
from fewstep.flow.guidance import DrawnGuidance, FixedGuidance, NoGuidance, TrainingGuidance
from fewstep.flow.paths import TrigPathConfig
from fewstep.flow.preconditioning import TrigPreconditioningConfig, UnitScalingConfig
from fewstep.flow.times import BetaTimes
from fewstep.networks import DiTConfig
from fewstep.objectives import ISD, Pairs, Weighting
from fewstep.recipes.config import EvaluationConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig


@dataclass(frozen=True)
class LatentData:
    """What a recipe expects of its latents: their shape (c, h, w), and the classes that it trains them in."""

    shape: tuple[int, int, int]
    classes: int


AT_SCALE = {
    "imagenet256-dit-b4": LatentData((4, 32, 32), 1000),
    "imagenet256-dit-xl1": LatentData((32, 16, 16), 1000),
    "celebahq256-dit-b4": LatentData((4, 32, 32), 0),
}
"""By recipe: the data that its cost is computed for."""


def imagenet256_dit_b4() -> RunConfig:
    """iSD-T with DiT-B/4 on ImageNet-256 in latents of Stable Diffusion's autoencoder (4x32x32), trig path, omega 5.

    Encode with: fewstep encode IMAGENET/train --autoencoder SD-VAE --out LATENTS. Published: FID-50K 14.58 at 2 steps
    after 400,000 steps of 256. Not reproduced here.
    """
    return RunConfig(
        recipe="imagenet256-dit-b4",
        data=DataConfig(source="latents"),
        model=ModelConfig(TrigPathConfig(), TrigPreconditioningConfig(), UnitScalingConfig()),
        network=DiTConfig.of("B", 4),
        objective=_published(guidance=FixedGuidance(omega=5.0)),
        optimizer=OptimizerConfig(name="adamw", lr=1e-4, warmup_images=0),
        training=_durations(400_000),
        evaluation=EvaluationConfig(samples=50_000, steps=(1, 2, 4)),
    )


def imagenet256_dit_xl1() -> RunConfig:
    """iSD-T with DiT-XL/1 on ImageNet-256 in VA-VAE latents (32x16x16), linear path, drawn guidance, Muon.

    Pseudo-Huber loss. Encode with a VA-VAE in the form of a diffusers AutoencoderKL. Published with NorMuon: FID-50K
    2.30 at 2 steps after 600,000 steps of 256. Not reproduced here; torch's Muon stands in for NorMuon.
    """
    return RunConfig(
        recipe="imagenet256-dit-xl1",
        data=DataConfig(source="latents"),
        network=DiTConfig.of("XL", 1),
        objective=replace(
            _published(guidance=DrawnGuidance(omega_max=8.0)),
            weighting=Weighting("pseudo-huber", 5.0, weight_power=1.0),
        ),
        optimizer=OptimizerConfig(name="muon", lr=1e-4, matrix_lr=5e-4, warmup_images=0),
        training=_durations(600_000),
        evaluation=EvaluationConfig(samples=50_000, steps=(1, 2, 4)),
    )


def celebahq256_dit_b4() -> RunConfig:
    """iSD with DiT-B/4 on CelebA-HQ-256 in latents of Stable Diffusion's autoencoder: faces, without classes.

    The paper reports on CelebA-HQ; network, path and length are our choice, those of imagenet256-dit-b4 for a quarter
    of its steps. Without classes there is nothing to guide towards: this is iSD, not iSD-T. Not run here.
    """
    base = imagenet256_dit_b4()
    return replace(
        base,
        recipe="celebahq256-dit-b4",
        data=DataConfig(source="latents", labels=False),
        objective=_published(guidance=NoGuidance()),
        training=_durations(100_000),
        evaluation=EvaluationConfig(samples=10_000, steps=(1, 2, 4)),
    )


def _published(guidance: TrainingGuidance) -> ISD:
    return ISD(
        pairs=Pairs(BetaTimes(0.8, 1.0), flow_matching_ratio=0.0),
        guidance=guidance,
        label_dropout=0.1,
        derivative=Derivative("finite-difference", step=0.005),
        weighting=Weighting(weight_power=1.0, weight_eps=0.01),
    )


def _durations(steps: int) -> TrainingConfig:
    return TrainingConfig(
        images=256 * steps,
        batch_size=256,
        precision="bf16",
        flip=True,
        ema_power=(),
        ema_decay=(0.99995,),
        log_images=25_600,
        checkpoint_images=2_560_000,
        sample_images=2_560_000,
    )
