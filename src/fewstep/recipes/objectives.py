"""8x8 digits by every objective of the family: the network, data and length of `digits`, another objective each.

Objectives have their papers' settings; what they do here, over learning rates and seeds, is in studies/stability.md.
Frechet distances are of a classifier's features.
"""

from dataclasses import replace

from fewstep.flow.paths import TrigPathConfig
from fewstep.flow.preconditioning.jumps import (
    BCMPreconditioningConfig,
    EulerPreconditioningConfig,
    TrigPreconditioningConfig,
)
from fewstep.flow.preconditioning.network_scaling import EDMInputScalingConfig, UnitScalingConfig
from fewstep.objectives import CT, ECT, ESD, LSD, PSD, SCD, SCT, Distance, MeanFlow, Objective, Shortcut, Tangent
from fewstep.recipes.config import ModelConfig, RunConfig
from fewstep.recipes.digits import digits
from fewstep.recipes.edm import EDM_MODEL, edm_digits

_TEACHER = "runs/edm-digits"
_HUBER = Distance("pseudo-huber", 0.00054 * 64**0.5)  # of iCT, 2310.14189, for 64 numbers


def digits_meanflow() -> RunConfig:
    """MeanFlow on 8x8 digits: the conditional velocity drives the tangent, three quarters of the samples have s = t.

    Measured: Frechet distance 6.6 / 3.5 / 3.0 at 1 / 2 / 4 steps (real digits 1.6), 304 s on one shared core.
    """
    return _by("digits-meanflow", MeanFlow())


def digits_esd() -> RunConfig:
    """Eulerian self-distillation on 8x8 digits: the gradient flows through the derivative too.

    Measured: Frechet distance 9.4 / 7.5 / 5.8 at 1 / 2 / 4 steps (real digits 1.6), 498 s on one shared core.
    """
    return _by("digits-esd", ESD())


def digits_lsd() -> RunConfig:
    """Lagrangian self-distillation on 8x8 digits: the end of a jump moves as the model's own velocity says.

    Measured: Frechet distance 7.0 / 4.7 / 3.8 at 1 / 2 / 4 steps (real digits 1.6), 349 s on one shared core.
    """
    return _by("digits-lsd", LSD())


def digits_psd() -> RunConfig:
    """Progressive self-distillation on 8x8 digits, the middle of every jump as its stop.

    Measured: Frechet distance 9.9 / 5.5 / 4.0 at 1 / 2 / 4 steps (real digits 1.6), 262 s on one shared core.
    """
    return _by("digits-psd", PSD(u="midpoint"))


def digits_shortcut() -> RunConfig:
    """A shortcut model on 8x8 digits, its short jumps taken by a slow average.

    Measured: Frechet distance 14.5 / 8.4 / 5.8 at 1 / 2 / 4 steps (real digits 1.6), 272 s on one shared core.
    """
    return _by("digits-shortcut", Shortcut(target_decay=0.99))


def digits_ct() -> RunConfig:
    """Consistency training on 8x8 digits: EDM path, BCM preconditioning, the grid doubling over the run.

    Jumps to the data end alone, re-noised between steps.
    Measured: Frechet distance 9.6 / 10.2 / 10.1 at 1 / 2 / 4 steps (real digits 1.6), 304 s on one shared core.
    """
    model = replace(EDM_MODEL, preconditioning=BCMPreconditioningConfig(), scaling=EDMInputScalingConfig())
    return _to_the_end("digits-ct", CT(duration=digits().training.images, distance=_HUBER), model)


def digits_ect() -> RunConfig:
    """Easy consistency tuning on 8x8 digits, unconditional: from the weights of `edm-digits`, trained first.

    Jumps to the data end alone, re-noised between steps.
    Measured: Frechet distance 10.6 / 7.4 / 8.5 at 1 / 2 / 4 steps (real digits 1.6), 310 s on one shared core.
    """
    return replace(
        _tuned("digits-ect", ECT(stage_images=digits().training.images // 8, distance=_HUBER)), initial=_TEACHER
    )


def digits_sct() -> RunConfig:
    """Continuous-time consistency training on 8x8 digits: trig path, tangent warmed up over a fifth of the run.

    Jumps to the data end alone, re-noised between steps.
    Measured: Frechet distance 17.5 / 20.1 / 21.6 at 1 / 2 / 4 steps (real digits 1.6), 362 s on one shared core.
    Half of the samples have their class.
    """
    model = ModelConfig(TrigPathConfig(), TrigPreconditioningConfig(), UnitScalingConfig())
    return _to_the_end("digits-sct", SCT(tangent=_tangent()), model)


def digits_scd() -> RunConfig:
    """Continuous-time consistency distillation on 8x8 digits, unconditional, of `edm-digits`, trained first.

    Jumps to the data end alone, re-noised between steps.
    Measured: Frechet distance 16.5 / 16.3 / 17.7 at 1 / 2 / 4 steps (real digits 1.6), 372 s on one shared core.
    """
    return replace(_tuned("digits-scd", SCD(tangent=_tangent())), teacher=_TEACHER, initial="teacher")


def _by(name: str, objective: Objective) -> RunConfig:
    return replace(digits(), recipe=name, objective=objective)


def _to_the_end(name: str, objective: Objective, model: ModelConfig) -> RunConfig:
    base = _by(name, objective)
    return replace(base, model=model, evaluation=replace(base.evaluation, gamma=1.0))


def _tuned(name: str, objective: Objective) -> RunConfig:
    """From a diffusion model's weights: its path, inner scaling and data."""
    base = _to_the_end(name, objective, replace(EDM_MODEL, preconditioning=EulerPreconditioningConfig()))
    return replace(base, data=edm_digits().data, network=edm_digits().network)


def _tangent() -> Tangent:
    return Tangent(warm_up_images=digits().training.images // 5)
