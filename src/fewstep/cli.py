"""The command line: each command parses its options and calls the library."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar, cast

import tyro

from fewstep._version import __version__
from fewstep.config import StatisticsConfig
from fewstep.errors import ConfigError, FewstepError, FewstepWarning
from fewstep.options import (
    CompareOptions,
    DemosOptions,
    EncodeOptions,
    EvaluateOptions,
    ObjectivesOptions,
    QuickstartOptions,
    ReportOptions,
    RolloutOptions,
    SampleOptions,
    StatisticsOptions,
    TrainOptions,
    TuneStepsOptions,
)
from fewstep.recipes import AT_SCALE, RECIPES, recipe

T = TypeVar("T")

OVERVIEW = f"""fewstep {__version__}: generative models that need one to four network calls.

  fewstep quickstart           train on real digits, measure, write a report: minutes on a laptop
  fewstep recipes              what can be trained, the figure to expect, the cost
  fewstep objectives           every training objective: formula, velocity, gradient, evaluations, paper
  fewstep train RECIPE         train it, or go on where it stopped; every option can be set by name
  fewstep sample RUN           draw images from a trained run
  fewstep tune-steps RUN       place its 2 and 4 steps better, by search on held-out data; sample uses them then
  fewstep evaluate RUN         measure its samples against held-out data
  fewstep report RUN           write RUN/report.html, one self-contained page
  fewstep encode FOLDER        turn a folder of images into latents to train on, with an autoencoder of yours
  fewstep statistics RUN       what an analytic preconditioning computes from a teacher: estimated, drawn, its cost
  fewstep demos TASK           record demonstrations of a robot's task, to train a policy on
  fewstep rollout RUN          let a policy act: success, episode length, time per decision
  fewstep compare RUN RUN ...  how many images each method needs to the same quality, with their curves

A RUN is the folder that `train` wrote, or a saved model. Add --help to a command for its options,
for example: fewstep train digits --help
"""


def cache_folder() -> Path:
    """Where trained feature extractors are kept: $FEWSTEP_CACHE, else fewstep in the user's cache folder."""
    if "FEWSTEP_CACHE" in os.environ:
        return Path(os.environ["FEWSTEP_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fewstep"


def quickstart_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep quickstart`."""
    from fewstep.quickstart import quickstart

    options = parse(QuickstartOptions, args, "quickstart")
    print(f"Report: {quickstart(options.out, cache_folder(), options.machine, options.seconds)}")


def train_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep train RECIPE`."""
    from fewstep.data import load_dataset
    from fewstep.measuring import curve_watcher
    from fewstep.runs import watcher
    from fewstep.students import perception
    from fewstep.training import Attendants, RunFolder, train

    if not args or args[0].startswith("-"):
        if args and args[0] in ("-h", "--help"):
            print(f"usage: fewstep train RECIPE [options]\n\nRecipes: {', '.join(RECIPES)}\n")
            print("fewstep train RECIPE --help shows every option and the recipe's own values.")
            return
        raise ConfigError(f"train needs a recipe first: fewstep train RECIPE; recipes: {', '.join(RECIPES)}")
    default = TrainOptions(run=recipe(args[0]))
    options = parse(TrainOptions, args[1:], f"train {args[0]}", default)
    config = options.run
    if config.recipe != args[0]:
        raise ConfigError(f"the recipe is {args[0]!r}; leave out --recipe {config.recipe}")
    run = RunFolder(options.out or Path("runs") / config.recipe)
    dataset, cache = load_dataset(config.data), cache_folder()
    features = perception(config, dataset, cache)
    pictures = None if dataset.control is not None else watcher(run, config)
    attendants = Attendants(pictures, curve_watcher(run, config, dataset, cache), features)
    result = train(config, dataset, run, options.machine, attendants)
    if not result.main_process:
        return
    print(f"{run.root}: {result.images:,} images in {result.step:,} steps, {result.seconds:.0f} s")
    following = ("rollout", "report") if dataset.control is not None else ("sample", "evaluate", "report")
    print("Next: " + "   ".join(f"fewstep {command} {run.root}" for command in following))


def encode_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep encode FOLDER`."""
    from fewstep.data.latents import EncodingSettings
    from fewstep.encoding import EncodingWork, encode_folder, summary

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

    from fewstep.measuring import own_sampler
    from fewstep.sampling import SamplingSettings, generate
    from fewstep.training import load
    from fewstep.viewing import save_latents, viewer

    options = parse(SampleOptions, args, "sample")
    out = options.out or options.run / f"samples-{options.seed}{'.npz' if options.latents else '.png'}"
    if out.suffix not in ("", ".png", ".npz"):
        raise ConfigError(f"{out}: give FILE.png, FILE.npz or a folder")
    if options.latents and out.suffix != ".npz":
        raise ConfigError(f"{out}: latents are written to FILE.npz")
    flow_map = load(options.run)
    if flow_map.control is not None:
        raise ConfigError(f"{options.run} holds a policy, which draws no images: fewstep rollout {options.run}")
    if torch.cuda.is_available() and not options.cpu:
        flow_map = flow_map.cuda()
    view = None if options.latents else viewer(flow_map, options.autoencoder)
    sampler, gamma = own_sampler(options.run, flow_map, options.steps)
    if options.gamma is not None and (options.sampler or sampler) != "gamma":
        raise ConfigError(f"--gamma {options.gamma:g} is for the gamma sampler: add --sampler gamma, or leave it out")
    settings = SamplingSettings(
        sampler=options.sampler or sampler,
        steps=options.steps,
        times=options.times,
        spacing=options.spacing,
        gamma=gamma if options.gamma is None else options.gamma,
        omega=options.omega,
        interval=options.interval,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    labels = None
    if options.label:
        labels = torch.tensor(options.label)[torch.arange(max(options.count, 1)) % len(options.label)]
    drawn = generate(flow_map, options.count, settings, labels)
    if view is None:
        save_latents(flow_map, drawn.samples, drawn.labels, out)
    else:
        view.write(drawn.samples, drawn.labels, out, options.columns)
    print(f"{out}: {options.count} samples, {drawn.nfe:g} network calls each, {drawn.seconds:.2f} s")
    tuned = settings.tuned(flow_map.step_times)
    if tuned is not None:
        print(f"Times tuned for {tuned.steps} steps: {' '.join(f'{t:.4g}' for t in tuned.times)}")


def evaluate_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep evaluate RUN`."""
    from fewstep.data import load_dataset
    from fewstep.measuring import measure_real, measure_run, method_name, table, write_figures, yardstick
    from fewstep.students import align, teacher_of, with_labels
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
    rows = [*measure_run(run, stick, evaluation), measure_real(dataset, evaluation.samples, stick)]
    print(table(rows))
    print(f"Stored: {write_figures(rows, run.root)}")
    if config.teacher and not config.objective.on_diagonal:
        print(align(run, dataset, method_name(config), options.teacher))


def tune_steps_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep tune-steps RUN`."""
    from fewstep.data import load_dataset
    from fewstep.measuring import yardstick
    from fewstep.schedules import TIMES_FILE
    from fewstep.students import with_labels
    from fewstep.training import RunFolder
    from fewstep.tuning import TuningPlan, table, tune_run

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
    from fewstep.runs import report
    from fewstep.training import RunFolder

    options = parse(ReportOptions, args, "report")
    print(f"Report: {report(RunFolder(options.run), autoencoder=options.autoencoder)}")


def demos_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep demos TASK`."""
    from fewstep.policies.tasks import TASKS
    from fewstep.robots import import_demonstrations, record_demonstrations, shown_on_terminal

    options = parse(DemosOptions, args, "demos")
    minari, robomimic = options.from_minari, options.from_robomimic
    if minari is not None or robomimic is not None:
        print(import_demonstrations(options.task, minari, robomimic, options.keys, options.out))
        return
    if not options.task:
        raise ConfigError(f"demos needs a task: fewstep demos TASK; tasks: {', '.join(TASKS)}")
    progress = None if options.quiet or not sys.stderr.isatty() else shown_on_terminal
    told = record_demonstrations(options.task, options.count, options.out, options.first_seed, progress)
    print(f"\n{told}" if progress else told)


def rollout_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep rollout RUN`."""
    from fewstep.robots import draw_film, expert_row, measure_rollouts, rollout_table, shown_on_terminal, write_rollouts

    options = parse(RolloutOptions, args, "rollout")
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
    from fewstep.students import survey
    from fewstep.training import RunFolder

    options = parse(StatisticsOptions, args, "statistics")
    names = ("points", "samples", "probes", "centred", "shrink", "seed")
    settings = StatisticsConfig(**{name: getattr(options, name) for name in names})
    print(survey(RunFolder(options.run), settings, options.student, cache_folder(), options.cpu))


def compare_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep compare RUN RUN ...`."""
    from fewstep.comparison import PAGE_FILE, compare

    options = parse(CompareOptions, args, "compare")
    print(compare(options.runs, options.out))
    print(f"Comparison: {options.out / PAGE_FILE}")


def recipes_command(args: Sequence[str]) -> None:
    """Print every recipe with its docstring, and the computed cost of those at scale."""
    from fewstep.cost import cost_lines, training_cost

    if args:
        raise ConfigError(f"recipes takes no options, got {' '.join(args)}")
    for name, build in RECIPES.items():
        lines = [line.strip() for line in (build.__doc__ or "").strip().splitlines()]
        if name in AT_SCALE:
            lines += cost_lines(training_cost(build(), AT_SCALE[name].shape, AT_SCALE[name].classes))
        print(f"{name}\n    " + "\n    ".join(line for line in lines if line) + "\n")


def objectives_command(args: Sequence[str]) -> None:
    """Print the catalogue of objectives."""
    from fewstep.objectives import CATALOGUE
    from fewstep.reporting.catalogue import catalogue_table, catalogue_text

    options = parse(ObjectivesOptions, args, "objectives")
    print(catalogue_table(CATALOGUE) if options.markdown else catalogue_text(CATALOGUE))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "quickstart": quickstart_command,
    "train": train_command,
    "sample": sample_command,
    "tune-steps": tune_steps_command,
    "evaluate": evaluate_command,
    "report": report_command,
    "encode": encode_command,
    "statistics": statistics_command,
    "demos": demos_command,
    "rollout": rollout_command,
    "compare": compare_command,
    "recipes": recipes_command,
    "objectives": objectives_command,
}


def parse(cls: type[T], args: Sequence[str], command: str, default: T | None = None) -> T:
    """Options of a command; raises ConfigError for an unknown one, naming the closest known, or an unfit value."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed, unknown = tyro.cli(
                cls,
                args=list(args),
                prog=f"fewstep {command}",
                default=default,
                config=(tyro.conf.AvoidSubcommands,),
                return_unknown_args=True,
            )
    except SystemExit as error:
        if not error.code:
            raise
        raise ConfigError(f"fewstep {command}: {_first_paragraph(complaint.getvalue())}") from error
    if unknown:
        known = _option_names(default if default is not None else cls)
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"fewstep {command}: unknown option {unknown[0]}{hint} (--help lists every option)")
    return cast(T, parsed)


def _first_paragraph(box: str) -> str:
    """What a framed message of tyro says before its first rule."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    rules = [i for i, line in enumerate(lines) if line.startswith(("─", "╰"))]
    return " ".join(lines[: rules[0]] if rules else lines)


def _option_names(options: object, prefix: str = "--") -> list[str]:
    """The option strings of a dataclass, nested fields by dots."""
    names: list[str] = []
    for item in dataclasses.fields(options):  # type: ignore[arg-type]  # callers pass dataclasses
        name = prefix + item.name.replace("_", "-")
        value = None if isinstance(options, type) else getattr(options, item.name)
        nested = dataclasses.is_dataclass(value)
        inner = prefix if item.name == "run" else f"{name}."
        names += _option_names(value, inner) if nested else [name]
    return names


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Inside, fewstep's own warnings are one line each, without the place in the code that gave them."""
    usual = warnings.formatwarning

    def plain(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if issubclass(category, FewstepWarning):
            return f"fewstep: {' '.join(str(message).split())}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = usual


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 with one line on standard error for bad input."""
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(OVERVIEW, end="")
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise ConfigError(f"unknown command {arguments[0]!r}; commands: {', '.join(COMMANDS)}")
        with _plain_warnings():
            COMMANDS[arguments[0]](arguments[1:])
    except FewstepError as error:
        print(f"fewstep: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fewstep: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
