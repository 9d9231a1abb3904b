"""A folder of pictures of your own: hundreds to a million, at 32x32 or 64x64 pixels, or as latents.

Give the folder with `--data.root`; its first-level subfolders are the classes, if it has any. One picture in twenty is
held out. On pixels the network predicts the picture itself, at every noise level (math.md §2, Euler's jump): blocks of
8x8 pixels then need no room for the noise, and a CPU trains them. Its jumps let through the flow map of a Gaussian with
the pictures' spectrum (math.md §3.8), so that the network has less to learn.
"""

from dataclasses import replace

from fewstep.data.sources import DataConfig, ImagesSource, LatentsSource
from fewstep.flow.derivatives import Derivative
from fewstep.flow.guidance import FixedGuidance
from fewstep.flow.paths import LinearPathConfig
from fewstep.flow.preconditioning.jumps import EulerPreconditioningConfig
from fewstep.flow.preconditioning.network_scaling import UnitScalingConfig
from fewstep.flow.preconditioning.skip import SkipPreconditioningConfig
from fewstep.flow.times import BetaTimes, LogitNormalTimes
from fewstep.networks.unet import UNetConfig
from fewstep.objectives import ISD, DiagonalMatching, Pairs, Weighting
from fewstep.recipes.config import EvaluationConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig

_BLOCKS_OF_8 = UNetConfig(
    width=64, multipliers=(1, 2, 2), blocks=1, attention=(8,), head_width=32, patch=8, max_frequency=16.0
)
_LATENT = UNetConfig(width=128, multipliers=(1, 2, 2), blocks=2, attention=(8,), patch=2, max_frequency=16.0)


def photos_64() -> RunConfig:
    """iSD-T on a folder of pictures at 64x64, with a U-Net of 2.8 million parameters on 8x8 pixel blocks.

    Its 120,000 images took 1,087 s of two cores on 600 crops of 40 photographs: Frechet distance 24.4 in one call and
    28.5 in two, where real images reach 6.0. Colours, light and textures of the classes, blurred; no things yet.
    Without the skip (`--model.preconditioning euler`) 25.8 and 35.7.
    """
    return RunConfig(
        recipe="photos-64",
        data=DataConfig(ImagesSource(), image_size=64, heldout=0.05),
        model=ModelConfig(LinearPathConfig(), SkipPreconditioningConfig(basis="cosine"), UnitScalingConfig()),
        network=replace(_BLOCKS_OF_8, sees_skip=True),
        objective=ISD(
            pairs=Pairs(BetaTimes(), flow_matching_ratio=0.75, endpoint_share=0.75),
            guidance=FixedGuidance(omega=1.3),
            derivative=Derivative("finite-difference"),
            weighting=Weighting(weight_power=1.0, weight_eps=1.0),
        ),
        optimizer=OptimizerConfig(lr=3e-3, warmup_images=3_000, decay="cosine"),
        training=TrainingConfig(
            images=120_000,
            batch_size=32,
            flip=True,
            ema_power=(0.1,),
            log_images=1_600,
            checkpoint_images=30_000,
            sample_images=30_000,
        ),
        evaluation=EvaluationConfig(samples=2000, steps=(1, 2, 4), reference_steps=32),
    )


def photos_64_flow_matching() -> RunConfig:
    """Flow matching with the network and settings of `photos-64`, sampled by Euler's method: its baseline.

    As many images, at about half the cost; on those of `photos-64` it has a Frechet distance of 118 in 16 calls. Times
    are logit-normal: near the data the error of a velocity that is computed from the picture has no bound.
    """
    base = photos_64()
    return replace(
        base,
        recipe="photos-64-flow-matching",
        model=replace(base.model, preconditioning=EulerPreconditioningConfig()),
        network=_BLOCKS_OF_8,
        objective=DiagonalMatching(times=LogitNormalTimes()),
        evaluation=replace(base.evaluation, steps=(1, 2, 4, 16)),
    )


def photos_32() -> RunConfig:
    """iSD-T on a folder of pictures at 32x32: the network and settings of `photos-64`, on 4x4 pixel blocks.

    It costs what `photos-64` does. No figure is measured.
    """
    base = photos_64()
    network, data = replace(_BLOCKS_OF_8, patch=4, sees_skip=True), replace(base.data, image_size=32)
    return replace(base, recipe="photos-32", data=data, network=network)


def photos_32_latents() -> RunConfig:
    """iSD-T on latents of 32x32, which pictures at 256x256 have, with a U-Net on 2x2 blocks of them.

    Encode first: fewstep encode PHOTOS --autoencoder AUTOENCODER --image-size 256 --heldout 0.05 --flip --out LATENTS.
    Made for an hour of a GPU; no figure is measured yet.
    """
    base = photos_64()
    return replace(
        base,
        recipe="photos-32-latents",
        data=DataConfig(LatentsSource()),
        model=ModelConfig(),
        network=_LATENT,
        optimizer=replace(base.optimizer, lr=1e-3, warmup_images=64_000),
        training=replace(
            base.training,
            images=1_280_000,
            batch_size=128,
            log_images=12_800,
            checkpoint_images=128_000,
            sample_images=128_000,
        ),
    )


def photos_64_latents() -> RunConfig:
    """The same on latents of 64x64, which pictures at 512x512 have, on 4x4 blocks of them.

    Encode first, with --image-size 512. Made for an hour of a GPU; no figure is measured yet.
    """
    return replace(photos_32_latents(), recipe="photos-64-latents", network=replace(_LATENT, patch=4))
