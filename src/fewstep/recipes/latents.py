"""Images of 256x256 in latents (studies/latents.md), with the published settings of iSD-T (2601.22679; math.md §5.3).

All need GPUs: `fewstep recipes` computes for how long. Encode your images first, with `--flip` and with latents of
deviation 1 in each channel, which is what `fewstep encode` gives, then give the folder of latents with `--data.root`.
"""

from dataclasses import dataclass, replace

from fewstep.data.sources import DataConfig, LatentsSource
from fewstep.flow.derivatives import Derivative
from fewstep.flow.guidance import DrawnGuidance, FixedGuidance, NoGuidance, TrainingGuidance
from fewstep.flow.paths import TrigPathConfig
from fewstep.flow.preconditioning.jumps import TrigPreconditioningConfig
from fewstep.flow.preconditioning.network_scaling import UnitScalingConfig
from fewstep.flow.times import BetaTimes
from fewstep.networks.dit import DiTConfig
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
    "photos-32-latents": LatentData((4, 32, 32), 3),
    "photos-64-latents": LatentData((4, 64, 64), 3),
}
"""By recipe: the data that its cost is computed for."""


def imagenet256_dit_b4() -> RunConfig:
    """iSD-T with DiT-B/4 on ImageNet-256 in latents of Stable Diffusion's autoencoder (4x32x32), trig path, omega 5.

    The published settings (math.md §5.3): null labels guided too, adaptive weight, AdamW with beta2 .999 and no
    clipping, EMA .99995 without a ramp, flips. Encode with: fewstep encode IMAGENET/train --autoencoder SD-VAE --out
    LATENTS --flip. Published: FID-50K 14.58 at 2 steps after 400,000 steps of 256. Not reproduced here.
    """
    return RunConfig(
        recipe="imagenet256-dit-b4",
        data=DataConfig(LatentsSource()),
        model=ModelConfig(TrigPathConfig(), TrigPreconditioningConfig(), UnitScalingConfig()),
        network=DiTConfig.of("B", 4),
        objective=_isd(FixedGuidance(omega=5.0, null_rows=True)),
        optimizer=OptimizerConfig(name="adamw", lr=1e-4, beta2=0.999, clip=0.0, warmup_images=0),
        training=replace(_durations(400_000), ema_ramp=False),
        evaluation=EvaluationConfig(samples=50_000, steps=(1, 2, 4)),
    )


def imagenet256_dit_xl1() -> RunConfig:
    """iSD-T with DiT-XL/1 on ImageNet-256 in VA-VAE latents (32x16x16), linear path, drawn guidance, Muon.

    The published settings (math.md §5.3), but for NorMuon, which torch's Muon stands in for: pseudo-Huber
    sqrt(mean square + 25) - 5, an anchor of mean square plus 1 - cosine, weight cos(pi t/2) and no adaptive one,
    guidance intervals always partial, null labels guided too, omega 1 fed outside the interval, beta2 .95, clipping at
    .1, EMA .99995 without a ramp; measured at omega 5 on the whole range. Encode with a VA-VAE in the form of a
    diffusers AutoencoderKL. Published: FID-50K 2.30 at 2 steps after 600,000 steps of 256. Not reproduced here.
    """
    weighting = Weighting("pseudo-huber-mean", huber_c=5.0, time_weight="cosine")
    guidance = DrawnGuidance(omega_max=8.0, full=0.0, null_rows=True, fed_inside=True)
    return RunConfig(
        recipe="imagenet256-dit-xl1",
        data=DataConfig(LatentsSource()),
        network=DiTConfig.of("XL", 1),
        objective=replace(_isd(guidance), weighting=weighting, anchor="mean-cosine"),
        optimizer=OptimizerConfig(name="muon", lr=1e-4, matrix_lr=5e-4, beta2=0.95, clip=0.1, warmup_images=0),
        training=replace(_durations(600_000), ema_ramp=False),
        evaluation=EvaluationConfig(samples=50_000, steps=(1, 2, 4), guidance_scale=5.0),
    )


def celebahq256_dit_b4() -> RunConfig:
    """iSD with DiT-B/4 on CelebA-HQ-256 in latents of Stable Diffusion's autoencoder: faces, without classes.

    The paper reports on CelebA-HQ; network, path, optimizer and length are our choice, a quarter of the steps of
    imagenet256-dit-b4. Without classes there is nothing to guide towards: this is iSD, not iSD-T. Not run here.
    """
    return replace(
        imagenet256_dit_b4(),
        recipe="celebahq256-dit-b4",
        data=DataConfig(LatentsSource(), labels=False),
        objective=_isd(NoGuidance()),
        optimizer=OptimizerConfig(name="adamw", lr=1e-4, warmup_images=0),
        training=_durations(100_000),
        evaluation=EvaluationConfig(samples=10_000, steps=(1, 2, 4)),
    )


def _isd(guidance: TrainingGuidance) -> ISD:
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
