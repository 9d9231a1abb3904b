"""Students of the EDM teachers (fewstep.recipes.edm): consistency trajectory models (math.md §4) and their baseline.

Each starts from its teacher's weights; train the teacher first. Jumps let through what one number, regressed on the
teacher's trajectories, explains of them (math.md §3.8). `--model.preconditioning euler --objective.compare data-end` is
the published CTM, `--model.preconditioning analytic` computes the preconditioning from the teacher (math.md §3).
"""

from dataclasses import replace

from fewstep.flow.paths import EDMPathConfig, TeacherPathConfig
from fewstep.flow.preconditioning.jumps import EulerPreconditioningConfig
from fewstep.flow.preconditioning.network_scaling import EDMScalingConfig, TeacherScalingConfig
from fewstep.flow.preconditioning.skip import SkipPreconditioningConfig
from fewstep.networks.base import TeacherNetworkConfig
from fewstep.objectives import CD, CTM, EMD, LMD, TeacherSteps
from fewstep.recipes.config import (
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    StatisticsConfig,
    TrainingConfig,
)
from fewstep.recipes.digits import digits
from fewstep.recipes.edm import edm_digits, edm_fashion_mnist, edm_mixture

_STUDENT = ModelConfig(EDMPathConfig(), SkipPreconditioningConfig(family="regressed"), EDMScalingConfig())
_PLAIN = CTM(steps=TeacherSteps(points=18, solver="heun"), target_decay=0.99)
"""Compared at the data end, jumps drawn uniformly."""


def ctm_digits() -> RunConfig:
    """CTM from the teacher `edm-digits`, its skip regressed: one to two minutes measured for 600 of its 2,000 steps.

    After 600 steps (studies/skip.md): RMSE of samples against the teacher's 0.142 / 0.111 / 0.112 in 1 / 2 / 4 calls,
    Frechet distance 19.5 / 14.0 / 14.3 over 590 samples.
    """
    return _student(edm_digits(), "ctm-digits", images=256_000, batch_size=128, samples=1204)


def ctm_fashion_mnist() -> RunConfig:
    """CTM from the teacher `edm-fashion-mnist`, its skip regressed and seen: 8,000 steps, 1.2 s each on one core.

    Only its first 300 steps have been run: studies/skip.md.
    """
    base = _student(edm_fashion_mnist(), "ctm-fashion-mnist", images=512_000, batch_size=64, samples=10_000)
    return replace(base, network=base.network.seeing_skip(), statistics=StatisticsConfig(points=60, samples=128))


def ctm_mixture() -> RunConfig:
    """CTM from the teacher `edm-mixture`, its skip regressed: a few minutes on one core.

    After 900 of its 2,000 steps (studies/skip.md): RMSE of samples against the teacher's 0.110 / 0.105 / 0.115 in
    1 / 2 / 4 calls.
    """
    return _student(edm_mixture(), "ctm-mixture", images=256_000, batch_size=128, samples=4000)


def cd_digits() -> RunConfig:
    """Consistency distillation from the teacher `edm-digits`: jumps to the data end alone, re-noised between steps.

    No figure of the recipe itself is measured yet; studies/analytic-precond.md has 600 steps with a shorter average.
    """
    base = ctm_digits()
    return replace(
        base,
        recipe="cd-digits",
        model=replace(base.model, preconditioning=EulerPreconditioningConfig()),
        objective=CD(steps=TeacherSteps(u="adjacent")),
        evaluation=replace(base.evaluation, gamma=1.0),
    )


def _student(teacher: RunConfig, name: str, images: int, batch_size: int, samples: int) -> RunConfig:
    return replace(
        teacher,
        recipe=name,
        model=_STUDENT,
        objective=replace(_PLAIN, steps=replace(_PLAIN.steps, draws="published"), compare="jump-end"),
        optimizer=OptimizerConfig(lr=1e-3, warmup_images=50 * batch_size),
        training=TrainingConfig(
            images=images,
            batch_size=batch_size,
            log_images=50 * batch_size,
            checkpoint_images=images // 4,
            sample_images=images // 4,
        ),
        evaluation=EvaluationConfig(samples=samples, steps=(1, 2, 4), curve_images=images // 16),
        teacher=f"runs/{teacher.recipe}",
        initial="teacher",
        statistics=StatisticsConfig(),
    )


def ctm_flow_matching() -> RunConfig:
    """CTM from the teacher `digits-flow-matching`, in linear preconditioning: the quickstart's distilled student.

    Measured after 47,000 of its images, 43 s on two cores: Frechet distance 9.5 / 4.9 / 3.3 at 1 / 2 / 4 calls. Its
    teacher has 49 / 16 at 1 / 2 and 3.4 at 16.
    """
    base = digits()
    batch_size = 128
    return replace(
        base,
        recipe="ctm-flow-matching",
        objective=_PLAIN,
        optimizer=replace(base.optimizer, lr=1e-3, warmup_images=20 * batch_size),
        training=replace(base.training, batch_size=batch_size),
        evaluation=replace(base.evaluation, steps=(1, 2, 4)),
        teacher="runs/digits-flow-matching",
        initial="teacher",
    )


def emd_flow_matching() -> RunConfig:
    """Eulerian map distillation (AYF-EMD) from the teacher `digits-flow-matching`: its velocity drives the tangent.

    Measured with 76,800 images, 90 s on one shared core: Frechet distance 10.2 / 4.5 / 3.3 at 1 / 2 / 4 calls. CTM with
    as many takes 166 s and has 7.6 / 4.4 / 3.2.
    """
    return replace(ctm_flow_matching(), recipe="emd-flow-matching", objective=EMD())


def lmd_flow_matching() -> RunConfig:
    """Lagrangian map distillation from the teacher `digits-flow-matching`: the end of a jump moves as the teacher says.

    Measured with 76,800 images, 158 s on one shared core: Frechet distance 13.8 / 4.9 / 3.3 at 1 / 2 / 4 calls.
    """
    return replace(ctm_flow_matching(), recipe="lmd-flow-matching", objective=LMD())


def distil_diffusers() -> RunConfig:
    """CTM from a teacher of diffusers: `--teacher FOLDER`, with your data, and the student is in the teacher's format.

    The student is the teacher's network with a second time. Data, digits where you name none, must have the teacher's
    shape and classes.
    """
    base = ctm_digits()
    return replace(
        base,
        recipe="distil-diffusers",
        data=replace(base.data, labels=True),
        model=ModelConfig(TeacherPathConfig(), EulerPreconditioningConfig(), TeacherScalingConfig()),
        network=TeacherNetworkConfig(),
        objective=_PLAIN,
        optimizer=replace(base.optimizer, lr=1e-4),
        teacher="",
    )
