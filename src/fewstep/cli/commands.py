"""The commands: each parses its options and calls the library."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fewstep.cli.options import (
    CompareOptions,
    DemosOptions,
    EncodeOptions,
    EvaluateOptions,
    ObjectivesOptions,
    PolicyQuickstartOptions,
    QuickstartOptions,
    ReportOptions,
    RolloutOptions,
    SampleOptions,
    StatisticsOptions,
    TrainOptions,
    TuneStepsOptions,
)
from fewstep.cli.parsing import parse
from fewstep.recipes import AT_SCALE, RECIPES, recipe
from fewstep.utils.errors import ConfigError


def cache_folder() -> Path:
    """Where trained feature extractors are kept: $FEWSTEP_CACHE, else fewstep in the user's cache folder."""
    if "FEWSTEP_CACHE" in os.environ:
        return Path(os.environ["FEWSTEP_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fewstep"


def quickstart_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep quickstart`."""
    from fewstep.cli.quickstart import quickstart

    options = parse(QuickstartOptions, args, "quickstart")
    print(f"Report: {quickstart(options.out, cache_folder(), options.runtime, options.seconds)}")


def policy_quickstart_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep policy-quickstart`."""
    from fewstep.cli.quickstart import policy_quickstart

    options = parse(PolicyQuickstartOptions, args, "policy-quickstart")
    print(f"Report: {policy_quickstart(options.out, options.runtime, options.seconds)}")


def train_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep train RECIPE`."""
    from fewstep.data import load_dataset
    from fewstep.evaluation.align import perception
    from fewstep.evaluation.evaluate import curve_watcher
    from fewstep.evaluation.report.run import watcher
    from fewstep.training import Callbacks, RunFolder, train

    if not args or args[0].startswith("-"):
        if args and args[0] in ("-h", "--help"):
            print(f"usage: fewstep train RECIPE [options]\n\nRecipes: {', '.join(RECIPES)}\n")
            print("A recipe of your own is a function in FILE.py or FILE.py:FUNCTION; any run's is RUN/config.json.")
            print("fewstep train RECIPE --help shows every option and the recipe's own values.")
            return
        raise ConfigError(f"train needs a recipe first: fewstep train RECIPE; recipes: {', '.join(RECIPES)}")
    started = recipe(args[0])
    default = TrainOptions(run=started)
    options = parse(TrainOptions, args[1:], f"train {args[0]}", default)
    config = options.run
    if config.recipe != started.recipe:
        raise ConfigError(f"the recipe is {started.recipe!r}; leave out --recipe {config.recipe}")
    if options.out is None and args[0] != config.recipe and (args[0].endswith(".json") or config.recipe in RECIPES):
        raise ConfigError(
            f"{args[0]} has the name {config.recipe}, which another run may have: give a folder with --out"
        )
    run = RunFolder(options.out or Path("runs") / config.recipe)
    dataset, cache = load_dataset(config.data), cache_folder()
    features = perception(config, dataset, cache)
    pictures = None if dataset.policy is not None else watcher(run, config)
    callbacks = Callbacks(pictures, curve_watcher(run, config, dataset, cache), features)
    result = train(config, dataset, run, options.runtime, callbacks)
    if not result.main_process:
        return
    print(f"{run.root}: {result.images:,} images in {result.step:,} steps, {result.seconds:.0f} s")
    following = ("rollout", "report") if dataset.policy is not None else ("sample", "evaluate", "report")
    print("Next: " + "   ".join(f"fewstep {command} {run.root}" for command in following))


def encode_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep encode FOLDER`."""
    from fewstep.data.latents.encode import EncodingWork, encode_folder, summary
    from fewstep.data.latents.shards import EncodingSettings

    options = parse(EncodeOptions, args, "encode")
    settings = EncodingSettings(
        image_size=options.image_size,
        flip=options.flip,
        posterior=options.posterior,
        dtype=options.dtype,
        shard_size=options.shard_size,
        heldout=options.heldout,
        seed=options.seed,
    )
    work = EncodingWork(options.batch_size, options.skip_unreadable, options.cpu, options.quiet)
    manifest = encode_folder(options.folder, options.autoencoder, options.out, settings, options.std, work)
    print(f"{options.out}: {summary(manifest)}")
    print(f"Next: fewstep train RECIPE --data.source latents --data.root {options.out}")


def sample_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep sample RUN`."""
    import torch

    from fewstep.evaluation.evaluate import own_settings
    from fewstep.sampling.decode import save_latents
    from fewstep.sampling.generate import SamplingSettings
    from fewstep.training import load

    options = parse(SampleOptions, args, "sample")
    named = f"samples-{options.seed}" + (f"-{options.weights}" if options.weights else "")
    out = options.out or options.run / f"{named}{'.npz' if options.latents else '.png'}"
    if out.suffix not in ("", ".png", ".npz"):
        raise ConfigError(f"{out}: give FILE.png, FILE.npz or a folder")
    if options.latents and out.suffix != ".npz":
        raise ConfigError(f"{out}: latents are written to FILE.npz")
    pipeline = load(options.run, options.weights)
    if pipeline.config.policy is not None:
        raise ConfigError(f"{options.run} holds a policy, which draws no images: fewstep rollout {options.run}")
    if torch.cuda.is_available() and not options.cpu:
        pipeline = pipeline.to("cuda")
    view = None if options.latents else pipeline.viewer(options.autoencoder)
    own = own_settings(options.run, pipeline, options.steps)
    if options.gamma is not None and (options.sampler or own.sampler) != "gamma":
        raise ConfigError(f"--gamma {options.gamma:g} is for the gamma sampler: add --sampler gamma, or leave it out")
    omega = own.omega if options.omega is None else options.omega
    if omega == 1.0 and options.interval != (0.0, 1.0):
        raise ConfigError("--interval bounds where guidance acts, and there is none: add --omega, or leave it out")
    settings = SamplingSettings(
        sampler=options.sampler or own.sampler,
        steps=options.steps,
        times=options.times,
        spacing=options.spacing,
        gamma=own.gamma if options.gamma is None else options.gamma,
        omega=omega,
        interval=options.interval,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    labels = None
    if options.label:
        labels = [options.label[k % len(options.label)] for k in range(options.count)]
    drawn = pipeline.generate(options.count, settings, labels)
    drawn.check_finite()
    if view is None:
        save_latents(pipeline.config.latents, drawn.samples, drawn.labels, out)
    else:
        view.write(drawn.samples, drawn.labels, out, options.columns)
    guided = "" if settings.omega == 1 else f", guidance {settings.omega:g}"
    print(f"{out}: {options.count} samples, {drawn.nfe:g} network calls each{guided}, {drawn.seconds:.2f} s")
    tuned = settings.tuned(pipeline.step_times)
    if tuned is not None:
        print(f"Times tuned for {tuned.steps} steps: {' '.join(f'{t:.4g}' for t in tuned.times)}")


def evaluate_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep evaluate RUN`."""
    from fewstep.data import load_dataset
    from fewstep.evaluation.align import align, teacher_of, with_labels
    from fewstep.evaluation.evaluate import measure_real, measure_run, method_of, table, write_figures, yardstick
    from fewstep.training import RunFolder

    options = parse(EvaluateOptions, args, "evaluate")
    run = RunFolder(options.run)
    config = run.config()
    run.last_checkpoint()
    own = config.evaluation
    evaluation = dataclasses.replace(
        own,
        samples=own.samples if options.samples is None else options.samples,
        steps=options.steps or own.steps,
        omega=own.omega if options.omega is None else options.omega,
        seed=own.seed if options.seed is None else options.seed,
    )
    dataset = load_dataset(config.data)
    if options.teacher is not None:
        if not config.teacher:
            raise ConfigError(f"{options.run} has no teacher: leave out --teacher")
        teacher_of(run, options.teacher)
    stick = yardstick(with_labels(config.data, dataset), cache_folder(), options.inception, options.autoencoder)
    rows = [*measure_run(run, stick, evaluation, options.weights), measure_real(dataset, evaluation.samples, stick)]
    print(table(rows))
    print(f"Stored: {write_figures(rows, run.root)}")
    first = options.weights in ("", next(iter(run.averages())))
    if config.teacher and not config.objective.on_diagonal and first:
        print(align(run, dataset, method_of(run), options.teacher))


def tune_steps_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep tune-steps RUN`."""
    from fewstep.data import load_dataset
    from fewstep.evaluation.align import with_labels
    from fewstep.evaluation.evaluate import yardstick
    from fewstep.evaluation.tune_steps import TuningPlan, table, tune_run
    from fewstep.sampling.step_times import TIMES_FILE
    from fewstep.training import RunFolder

    options = parse(TuneStepsOptions, args, "tune-steps")
    run = RunFolder(options.run)
    config = run.config()
    run.last_checkpoint()
    own = config.evaluation
    evaluation = dataclasses.replace(own, omega=own.omega if options.omega is None else options.omega)
    samples = own.samples if options.samples is None else options.samples
    plan = TuningPlan(options.steps, options.evaluations, samples, options.seed)
    plan.check_noise(own.seed)
    dataset = with_labels(config.data, load_dataset(config.data))
    stick = yardstick(dataset, cache_folder(), options.inception, options.autoencoder)
    print(table(tune_run(run, dataclasses.replace(config, evaluation=evaluation), stick, plan)))
    print(f"Stored: {run.root / TIMES_FILE}")


def report_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep report RUN`."""
    from fewstep.evaluation.report.run import report
    from fewstep.training import RunFolder

    options = parse(ReportOptions, args, "report")
    print(f"Report: {report(RunFolder(options.run), autoencoder=options.autoencoder)}")


def demos_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep demos TASK`."""
    from fewstep.evaluation.rollouts import import_demonstrations, record_demonstrations, shown_on_terminal
    from fewstep.policies.tasks.registry import TASKS

    options = parse(DemosOptions, args, "demos")
    minari, robomimic = options.from_minari, options.from_robomimic
    if minari is not None or robomimic is not None:
        if options.count is not None or options.first_seed is not None:
            raise ConfigError("--count and --first-seed are for recording, not for importing: leave them out")
        print(import_demonstrations(options.task, minari, robomimic, options.keys, options.split, options.out))
        return
    if options.keys or options.split:
        raise ConfigError("--keys and --split choose from an imported file: add --from-minari or --from-robomimic")
    if not options.task:
        raise ConfigError(f"demos needs a task: fewstep demos TASK; tasks: {', '.join(TASKS)}")
    progress = None if options.quiet or not sys.stderr.isatty() else shown_on_terminal
    count = 100 if options.count is None else options.count
    told = record_demonstrations(options.task, count, options.out, options.first_seed or 0, progress)
    print(f"\n{told}" if progress else told)


def rollout_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep rollout RUN`."""
    import torch

    from fewstep.evaluation.rollouts import (
        choose_drawing,
        draw_film,
        expert_row,
        measure_rollouts,
        rollout_table,
        shown_on_terminal,
        write_rollouts,
    )

    options = parse(RolloutOptions, args, "rollout")
    if options.threads < 1:
        raise ConfigError(f"{options.threads} threads asked for: give at least 1")
    torch.set_num_threads(options.threads)
    if options.film:
        choose_drawing()
    starts = options.episodes, options.seed, options.first_seed, options.at_once
    progress = None if options.quiet or not sys.stderr.isatty() else shown_on_terminal
    rows, task, policy = measure_rollouts(options.run, options.steps, options.task, *starts, progress)
    if options.expert:
        rows.append(expert_row(task, options.episodes, options.first_seed))
    print(f"\n{rollout_table(rows)}" if progress else rollout_table(rows))
    print(f"Stored: {write_rollouts(rows, options.run)}")
    if options.film:
        print(f"Film: {draw_film(policy, task, options.first_seed, options.run)}")


def statistics_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep statistics RUN`."""
    from fewstep.evaluation.align import survey
    from fewstep.training import RunFolder

    options = parse(StatisticsOptions, args, "statistics")
    names = ("points", "samples", "probes", "seed")
    given: dict[str, int | bool] = {name: value for name in names if (value := getattr(options, name)) is not None}
    given |= {"centred": options.centred, "shrink": options.shrink}
    if told := survey(RunFolder(options.run), given, options.student, cache_folder(), options.cpu):
        print(told)


def compare_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep compare RUN RUN ...`."""
    from fewstep.evaluation.compare import PAGE_FILE, compare

    options = parse(CompareOptions, args, "compare")
    print(compare(options.runs, options.out))
    print(f"Comparison: {options.out / PAGE_FILE}")


def recipes_command(args: Sequence[str]) -> None:
    """Print every recipe with its docstring, and the computed cost of those at scale."""
    from fewstep.recipes.cost import cost_lines, training_cost

    if args:
        raise ConfigError(f"recipes takes no options, got {' '.join(args)}")
    for name, build in RECIPES.items():
        lines = [line.strip() for line in (build.__doc__ or "").strip().splitlines()]
        if name in AT_SCALE:
            lines += cost_lines(training_cost(build(), AT_SCALE[name].shape, AT_SCALE[name].classes))
        print(f"{name}\n    " + "\n    ".join(line for line in lines if line) + "\n")


def objectives_command(args: Sequence[str]) -> None:
    """Print the catalogue of objectives."""
    from fewstep.cli.objective_table import table_markdown, table_text
    from fewstep.objectives import TABLE

    options = parse(ObjectivesOptions, args, "objectives")
    print(table_markdown(TABLE) if options.markdown else table_text(TABLE))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "quickstart": quickstart_command,
    "train": train_command,
    "sample": sample_command,
    "tune-steps": tune_steps_command,
    "evaluate": evaluate_command,
    "report": report_command,
    "encode": encode_command,
    "statistics": statistics_command,
    "policy-quickstart": policy_quickstart_command,
    "demos": demos_command,
    "rollout": rollout_command,
    "compare": compare_command,
    "recipes": recipes_command,
    "objectives": objectives_command,
}
