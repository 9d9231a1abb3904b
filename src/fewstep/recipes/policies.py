"""Robot policies from demonstrations: the same data, network and budget for every objective."""

from dataclasses import replace

from fewstep.data.sources import DataConfig, DemonstrationsSource
from fewstep.flow.derivatives import Derivative
from fewstep.flow.times import BetaTimes
from fewstep.networks.mlp import MLPConfig
from fewstep.networks.unet1d import UNet1dConfig
from fewstep.objectives import ISD, DiagonalMatching, Pairs, Regression, Weighting
from fewstep.recipes.config import EvaluationConfig, OptimizerConfig, RunConfig, TrainingConfig


def policy_mlp() -> RunConfig:
    """iSD on chunks of actions with an MLP: a policy that acts after one network call, without a pretrained model.

    Needs demonstrations: `fewstep demos TASK`, then --data.root FILE. Measured on 100 of pointmaze-ring: 116 of 150
    episodes at the goal with 1 call a decision, 130 with 2 (studies/policies.md). Five minutes on one shared core.
    """
    return RunConfig(
        recipe="policy-mlp",
        data=DataConfig(DemonstrationsSource(), heldout=0.05),
        network=MLPConfig(width=512, depth=4, expansion=0.5, embedding_width=64, max_frequency=16.0),
        objective=ISD(
            pairs=Pairs(BetaTimes(), flow_matching_ratio=0.75),
            derivative=Derivative("finite-difference"),
            weighting=Weighting(weight_power=1.0, weight_eps=1.0),
            label_dropout=0.0,
        ),
        optimizer=OptimizerConfig(lr=3e-3, warmup_images=25_600, decay="cosine"),
        training=TrainingConfig(
            images=1_024_000, batch_size=256, ema_power=(0.1,), checkpoint_images=256_000, sample_images=0
        ),
        evaluation=EvaluationConfig(steps=(1, 2)),
    )


def policy_unet() -> RunConfig:
    """iSD with a U-Net along time, conditioned by FiLM, in place of the MLP of `policy-mlp`: slower on a CPU.

    No figure measured yet.
    """
    return replace(policy_mlp(), recipe="policy-unet", network=UNet1dConfig())


def policy_flow_matching() -> RunConfig:
    """Flow matching with the network and settings of `policy-mlp`, sampled by Euler's method: the baseline.

    Measured on 100 demonstrations of pointmaze-ring: 85 / 106 / 133 / 138 of 150 episodes at the goal with 1 / 2 / 4 /
    16 calls a decision. Three to four minutes on one shared core.
    """
    base = policy_mlp()
    return replace(
        base,
        recipe="policy-flow-matching",
        objective=DiagonalMatching(times=BetaTimes(), label_dropout=0.0),
        evaluation=replace(base.evaluation, steps=(1, 2, 4, 16)),
    )


def policy_regression() -> RunConfig:
    """Least squares with the network and settings of `policy-mlp`: one answer where demonstrations may have several.

    Measured on 100 demonstrations of pointmaze-ring: 85 of 150 episodes at the goal. Three to four minutes on one
    shared core.
    """
    base = policy_mlp()
    return replace(
        base,
        recipe="policy-regression",
        objective=Regression(),
        evaluation=replace(base.evaluation, steps=(1,)),
    )
