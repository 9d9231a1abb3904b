"""The command line: each command parses its options and calls the library."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar, cast

import tyro

from fewstep._version import __version__
from fewstep.config import RunConfig
from fewstep.errors import ConfigError, FewstepError
from fewstep.recipes import RECIPES, recipe
from fewstep.sampling import SamplerName, Spacing
from fewstep.training.loop import Machine

T = TypeVar("T")

OVERVIEW = f"""fewstep {__version__}: generative models that need one to four network calls.

  fewstep quickstart           train on real digits, measure, write a report: minutes on a laptop
  fewstep recipes              what can be trained, the figure to expect, the cost
  fewstep train RECIPE         train it, or go on where it stopped; every option can be set by name
  fewstep sample RUN           draw images from a trained run
  fewstep evaluate RUN         measure its samples against held-out data
  fewstep report RUN           write RUN/report.html, one self-contained page

A RUN is the folder that `train` wrote, or a saved model. Add --help to a command for its options,
for example: fewstep train digits --help
"""


@dataclass(frozen=True)
class QuickstartOptions:
    """Train iSD-T and flow matching on real digits for the same seconds, print their figures, write a report."""

    out: Path = Path("runs/quickstart")
    """Folder of the run; started again on it, the command goes on where it stopped."""
    seconds: float = 85.0
    """Longest training time of each of the two methods."""
    machine: Machine = field(default_factory=Machine)


@dataclass(frozen=True)
class TrainOptions:
    """Train a recipe, or go on where it stopped."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder of the run; runs/RECIPE when not given."""
    machine: Machine = field(default_factory=Machine)


@dataclass(frozen=True)
class SampleOptions:
    """Draw images from a run. The same seed gives the same noise to sample k, whatever the number of images."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of a saved model."""
    out: Path | None = None
    """FILE.png for a grid, FILE.npz for arrays, or a folder for single PNGs; samples-SEED.png in RUN when not given."""
    count: int = 64
    """Number of images."""
    steps: int = 2
    """Steps; the map sampler makes one network call each."""
    sampler: SamplerName = "map"
    """map: jumps; gamma: CTM's gamma-sampling; euler, heun: the ODE itself."""
    spacing: Spacing = "uniform"
    """uniform on the path's clock, or edm: EDM's noise levels (rho = 7)."""
    gamma: float = 0.5
    """For the gamma sampler: 0 is deterministic, 1 re-noises fully."""
    times: tuple[float, ...] = ()
    """The times to walk through in the path's clock, falling; overrides steps."""
    label: tuple[int, ...] = ()
    """Class of each image, repeated as needed; all classes in turn when not given."""
    omega: float = 1.0
    """Guidance strength. A model trained with drawn guidance takes it as an input; any other pays a second call."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Where guidance acts, as fractions of the path's range."""
    seed: int = 0
    columns: int = 8
    """Images per row of a grid."""
    batch_size: int = 512
    cpu: bool = False


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a run's samples against held-out data: Frechet and kernel distance, precision, recall, accuracy."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run."""
    samples: int | None = None
    """Generated samples per measurement; like the options below, the recipe's own when not given."""
    steps: tuple[int, ...] = ()
    """Step counts of the run's own sampler."""
    omega: float | None = None
    """Guidance strength when sampling: choose it by the Frechet distance."""
    seed: int | None = None
    inception: Path | None = None
    """Weights of the Inception network (extra [eval]); without them the data set's own classifier is trained once."""


@dataclass(frozen=True)
class ReportOptions:
    """Write RUN/report.html: samples from the same noise, curves, quality against network calls, cost, settings."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run."""


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
    from fewstep.runs import watcher
    from fewstep.training import RunFolder, train

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
    dataset = load_dataset(config.data)
    result = train(config, dataset, run, options.machine, watcher(run, config))
    if not result.main_process:
        return
    print(f"{run.root}: {result.images:,} images in {result.step:,} steps, {result.seconds:.0f} s")
    print(f"Next: fewstep sample {run.root}   fewstep evaluate {run.root}   fewstep report {run.root}")


def sample_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep sample RUN`."""
    import torch

    from fewstep.reporting import save_each, save_grid, save_npz
    from fewstep.sampling import SamplingSettings, generate
    from fewstep.training import load

    options = parse(SampleOptions, args, "sample")
    out = options.out or options.run / f"samples-{options.seed}.png"
    if out.suffix not in ("", ".png", ".npz"):
        raise ConfigError(f"{out}: give FILE.png, FILE.npz or a folder")
    flow_map = load(options.run)
    if torch.cuda.is_available() and not options.cpu:
        flow_map = flow_map.cuda()
    settings = SamplingSettings(
        sampler=options.sampler,
        steps=options.steps,
        times=options.times,
        spacing=options.spacing,
        gamma=options.gamma,
        omega=options.omega,
        interval=options.interval,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    labels = None
    if options.label:
        labels = torch.tensor(options.label)[torch.arange(max(options.count, 1)) % len(options.label)]
    drawn = generate(flow_map, options.count, settings, labels)
    data_range = None if flow_map.config is None else flow_map.config.data_range
    if out.suffix == ".png":
        save_grid(drawn.samples, out, columns=options.columns, data_range=data_range)
    elif out.suffix == ".npz":
        save_npz(drawn.samples, drawn.labels, out)
    else:
        save_each(drawn.samples, out, data_range)
    print(f"{out}: {options.count} samples, {drawn.nfe:g} network calls each, {drawn.seconds:.2f} s")


def evaluate_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep evaluate RUN`."""
    from fewstep.data import load_dataset
    from fewstep.runs import measure_real, measure_run, table, write_figures, yardstick
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
    stick = yardstick(dataset, cache_folder(), options.inception)
    rows = [*measure_run(run, stick, evaluation), measure_real(dataset, evaluation.samples, stick)]
    print(table(rows))
    print(f"Stored: {write_figures(rows, run.root)}")


def report_command(args: Sequence[str]) -> None:
    """Parse and run `fewstep report RUN`."""
    from fewstep.runs import report
    from fewstep.training import RunFolder

    options = parse(ReportOptions, args, "report")
    print(f"Report: {report(RunFolder(options.run))}")


def recipes_command(args: Sequence[str]) -> None:
    """Print every recipe with its docstring."""
    if args:
        raise ConfigError(f"recipes takes no options, got {' '.join(args)}")
    for name, build in RECIPES.items():
        lines = [line.strip() for line in (build.__doc__ or "").strip().splitlines()]
        print(f"{name}\n    " + "\n    ".join(line for line in lines if line) + "\n")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "quickstart": quickstart_command,
    "train": train_command,
    "sample": sample_command,
    "evaluate": evaluate_command,
    "report": report_command,
    "recipes": recipes_command,
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
