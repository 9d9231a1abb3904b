"""Recipes that are files: a Python file with a function that returns a RunConfig, or a run's config.json."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fewstep.recipes.config import RunConfig
from fewstep.utils.errors import CheckpointError, ConfigError
from fewstep.utils.files import read_record
from fewstep.utils.parts import from_file, import_file
from fewstep.utils.serialization import from_json, in_this_format


def recipe_of_file(name: str) -> RunConfig:
    """What FILE.py:FUNCTION returns; of FILE.py the function called recipe, or its only public one.

    Raises ConfigError when the file cannot be imported, or has no such function that takes no arguments and returns a
    RunConfig.
    """
    file, _, function = name.partition(":")
    make = from_file(name) if function else _only_recipe(file)
    needed = inspect.Parameter.empty
    if not inspect.isfunction(make) or any(
        each.default is needed for each in inspect.signature(make).parameters.values()
    ):
        raise ConfigError(f"{name} is no recipe: a recipe is a function without arguments that returns a RunConfig")
    found = make()
    if not isinstance(found, RunConfig):
        raise ConfigError(f"{name} is no recipe: {make.__name__} returns a {type(found).__name__}, not a RunConfig")
    return found


def configuration_of(file: Path) -> RunConfig:
    """The configuration that a run was trained with, from its config.json.

    Raises CheckpointError when the file is missing or none, ConfigError when it names parts that nobody has imported.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; a run's configuration is RUN/config.json")
    record = in_this_format(read_record(file, "bring back a copy of it"), str(file))
    if "run" not in record:
        raise CheckpointError(f"{file} is not a run's configuration, RUN/config.json: it lacks 'run'")
    return from_json(RunConfig, record["run"], str(file))


def public_functions(module: ModuleType) -> dict[str, Callable[[], Any]]:
    """The functions that a module defines, but those with an underscore, in its order."""
    functions = {name: each for name, each in vars(module).items() if inspect.isfunction(each)}
    return {
        name: each
        for name, each in functions.items()
        if each.__module__ == module.__name__ and not name.startswith("_")
    }


def _only_recipe(file: str) -> Callable[[], Any]:
    public = public_functions(import_file(file))
    if "recipe" not in public and len(public) != 1:
        raise ConfigError(
            f"{file} has {', '.join(public) or 'no public function'}: a recipe is its only public function, the one "
            "called recipe, or FILE.py:FUNCTION"
        )
    return public.get("recipe") or next(iter(public.values()))
