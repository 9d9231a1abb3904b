"""`fewstep sample RUN`: images from a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fewstep.sampling.generate import SamplingSettings, Spacing
from fewstep.sampling.step_times import SamplerName
from fewstep.utils.errors import ConfigError
from fewstep.utils.text import counted, listed, quoted

if TYPE_CHECKING:
    from fewstep.networks.condition import Prompts
    from fewstep.sampling.pipeline import Pipeline


@dataclass(frozen=True)
class Options:
    """Draw images from a run. The same seed gives the same noise to sample k, whatever the number of images."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of a saved model."""
    out: Path | None = None
    """FILE.png for a grid, FILE.gif for one of videos that move, FILE.npz for arrays, or a folder for single PNGs,
    NUMBER-CLASS.png, in place of those of an earlier draw; when not given samples-SEED.png in RUN, or
    samples-SEED-WEIGHTS.png."""
    count: int = 64
    """Number of images."""
    weights: str = ""
    """Which of the run's weights: the name of an EMA, such as power-0.1, or last, those of the last step; the first EMA
    when not given. A name that the run does not have shows those it has."""
    steps: int = 2
    """Steps; the map sampler makes one network call each."""
    sampler: SamplerName | None = None
    """map: jumps; gamma: CTM's gamma-sampling; euler, heun: the ODE itself. Not given: the one that the run is measured
    by; the map for a saved model."""
    spacing: Spacing = "auto"
    """auto: the times that `fewstep tune-steps` found for this model, sampler, guidance and number of steps; without
    any, as for these two: uniform on the path's clock, or on the EDM path edm, EDM's noise levels (rho = 7)."""
    gamma: float | None = None
    """For the gamma sampler: 0 is deterministic, 1 re-noises fully. Not given: the run's own, or 0.5."""
    times: tuple[float, ...] = ()
    """The times to walk through in the path's clock, falling; overrides steps and spacing."""
    label: tuple[str, ...] = ()
    """Class of each image by its name, or its number where no class is called so; repeated as needed, -1 for none. All
    classes in turn when not given."""
    prompt: tuple[str, ...] = ()
    """What images are of, in words, for a model of text; repeated as needed, in turn. Some of the data's own captions
    when not given."""
    prompts: Path | None = None
    """Embedded prompts in place of words: FILE.safetensors with text (n, L, D), text_mask, pooled, null_text and so on,
    as prompts.safetensors beside a model's weights."""
    text_encoders: Path | None = None
    """Where the pipeline whose text encoders embed prompts lies now; where it lay when the data were encoded when not
    given."""
    guidance_scale: float | None = None
    """Guidance strength: a model trained with drawn guidance takes it as an input, any other pays a second call. Not
    given: the one that the run is measured by; for a saved model the one that all its tuned times are for, else 1."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Where guidance acts, as fractions of the path's range."""
    seed: int = 0
    """Decides the noise that samples start from."""
    columns: int = 8
    """Images per row of a grid."""
    batch_size: int = 512
    """Images drawn at once."""
    latents: bool = False
    """Leave latents as they are: FILE.npz then holds `latents` in the autoencoder's own units instead of images."""
    autoencoder: Path | None = None
    """Where the autoencoder that decodes latents lies now; where it lay when they were encoded when not given."""
    cpu: bool = False
    """Stay on the CPU even where a GPU is present."""


def run(options: Options) -> None:
    """Draw samples into a file or a folder; raises ConfigError for options that do not go together."""
    import torch

    from fewstep.evaluation.evaluate import own_settings
    from fewstep.sampling.decode import save_latents
    from fewstep.training import load
    from fewstep.utils.device import best_device

    out = output_file(options)
    pipeline = load(options.run, options.weights)
    if pipeline.config.policy is not None:
        command = f"fewstep evaluate {quoted(options.run)}"
        raise ConfigError(f"{options.run} holds a policy, which draws no images: {command}")
    pipeline = pipeline.to(best_device())
    view = None if options.latents else pipeline.viewer(options.autoencoder)
    settings = sampling_settings(options, own_settings(options.run, pipeline, options.steps))
    names, own = pipeline.config.class_names, options.label
    words, prompts = asked_prompts(options, pipeline)
    drawn = pipeline.generate(options.count, settings, own or None, prompts=prompts)
    drawn.check_finite()
    if view is None:
        save_latents(pipeline.config.latents, drawn.samples, drawn.labels, out)
    elif words and drawn.labels is None and not out.suffix:  # files are named by what they are of
        view.write(drawn.samples, torch.arange(options.count) % len(words), out, options.columns, words)
    else:
        view.write(drawn.samples, drawn.labels, out, options.columns, names)
    guided = "" if settings.guidance_scale == 1 else f", guidance {settings.guidance_scale:g}"
    calls = f"{counted(drawn.nfe, 'network call')} each"
    print(f"{out}: {counted(options.count, 'sample')}, {calls}{guided}, {drawn.seconds:.2f} s")
    if stray := pipeline.strays(drawn.samples):
        print(f"The model has diverged, or learned nothing yet: {stray}")
    if words and not options.prompt:
        print(f"Captions of the data in turn: {listed(words)}; --prompt WORDS draws another")
    if names and not own:
        print(f"Classes in turn: {listed(names)}; --label NAME draws one")
    tuned = settings.tuned(pipeline.step_times)
    if tuned is not None:
        print(f"Times tuned for {tuned.steps} steps: {' '.join(f'{t:.4g}' for t in tuned.times)}")


def asked_prompts(options: Options, pipeline: "Pipeline") -> tuple[tuple[str, ...], "Prompts | None"]:
    """What images are of, in words as far as they are known, and embedded where it is not what the model keeps."""
    if options.prompt and options.prompts is not None:
        raise ConfigError("--prompt has words and --prompts embedded ones: give one of them")
    if options.prompts is not None:
        from fewstep.data.latents.prompts import read_prompts

        return (), read_prompts(options.prompts)
    if options.prompt:
        return options.prompt, pipeline.encode_prompts(options.prompt, options.text_encoders)
    return pipeline.config.captions, None


def output_file(options: Options) -> Path:
    """Where samples go."""
    named = f"samples-{options.seed}" + (f"-{options.weights}" if options.weights else "")
    out = options.out or options.run / f"{named}{'.npz' if options.latents else '.png'}"
    if out.suffix not in ("", ".png", ".gif", ".npz"):
        raise ConfigError(f"{out}: give FILE.png, FILE.gif, FILE.npz or a folder")
    if options.latents and out.suffix != ".npz":
        raise ConfigError(f"{out}: latents are written to FILE.npz")
    return out


def sampling_settings(options: Options, own: SamplingSettings) -> SamplingSettings:
    """The run's own settings, with what the options give in their place."""
    if options.gamma is not None and (options.sampler or own.sampler) != "gamma":
        raise ConfigError(f"--gamma {options.gamma:g} is for the gamma sampler: add --sampler gamma, or leave it out")
    scale = own.guidance_scale if options.guidance_scale is None else options.guidance_scale
    if scale == 1.0 and options.interval != (0.0, 1.0):
        raise ConfigError(
            "--interval bounds where guidance acts, and there is none: add --guidance-scale, or leave it out"
        )
    return SamplingSettings(
        sampler=options.sampler or own.sampler,
        steps=options.steps,
        times=options.times,
        spacing=options.spacing,
        gamma=own.gamma if options.gamma is None else options.gamma,
        guidance_scale=scale,
        interval=options.interval,
        seed=options.seed,
        batch_size=options.batch_size,
        clip=False,
    )
