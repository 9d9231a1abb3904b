"""Recipes: one small function per run, returning its typed configuration.

A recipe's docstring states what it trains, the figure to expect and the cost; `fewstep recipes` prints it.
"""

from collections.abc import Callable
from pathlib import Path

from fewstep.recipes import digits, distillation, edm, fashion_mnist, foreign, latents, objectives, photos, policies
from fewstep.recipes.config import RunConfig
from fewstep.recipes.files import configuration_of, public_functions, recipe_of_file
from fewstep.recipes.foreign import TEACHERS_AT_SCALE
from fewstep.recipes.latents import AT_SCALE
from fewstep.recipes.length import fitted
from fewstep.utils.errors import ConfigError

_MODULES = (digits, fashion_mnist, edm, distillation, foreign, objectives, policies, photos, latents)

RECIPES: dict[str, Callable[[], RunConfig]] = {
    name.replace("_", "-"): function for module in _MODULES for name, function in public_functions(module).items()
}
"""Every public function of these modules, by its name with hyphens."""


def recipe(name: str) -> RunConfig:
    """The configuration of that name, of a file's recipe (FILE.py, FILE.py:FUNCTION), or of a run (RUN/config.json).

    Raises ConfigError listing the names there are, or as `recipe_of_file` and `configuration_of` do.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith(".json"):
        return configuration_of(Path(name))
    if name.partition(":")[0].endswith(".py"):
        return recipe_of_file(name)
    raise ConfigError(f"there is no recipe {name!r}; recipes: {', '.join(RECIPES)}")


__all__ = ["AT_SCALE", "RECIPES", "TEACHERS_AT_SCALE", "fitted", "recipe"]
