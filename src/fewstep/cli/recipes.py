"""`fewstep recipes`: what can be trained."""

from collections.abc import Iterator
from dataclasses import dataclass

from fewstep.recipes import AT_SCALE, RECIPES, TEACHERS_AT_SCALE
from fewstep.recipes.cost import cost_lines, student_cost, training_cost
from fewstep.utils.errors import MissingExtraError


@dataclass(frozen=True)
class Options:
    """Every recipe with its docstring, and the computed cost of those at scale."""


def run(options: Options) -> None:
    """Print the recipes."""
    for name, build in RECIPES.items():
        lines = [line.strip() for line in (build.__doc__ or "").strip().splitlines()]
        lines += _cost(name)
        print(f"{name}\n    " + "\n    ".join(line for line in lines if line) + "\n")


def _cost(name: str) -> Iterator[str]:
    """Of a recipe at scale; nothing for others."""
    if name in AT_SCALE:
        yield from cost_lines(training_cost(RECIPES[name](), AT_SCALE[name].shape, AT_SCALE[name].classes))
    if name in TEACHERS_AT_SCALE:
        known = TEACHERS_AT_SCALE[name]
        try:
            yield from cost_lines(student_cost(RECIPES[name](), known.network, known.shape, known.classes))
        except MissingExtraError as error:
            yield f"Its cost is not computed: {error}"
