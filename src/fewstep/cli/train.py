"""`fewstep train RECIPE`: a run of a recipe."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from fewstep.cli.parsing import parse
from fewstep.recipes import RECIPES, fitted, recipe
from fewstep.recipes.config import RunConfig
from fewstep.training.run_folder import RunFolder
from fewstep.training.settings import Runtime
from fewstep.utils.errors import ConfigError
from fewstep.utils.parts import imported_file, outside_files
from fewstep.utils.text import counted, import_words, quoted


@dataclass(frozen=True)
class Options:
    """Train a recipe, or go on where it stopped."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder of the run; runs/RECIPE when not given."""
    runtime: Runtime = field(default_factory=Runtime)


def read(args: Sequence[str]) -> Options:
    """The options, with the recipe's own values where none are given; raises ConfigError for what does not fit."""
    if args and args[0].partition("=")[0] == "--resume":
        return _resumed(args)
    if not args or args[0].startswith("-"):
        raise ConfigError(f"train needs a recipe first: fewstep train RECIPE; recipes: {', '.join(RECIPES)}")
    started = recipe(args[0])
    options = parse(Options, args[1:], f"train {args[0]}", Options(run=started))
    name = options.run.recipe
    if name != started.recipe:
        raise ConfigError(f"the recipe is {started.recipe!r}; leave out --recipe {name}")
    options = replace(options, run=fitted(options.run, None if ".py" in args[0] else started))
    if options.out is None and args[0] != name and (args[0].endswith(".json") or name in RECIPES):
        raise ConfigError(f"{args[0]} has the name {name}, which another run may have: give a folder with --out")
    return options


def _resumed(args: Sequence[str]) -> Options:
    """The options of a run that is there, with what the words after it change."""
    _, equals, root = args[0].partition("=")
    words = args[1:] if equals else args[2:]
    if not equals:
        root = args[1] if len(args) > 1 else ""
    if not root or root.startswith("-"):
        raise ConfigError("--resume needs the folder of a run: fewstep train --resume RUN")
    run = RunFolder(root)
    options = parse(Options, words, "train --resume RUN", Options(run=run.config(), out=run.root))
    if options.out != run.root:
        raise ConfigError(f"--resume goes on in {root}: leave out --out, or train {run.config_file} with it")
    return options


def run(options: Options) -> None:
    """Train; raises what `train` raises."""
    from fewstep.cli.announcing import Announcer
    from fewstep.data.sources import load_dataset
    from fewstep.evaluation.actions import actions_table, check_actions, measure_actions, write_actions
    from fewstep.evaluation.evaluate import check_learned, too_few
    from fewstep.evaluation.rollouts import next_command
    from fewstep.evaluation.running import train_on
    from fewstep.training.parallel import LAUNCHED
    from fewstep.training.teacher_samples import run_data

    config = options.run
    run = RunFolder(options.out or Path("runs") / config.recipe)
    data = run_data(config, run, options.runtime.cpu, options.runtime.quiet)
    dataset = load_dataset(data)
    if os.environ.get("RANK", "0") == "0" or not os.environ.keys() >= LAUNCHED:  # of several the first one speaks
        print(dataset.summary)
        if dataset.policy is None and (line := too_few(dataset)):
            print(f"Not to be measured: {line}")
    result = train_on(config, data, dataset, run, options.runtime, [Announcer()])
    if not result.main_process:
        return
    memory = f", {result.peak_memory}" if result.peak_memory else ""
    done = f"{counted(result.images, config.data.source.unit)} in {counted(result.step, 'step')}"
    print(f"{run.root}: {done}, {result.seconds:.0f} s{memory}")
    if dataset.policy is None:
        check_learned(run)
        measured = not too_few(dataset) or (dataset.of_videos and config.teacher)
        following = ["sample", *(["evaluate"] if measured else []), "report"]
    else:
        errors = measure_actions(run, dataset, config.evaluation)
        print(actions_table(errors))
        write_actions(errors, run.root)
        check_actions(run, errors)
        following = [next_command(dataset.policy), "report"]
    print("Next: " + "   ".join(_with_imports(words, run, config) for words in following))


def _with_imports(words: str, run: RunFolder, config: RunConfig) -> str:
    """A command on the run, with the files of the user's that it needs: `evaluate` asks the teacher too."""
    command, _, options = words.partition(" ")
    taught = imported_file(config.teacher) if command == "evaluate" else None
    named = import_words([*outside_files(config), taught])
    return f"fewstep {command} {quoted(run.root)}{options and f' {options}'}{named}"
