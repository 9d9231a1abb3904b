"""Figures of a report at a fraction of their cost, where a test does not look at them."""

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

import fewstep.evaluation.compare
import fewstep.evaluation.report.run  # noqa: F401  (with both, every module that makes a page)
from fewstep.evaluation.report import html
from fewstep.evaluation.report.html import Plot, embed


def drawn_once(draw: Callable[[int, bool], bytes], columns: int, alt: str) -> Plot:
    """The wide and light version of a figure in the place of all four."""
    return Plot(alt, *[embed(draw(columns, False))] * 4)


class Unplaced(ConstrainedLayoutEngine):
    """Panels stay where they are: finding their places takes as long as drawing."""

    def execute(self, fig: Figure) -> None:
        pass


def draw_once(patch: pytest.MonkeyPatch, but: ModuleType | None = None) -> None:
    """From now on, figures of pages are drawn once, whichever module makes the page, `but` of one."""
    for name, module in list(sys.modules.items()):
        known = name.startswith("fewstep.evaluation.") and module not in (html, but)
        if known and getattr(module, "plot", None) is html.plot:
            patch.setattr(module, "plot", drawn_once)
