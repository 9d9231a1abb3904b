"""Fashion-MNIST: 70,000 pictures of clothes, 28x28, from the IDX files that Debian packages."""

from dataclasses import replace

from fewstep.data.sources import DataConfig, IdxSource
from fewstep.flow.derivatives import Derivative
from fewstep.flow.guidance import FixedGuidance
from fewstep.flow.times import BetaTimes, LogitNormalTimes
from fewstep.networks.dit import DiTConfig
from fewstep.networks.unet import UNetConfig
from fewstep.objectives import ISD, DiagonalMatching, Pairs, Weighting
from fewstep.recipes.config import EvaluationConfig, OptimizerConfig, RunConfig, TrainingConfig


def fashion_mnist_unet() -> RunConfig:
    """iSD-T on Fashion-MNIST with a U-Net of 1.2 million parameters on 2x2 pixel blocks.

    Measured: Frechet distance 8.9 / 4.7 / 3.2 at 1 / 2 / 4 steps (classifier features, 5,000 samples, real images
    0.5). 55 minutes on one shared core.
    """
    return RunConfig(
        recipe="fashion-mnist-unet",
        data=DataConfig(IdxSource()),
        network=UNetConfig(
            width=48, multipliers=(1, 2), blocks=1, attention=(7,), head_width=32, patch=2, max_frequency=16.0
        ),
        objective=ISD(
            pairs=Pairs(BetaTimes(), flow_matching_ratio=0.75),
            guidance=FixedGuidance(omega=1.3),
            derivative=Derivative("finite-difference"),
            weighting=Weighting(weight_power=1.0, weight_eps=1.0),
        ),
        optimizer=OptimizerConfig(lr=3e-3, warmup_images=12_800, decay="cosine"),
        training=TrainingConfig(
            images=360_000,
            batch_size=64,
            ema_power=(0.1,),
            log_images=6_400,
            checkpoint_images=32_000,
            sample_images=64_000,
        ),
        evaluation=EvaluationConfig(samples=10_000, steps=(1, 2, 4), reference_steps=32),
    )


def fashion_mnist_flow_matching() -> RunConfig:
    """Flow matching with the network and settings of `fashion-mnist-unet`, sampled by Euler's method: its baseline.

    1.81 times the images, which cost the same: a step of iSD-T takes 1.81 of flow matching's
    (`python -m benchmarks.cost recipes fashion-mnist-unet fashion-mnist-flow-matching`). Measured: Frechet distance
    110 / 48.0 / 2.3 at 1 / 2 / 32 steps (5,000 samples). 53 minutes on one shared core.
    """
    base = fashion_mnist_unet()
    return replace(
        base,
        recipe="fashion-mnist-flow-matching",
        objective=DiagonalMatching(times=BetaTimes()),
        training=replace(base.training, images=651_000),
        evaluation=replace(base.evaluation, steps=(1, 2, 4, 16, 32)),
    )


def fashion_mnist_dit() -> RunConfig:
    """iSD-T on Fashion-MNIST with a diffusion transformer of 4 layers on 4x4 patches, 1.3 million parameters.

    Measured: Frechet distance 16.9 / 9.2 / 7.5 at 1 / 2 / 4 steps (classifier features, 5,000 samples, real images
    0.5). 67 minutes on one shared core.
    """
    base = fashion_mnist_unet()
    return replace(
        base,
        recipe="fashion-mnist-dit",
        network=DiTConfig(width=128, depth=4, heads=4, patch=4, max_frequency=16.0),
        objective=ISD(
            pairs=Pairs(LogitNormalTimes(), flow_matching_ratio=0.75, endpoint_share=0.75),
            guidance=FixedGuidance(omega=1.5, low=0.3),
            derivative=Derivative("finite-difference"),
            weighting=Weighting(weight_power=1.0, weight_eps=1.0),
        ),
        optimizer=replace(base.optimizer, lr=2e-3),
        training=replace(base.training, images=192_000),
    )


def fashion_mnist_dit_flow_matching() -> RunConfig:
    """Flow matching with the network and settings of `fashion-mnist-dit`, sampled by Euler's method: its baseline.

    1.69 times the images, which cost the same. Measured: Frechet distance 117 / 59 / 9.1 at 1 / 2 / 32 steps (5,000
    samples). 67 minutes on one shared core.
    """
    base = fashion_mnist_dit()
    return replace(
        base,
        recipe="fashion-mnist-dit-flow-matching",
        objective=DiagonalMatching(times=BetaTimes()),
        training=replace(base.training, images=324_000),
        evaluation=replace(base.evaluation, steps=(1, 2, 4, 16, 32)),
    )
