"""Figures of a report at a fraction of their cost, where a test does not look at them."""

from collections.abc import Callable
from types import ModuleType

import pytest

from fewstep.evaluation.report.html import Plot, embed


def drawn_once(draw: Callable[[int, bool], bytes], columns: int, alt: str) -> Plot:
    """The wide and light version of a figure in the place of all four."""
    return Plot(alt, *[embed(draw(columns, False))] * 4)


def draw_once(patch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """From now on, pages that these modules make have figures that are drawn once."""
    for module in modules:
        patch.setattr(module, "plot", drawn_once)
