"""`fewstep tune-steps RUN`: better places for its steps."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fewstep.cli.cache import cache_folder


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
    seed: int = 2000
    """Of the noise that the search draws from; the check draws from that of the next seed, evaluation from neither."""
    data_root: Annotated[Path | None, tyro.conf.arg(name="data.root")] = None
    """Where the run's data lie now; where they lay in training when not given."""
    inception: Path | None = None
    """Weights of the Inception network (extra [eval]), as for `fewstep evaluate`."""
    autoencoder: Path | None = None
    """Where the autoencoder of latents lies now, as for `fewstep evaluate`."""


def run(options: Options) -> None:
    """Run the command; raises what it calls raises."""
    from fewstep.evaluation.align import with_labels
    from fewstep.evaluation.evaluate import build_evaluator
    from fewstep.evaluation.tune_steps import TuningPlan, format_table, tune_run
    from fewstep.sampling.step_times import TIMES_FILE
    from fewstep.training import RunFolder

    run = RunFolder(options.run)
    config = run.config()
    run.last_checkpoint()
    own = config.evaluation
    scale = own.guidance_scale if options.guidance_scale is None else options.guidance_scale
    samples = own.samples if options.samples is None else options.samples
    plan = TuningPlan(options.steps, options.evaluations, samples, options.seed)
    plan.check_noise(own.seed)
    dataset = with_labels(*run.load_data(options.data_root))
    evaluator = build_evaluator(dataset, cache_folder(), options.inception, options.autoencoder)
    config = dataclasses.replace(config, evaluation=dataclasses.replace(own, guidance_scale=scale))
    print(format_table(tune_run(run, config, evaluator, plan)))
    print(f"Stored: {run.root / TIMES_FILE}")
