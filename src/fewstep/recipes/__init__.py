"""Recipes: one small function per run, returning its typed configuration.

A recipe's docstring states what it trains, the figure to expect and the cost; `fewstep recipes` prints it.
"""

from collections.abc import Callable
from pathlib import Path

from fewstep.recipes.config import RunConfig
from fewstep.recipes.digits import digits, digits_flow_matching, digits_unet
from fewstep.recipes.distillation import cd_digits, ctm_digits, ctm_fashion_mnist, ctm_mixture
from fewstep.recipes.edm import edm_digits, edm_fashion_mnist, edm_mixture
from fewstep.recipes.fashion_mnist import (
    fashion_mnist_dit,
    fashion_mnist_dit_flow_matching,
    fashion_mnist_flow_matching,
    fashion_mnist_unet,
)
from fewstep.recipes.files import configuration_of, recipe_of_file
from fewstep.recipes.latents import AT_SCALE, celebahq256_dit_b4, imagenet256_dit_b4, imagenet256_dit_xl1
from fewstep.recipes.objectives import (
    digits_ct,
    digits_ect,
    digits_esd,
    digits_lsd,
    digits_meanflow,
    digits_psd,
    digits_scd,
    digits_sct,
    digits_shortcut,
)
from fewstep.recipes.policies import policy_flow_matching, policy_mlp, policy_regression, policy_unet
from fewstep.utils.errors import ConfigError

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "digits": digits,
    "digits-flow-matching": digits_flow_matching,
    "digits-unet": digits_unet,
    "fashion-mnist-unet": fashion_mnist_unet,
    "fashion-mnist-flow-matching": fashion_mnist_flow_matching,
    "fashion-mnist-dit": fashion_mnist_dit,
    "fashion-mnist-dit-flow-matching": fashion_mnist_dit_flow_matching,
    "edm-digits": edm_digits,
    "edm-fashion-mnist": edm_fashion_mnist,
    "edm-mixture": edm_mixture,
    "ctm-digits": ctm_digits,
    "ctm-fashion-mnist": ctm_fashion_mnist,
    "ctm-mixture": ctm_mixture,
    "cd-digits": cd_digits,
    "digits-meanflow": digits_meanflow,
    "digits-esd": digits_esd,
    "digits-lsd": digits_lsd,
    "digits-psd": digits_psd,
    "digits-shortcut": digits_shortcut,
    "digits-ct": digits_ct,
    "digits-ect": digits_ect,
    "digits-sct": digits_sct,
    "digits-scd": digits_scd,
    "policy-mlp": policy_mlp,
    "policy-unet": policy_unet,
    "policy-flow-matching": policy_flow_matching,
    "policy-regression": policy_regression,
    "imagenet256-dit-b4": imagenet256_dit_b4,
    "imagenet256-dit-xl1": imagenet256_dit_xl1,
    "celebahq256-dit-b4": celebahq256_dit_b4,
}


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


__all__ = ["AT_SCALE", "RECIPES", "recipe"]
