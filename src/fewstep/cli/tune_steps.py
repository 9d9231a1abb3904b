"""`fewstep tune-steps RUN`: better places for its steps."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fewstep.utils.cache import cache_folder
from fewstep.utils.errors import CheckpointError


@dataclass(frozen=True)
class Options:
    """Search the times at which a run's sampler takes few steps; `fewstep sample` uses them from then on.

    One half of the held-out data chooses them by the Frechet distance, the other half says what they gain: they are
    kept only if they win there by more than the gain's standard error. RUN/step_times.json has the figures.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run."""
    steps: tuple[int, ...] = (2, 4)
    """Step counts of the run's own sampler, each tuned apart."""
    samples: int | None = None
    """Samples drawn for every placement tried; as many as the recipe measures with when not given."""
    evaluations: int = 80
    """Placements tried at most for each step count."""
    guidance_scale: float | None = None
    """Guidance strength to tune for; the recipe's own when not given."""
    classes: Literal["data", "uniform"] | None = None
    """Classes of the samples, as for `fewstep evaluate`."""
    seed: int = 2000
    """Of the noise that the search draws from; the check draws from that of the next seed, evaluation from neither."""
    data_root: Annotated[Path | None, tyro.conf.arg(name="data.root")] = None
    """Where the run's data lie now; where they lay in training when not given."""
    inception: Path | None = None
    """Weights of the Inception network (extra [eval]), as for `fewstep evaluate`."""
    autoencoder: Path | None = None
    """Where the autoencoder of latents lies now, as for `fewstep evaluate`."""
    cpu: bool = False
    """Stay on the CPU even where a GPU is present."""


def run(options: Options) -> None:
    """Run the command; raises what it calls raises."""
    from fewstep.evaluation.align import with_labels
    from fewstep.evaluation.evaluate import build_evaluator, check_counts
    from fewstep.evaluation.figures import caveats
    from fewstep.evaluation.tune_steps import LEAST, TuningPlan, format_table, tune_run
    from fewstep.sampling.step_times import TIMES_FILE
    from fewstep.training import RunFolder

    run = RunFolder(options.run)
    config = run.config()
    run.last_checkpoint()
    given: dict[str, Any] = {"guidance_scale": options.guidance_scale, "classes": options.classes}
    own = dataclasses.replace(config.evaluation, **{name: value for name, value in given.items() if value is not None})
    samples = own.samples if options.samples is None else options.samples
    plan = TuningPlan(options.steps, options.evaluations, samples, options.seed)
    plan.check_noise(own.seed)
    dataset = with_labels(*run.load_data(options.data_root))
    if dataset.policy is None:
        check_counts(dataset, LEAST, "tuning")
    evaluator = build_evaluator(dataset, cache_folder(), options.inception, options.autoencoder)
    found, unstored = tune_run(run, dataclasses.replace(config, evaluation=own), evaluator, plan)
    print("\n".join([format_table(found), *caveats(samples, dataset, evaluator)]))
    if unstored is not None:
        advice = "tune a copy of the run, or give these times to fewstep sample by --times"
        raise CheckpointError(f"{run.root / TIMES_FILE} cannot be written: {advice}") from unstored
    print(f"Stored: {run.root / TIMES_FILE}")
