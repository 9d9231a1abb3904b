"""`fewstep evaluate RUN`: figures of its samples."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.utils.cache import cache_folder
from fewstep.utils.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """Measure a run's samples against held-out data: Frechet and kernel distance, precision, recall, accuracy.

    Of a policy, its actions against those of held-out episodes, and with --task its success. Where the training
    diverged, the figures are of the last checkpoint that it saved, which is said; if that model too makes what no
    trained one does, its figures are kept and the exit code is 2.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run."""
    samples: int | None = None
    """Generated samples per measurement; like the options below, the recipe's own when not given."""
    steps: tuple[int, ...] = ()
    """Step counts of the run's own sampler."""
    weights: str = ""
    """Which of the run's weights: the name of an EMA, such as power-0.1, or last, those of the last step; the first EMA
    when not given. A name that the run does not have shows those it has."""
    guidance_scale: float | None = None
    """Guidance strength when sampling: choose it by the Frechet distance."""
    seed: int | None = None
    """Decides the noise that samples start from."""
    data_root: Annotated[Path | None, tyro.conf.arg(name="data.root")] = None
    """Where the run's data lie now; where they lay in training when not given."""
    classes: Literal["data", "uniform"] | None = None
    """Classes of the samples: data gives them the shares that they have in the held-out data, uniform equal ones."""
    inception: Path | None = None
    """Weights of the Inception network (extra [eval]); without them the data set's own classifier is trained once."""
    teacher: Path | None = None
    """Where the teacher of a distilled run lies now; where it lay in training when not given."""
    autoencoder: Path | None = None
    """Where the autoencoder that decodes latents lies now; where it lay when they were encoded when not given."""
    task: str = ""
    """Of a policy: also let it act, in this task, a name or FILE.py:NAME, a fewstep.Task of your own."""
    episodes: int = 50
    """Of --task: number of episodes."""
    out: Path | None = None
    """Folder for figures.json, actions.json and alignment.json, for a run that cannot be written to: `fewstep report`
    with the same --out shows them. RUN when not given."""
    cpu: bool = False
    """Stay on the CPU even where a GPU is present."""


def run(options: Options) -> None:
    """Run the command; raises what it calls raises."""
    from fewstep.evaluation.actions import actions_table, check_actions, measure_actions, write_actions
    from fewstep.evaluation.align import align, teacher_of_run, with_labels
    from fewstep.evaluation.evaluate import (
        build_evaluator,
        check_learned,
        ending,
        measure_real,
        measure_run,
        method_of,
        too_few,
    )
    from fewstep.evaluation.figures import format_table, write_figures
    from fewstep.evaluation.rollouts import measure_rollouts
    from fewstep.policies.figures import rollout_table, write_rollouts
    from fewstep.training import RunFolder

    run, folder = RunFolder(options.run), options.out or options.run
    config = run.config()
    run.last_checkpoint()
    given = {name: getattr(options, name) for name in ("samples", "steps", "guidance_scale", "seed", "classes")}
    given = {name: value for name, value in given.items() if value not in (None, ())}
    evaluation = dataclasses.replace(config.evaluation, **given)
    if options.task and not config.data.source.of_actions:
        raise ConfigError(f"{options.run} is no policy, which acts in a task: leave out --task")
    if options.task and options.weights:
        raise ConfigError("--task lets the first average act: leave out --weights, or --task")
    data, dataset = run.load_data(options.data_root)
    if options.teacher is not None:
        if not config.teacher:
            raise ConfigError(f"{options.run} has no teacher: leave out --teacher")
        teacher_of_run(run, options.teacher)
    if dataset.policy is not None:
        errors = measure_actions(run, dataset, evaluation, options.weights)
        print("\n".join(filter(None, [actions_table(errors), ending(run)])))
        print(f"Stored: {write_actions(errors, folder)}")
        check_actions(run, errors)
        if options.task:
            starts = options.episodes, options.seed or 0, FIRST_TEST_SEED, 25  # as fewstep rollout has them
            acted, _, _ = measure_rollouts(options.run, evaluation.steps, options.task, *starts, None)
            print(f"\n{rollout_table(acted)}\nStored: {write_rollouts(acted, folder)}")
        return
    if dataset.of_videos and config.teacher:
        print(f"Not measured: {too_few(dataset)}")
        print(align(run, dataset, method_of(run), folder, options.teacher))
        check_learned(run, options.weights)
        return
    labelled = with_labels(data, dataset)
    evaluator = build_evaluator(labelled, cache_folder(), options.inception, options.autoencoder)
    rows = measure_run(run, evaluator, evaluation, options.weights)
    rows.append(measure_real(dataset, evaluation.samples, evaluator))
    print("\n".join(filter(None, [format_table(rows, labelled, evaluator), ending(run)])))
    print(f"Stored: {write_figures(rows, folder)}")
    first = options.weights in ("", next(iter(run.averages())))
    if config.teacher and not config.objective.on_diagonal and first:
        print(align(run, dataset, method_of(run), folder, options.teacher))
    check_learned(run, options.weights)
