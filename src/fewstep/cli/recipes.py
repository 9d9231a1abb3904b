"""`fewstep recipes`: what can be trained."""

from dataclasses import dataclass

from fewstep.recipes import AT_SCALE, RECIPES
from fewstep.recipes.cost import cost_lines, training_cost


@dataclass(frozen=True)
class Options:
    """Every recipe with its docstring, and the computed cost of those at scale."""


def run(options: Options) -> None:
    """Print the recipes."""
    for name, build in RECIPES.items():
        lines = [line.strip() for line in (build.__doc__ or "").strip().splitlines()]
        if name in AT_SCALE:
            lines += cost_lines(training_cost(build(), AT_SCALE[name].shape, AT_SCALE[name].classes))
        print(f"{name}\n    " + "\n    ".join(line for line in lines if line) + "\n")
