"""What is measured of a run: how it is sampled, and how good its samples are."""

import statistics
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.data.base import Dataset
from fewstep.data.draws import even_draw
from fewstep.data.latents.autoencoders import load_decoder
from fewstep.evaluation.figures import Row
from fewstep.evaluation.metrics.features import (
    DecodedExtractor,
    Extractor,
    InceptionExtractor,
    RandomConvExtractor,
    default_extractor,
)
from fewstep.evaluation.metrics.measure import Asked, Evaluator
from fewstep.evaluation.progress import measuring
from fewstep.recipes.config import EvaluationConfig, RunConfig
from fewstep.sampling.generate import Generated, SamplingSettings, Spacing, generate
from fewstep.sampling.pipeline import Pipeline
from fewstep.sampling.step_times import SamplerName
from fewstep.training.run_folder import RunFolder
from fewstep.utils.device import best_device
from fewstep.utils.errors import ConfigError, DataError, FewstepWarning, TrainingDivergedError
from fewstep.utils.parts import kind_name
from fewstep.utils.text import counted, printable

_FEWEST = 4  # samples that a distance and its error can be measured of


def sampler_settings(config: RunConfig, steps: tuple[int, ...]) -> list[SamplingSettings]:
    """The run's own sampler at these step counts: the map; for a model of the diagonal alone Euler's method, or on the
    EDM path Heun's.
    """
    evaluation, on_edm = config.evaluation, config.model.noise_clock
    diagonal: SamplerName = "heun" if on_edm else "euler"
    jumping: SamplerName = "gamma" if evaluation.gamma else "map"
    sampler = diagonal if config.objective.on_diagonal else jumping
    base = SamplingSettings(
        sampler=sampler,
        gamma=evaluation.gamma,
        spacing=spacing(config),
        guidance_scale=evaluation.guidance_scale,
        seed=evaluation.seed,
        clip=False,  # what lies outside tells a model that has diverged
    )
    return [replace(base, steps=count) for count in steps]


def own_settings(folder: Path, pipeline: Pipeline, steps: int) -> SamplingSettings:
    """The sampler, gamma and guidance that a run is measured by; gamma is 0.5 where that has none.

    A saved model does not say how it was trained: the sampler that its times for so many steps were tuned for, else the
    map; the guidance that all its tuned times are for, else none.
    """
    run = RunFolder(folder)
    if run.config_file.is_file() and run.checkpoints():
        own = sampler_settings(run.config(), (1,))[0]
        scale = own.guidance_scale if pipeline.flow_map.conditional else 1.0
        return SamplingSettings(sampler=own.sampler, gamma=own.gamma or 0.5, guidance_scale=scale, clip=False)
    scales = {each.guidance_scale for each in pipeline.step_times}
    scale = scales.pop() if len(scales) == 1 else 1.0
    tuned = next((each for each in pipeline.step_times if each.steps == steps), None)
    if pipeline.flow_map.preconditioning.data_end_only:  # which has no other jumps
        return SamplingSettings(sampler="gamma", gamma=1.0, guidance_scale=scale, clip=False)
    sampler: SamplerName = "map" if tuned is None else tuned.sampler
    gamma = 0.5 if tuned is None else tuned.gamma or 0.5
    return SamplingSettings(sampler=sampler, gamma=gamma, guidance_scale=scale, clip=False)


def spacing(config: RunConfig) -> Spacing:
    """How the run's step times are spaced: as EDM's on its path."""
    return "edm" if config.model.noise_clock else "uniform"


def method_of(run: RunFolder) -> str:
    """The run's objective as figures name it; raises CheckpointError where the run does not say what its data are."""
    return method_name(run.config(), run.data("classes"))


def method_name(config: RunConfig, data: Mapping[str, Any]) -> str:
    """The objective as figures name it; data: as the run keeps it, without classes and prompts nothing is guided."""
    conditional = data["classes"] > 0 or "prompts" in data
    return config.objective.method(kind_name(type(config.model.preconditioning)), conditional)


def build_evaluator(
    dataset: Dataset, cache: Path | None, inception: Path | None = None, autoencoder: Path | None = None
) -> Evaluator:
    """The data set's own classifier (trained on its training part, kept in `cache`), or Inception when given.

    Latents are measured as images, decoded by their autoencoder, which may have been moved; no classifier is trained
    on those: without Inception their features are random convolutions. Raises DataError where too few are held out.
    """
    check_counts(dataset)
    if dataset.policy is not None:
        raise ConfigError(
            f"{dataset.name} is a robot's actions, which no features measure: fewstep evaluate has its errors on "
            "held-out ones"
        )
    if dataset.latents is not None:
        decoder = load_decoder(dataset.latents, autoencoder, best_device())
        random = RandomConvExtractor(dataset.latents.image_shape)
        seen = DecodedExtractor(random if inception is None else InceptionExtractor(inception), decoder)
        return Evaluator.of(dataset.heldout, f"{dataset.name} held out, decoded", seen)
    if autoencoder is not None:
        raise ConfigError(f"the samples of {dataset.name} are no latents: leave out --autoencoder")
    extractor = default_extractor(dataset, cache=cache) if inception is None else InceptionExtractor(inception)
    return Evaluator.of(dataset.heldout, f"{dataset.name} held out", extractor)


def too_few(dataset: Dataset, least: int = _FEWEST, purpose: str = "measuring") -> str:
    """Why a data set cannot be measured, such as too few samples, and what to do about it, in a line; else empty.

    Nor are videos measured, however many. least: of the held-out part; of the training part 4. purpose: what needs so
    many, in a word.
    """
    if dataset.of_videos:
        return f"{dataset.name} has videos, and the features that are measured here are those of images"
    held, trained = len(dataset.heldout), len(dataset.train)
    if held >= least and trained >= _FEWEST:
        return ""
    part, count = ("held-out", held) if held < least else ("training", trained)
    needed = least if part == "held-out" else _FEWEST
    line = f"the {part} part of {dataset.name} has {counted(count, 'sample')}: {purpose} needs at least {needed}; "
    whole = held + trained
    if not dataset.split_by:
        return line + "give more samples of it"
    if whole < 2 * max(least, _FEWEST):
        return line + f"of {whole} in all no share serves, give at least {2 * max(least, _FEWEST)}"
    return line + f"{dataset.split_by} 0.5"


def check_counts(dataset: Dataset, least: int = _FEWEST, purpose: str = "measuring") -> None:
    """Raise DataError where the data cannot be measured, as `too_few` says."""
    if line := too_few(dataset, least, purpose):
        raise DataError(line)


def draw_features(
    pipeline: Pipeline, count: int, settings: SamplingSettings, extractor: Extractor, asked: Asked
) -> tuple[Generated, Tensor]:
    """`count` samples of what is asked for (`Evaluator.asked`), and their features (count, d)."""
    drawn = generate(pipeline, count, settings, asked.labels, prompts=asked.prompts)
    return drawn, extractor.features(_within_range(pipeline, drawn.samples))


def measure_real(dataset: Dataset, samples: int, evaluator: Evaluator) -> Row:
    """The training images themselves, drawn over all of them, against the held-out ones: the floor for every method.

    Where the data bring their own split its classes may have other shares: the floor is drawn in the held-out ones.
    """
    like = None if dataset.split_by else dataset.heldout.labels
    rows = even_draw(dataset.train, samples, 0, like)
    if len(rows) < min(_FEWEST, samples):  # too few of a rare class to measure
        rows = even_draw(dataset.train, samples, 0)
    images, labels = dataset.train.fetch(rows)
    method = {"method": "real data (training part)", "nfe": 0}
    times = {"seed": 0, "seconds": 0.0, "sampling_seconds": 0.0, "latency_ms": None}
    return method | evaluator.measure(images, labels) | times | {"guidance_scale": 1.0, "device": str(best_device())}


def measure_run(
    run: RunFolder, evaluator: Evaluator, evaluation: EvaluationConfig | None = None, weights: str = ""
) -> list[Row]:
    """One row for every step count of the recipe, and for the ODE reference of a map; `evaluation` replaces its own.

    weights: as of `RunFolder.pipeline`; named in the method of each row unless they are the first EMA's.

    Tuned step times have rows of their own beside the default's, whose `tuned_on` says which held-out samples chose
    them: they are among those measured against, so that the default's rows alone have seen none.
    """
    config, (pipeline, state) = run.config(), newest(run, weights)
    settings = config.evaluation if evaluation is None else evaluation
    config = replace(config, evaluation=settings)
    name = method_of(run) + ("" if settings.guidance_scale == 1 else f", guidance {settings.guidance_scale:g}")
    name += f", {weights}" if weights not in ("", next(iter(run.averages()))) else ""
    name += ", uniform classes" if settings.classes == "uniform" and pipeline.flow_map.num_classes else ""
    plans = [(name, each) for each in sampler_settings(config, settings.steps)]
    plans += [(f"{name}, tuned times", tuned) for _, each in plans if (tuned := tuned_settings(pipeline, each))]
    if not (config.objective.on_diagonal or config.objective.endpoint_only):
        plans.append((f"{name}, its ODE by Heun", reference_settings(config)))
    asked = evaluator.asked(pipeline.flow_map, settings.samples, settings)
    rows, broken = [], []
    with measuring(pipeline.flow_map.network, plans, settings.samples) as bar:
        for label, each in plans:
            bar.set_description_str(printable(label))
            drawn = generate(pipeline, settings.samples, each, asked.labels, prompts=asked.prompts)
            if bool(drawn.samples.isfinite().all()):
                rows.append(state | _measured(pipeline, label, each, drawn, evaluator))
                continue
            calls = counted(drawn.nfe, "network call")
            broken.append(f"{label}, {calls}, is not measured: {pipeline.strays(drawn.samples)}")
    if not rows:
        drawn.check_finite()
    for line in broken:
        warnings.warn(line, FewstepWarning, stacklevel=2)
    return rows


def check_learned(run: RunFolder, weights: str = "", samples: int = 16) -> None:
    """Raise TrainingDivergedError where the newest model's samples are what no trained model gives."""
    pipeline, config = (run.pipeline(weights) if weights else run.model()).to(best_device()), run.config()
    (settings,) = sampler_settings(config, config.evaluation.steps[:1])
    if wrong := pipeline.strays(generate(pipeline, samples, settings).samples, than_noise=True):
        raise TrainingDivergedError(
            f"{run.root}: {wrong}, in {counted(settings.steps, 'step')}: the training has diverged, or learned nothing "
            "yet; lower the learning rate and train anew with another --out, or train this run longer"
        )


def ending(run: RunFolder) -> str:
    """What to know of the figures of a run whose training diverged, in a line; empty for any other."""
    if not (reason := run.divergence):
        return ""
    return f"The training diverged ({reason}): the figures are of its checkpoint of step {run.state()['step']}."


def newest(run: RunFolder, weights: str = "") -> tuple[Pipeline, dict[str, Any]]:
    """The newest checkpoint's model, and its step and seconds of training, while others may be written."""
    while True:
        last = run.last_checkpoint()
        pipeline, state = run.pipeline(weights), run.state()
        if run.last_checkpoint() == last:
            return pipeline.to(best_device()), {"step": state["step"], "seconds": state["seconds"]}


def _measured(
    pipeline: Pipeline, method: str, settings: SamplingSettings, drawn: Generated, evaluator: Evaluator
) -> Row:
    """Figures of samples, the time to draw all of them and one alone, and on what their times were tuned."""
    tuned = settings.tuned(pipeline.step_times)
    return {
        "method": method,
        "nfe": round(drawn.nfe),
        **evaluator.measure(_within_range(pipeline, drawn.samples), drawn.labels),
        "seed": settings.seed,
        "sampling_seconds": drawn.seconds,
        "latency_ms": measure_latency(pipeline, settings),
        "guidance_scale": settings.guidance_scale,
        "device": str(best_device()),
        "tuned_on": tuned and tuned.source,
        "strays": pipeline.strays(drawn.samples),
    }


def tuned_settings(pipeline: Pipeline, settings: SamplingSettings) -> SamplingSettings | None:
    """The same at the step times tuned for the model; None where it has none for them."""
    free = replace(settings, spacing="auto")
    return free if free.tuned(pipeline.step_times) else None


def reference_settings(config: RunConfig) -> SamplingSettings:
    """Heun's method at about `reference_steps` evaluations."""
    (own,) = sampler_settings(config, (max(1, (config.evaluation.reference_steps + 1) // 2),))
    return replace(own, sampler="heun", gamma=0.0)


def _within_range(pipeline: Pipeline, images: Tensor) -> Tensor:
    """Samples cut to the range of the data, where they have one."""
    bounds = pipeline.config.data_range
    return images if bounds is None else images.clamp(*bounds)


def measure_latency(pipeline: Pipeline, settings: SamplingSettings, repeats: int = 5) -> float:
    """Median milliseconds to draw one sample alone, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        generate(pipeline, 1, settings)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def training_seconds(run: RunFolder) -> float:
    """Seconds of training behind the newest checkpoint."""
    return float(run.state()["seconds"])
