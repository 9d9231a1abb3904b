"""ImageNet-256 in latents, with the published settings of iSD-T (2601.22679; math.md §5.3).

Both need GPUs for days. They name random latents as their data: point `--data` at your own encoded latents.
"""

from __future__ import annotations

from fewstep.config import EvaluationConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from fewstep.data import DataConfig
from fewstep.guidance import DrawnGuidance, FixedGuidance
from fewstep.networks import DiTConfig
from fewstep.objectives import ISD
from fewstep.times import BetaTimes
from fewstep.weights import LossNorm


def imagenet256_dit_b4() -> RunConfig:
    """iSD-T with DiT-B/4 on latents of the Stable Diffusion autoencoder (4x32x32), trig path, omega 5.

    Published: FID-50K 14.58 at 2 steps after 400,000 steps of 256. Not reproduced here.
    """
    return RunConfig(
        recipe="imagenet256-dit-b4",
        data=DataConfig(source="random", random_shape=(4, 32, 32), random_classes=1000),
        model=ModelConfig(path="trig", preconditioning="trig", scaling="unit"),
        network=DiTConfig.of("B", 4),
        objective=_published(guidance=FixedGuidance(omega=5.0)),
        optimizer=OptimizerConfig(name="adamw", lr=1e-4, warmup_images=0),
        training=_durations(400_000),
        evaluation=EvaluationConfig(samples=50_000, steps=(1, 2, 4)),
    )


def imagenet256_dit_xl1() -> RunConfig:
    """iSD-T with DiT-XL/1 on VA-VAE latents (32x16x16), linear path, drawn guidance, pseudo-Huber, Muon.

    Published with NorMuon: FID-50K 2.30 at 2 steps after 600,000 steps of 256. Not reproduced here; torch's Muon
    stands in for NorMuon.
    """
    return RunConfig(
        recipe="imagenet256-dit-xl1",
        data=DataConfig(source="random", random_shape=(32, 16, 16), random_classes=1000),
        model=ModelConfig(path="linear", preconditioning="linear", scaling="identity"),
        network=DiTConfig.of("XL", 1),
        objective=_published(guidance=DrawnGuidance(omega_max=8.0), norm="pseudo-huber", huber=5.0),
        optimizer=OptimizerConfig(name="muon", lr=1e-4, matrix_lr=5e-4, warmup_images=0),
        training=_durations(600_000),
        evaluation=EvaluationConfig(samples=50_000, steps=(1, 2, 4)),
    )


def _published(guidance: FixedGuidance | DrawnGuidance, norm: LossNorm = "l2", huber: float = 0.03) -> ISD:
    return ISD(
        times=BetaTimes(0.8, 1.0),
        diagonal=0.0,
        guidance=guidance,
        dropout=0.1,
        derivative="finite-difference",
        step=0.005,
        norm=norm,
        huber=huber,
        power=1.0,
        offset=0.01,
    )


def _durations(steps: int) -> TrainingConfig:
    return TrainingConfig(
        images=256 * steps,
        batch_size=256,
        precision="bf16",
        ema_power=(),
        ema_decay=(0.99995,),
        log_images=25_600,
        checkpoint_images=2_560_000,
        sample_images=2_560_000,
    )
