"""Settings of the tests of evaluation."""

import pytest

from fewstep.evaluation import compare
from tests.support.figures import draw_once


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of few pixels, drawn once for all widths and grounds, but for those of the page in test_report.py, which
    is rendered once for its module, and those of comparisons.
    """
    monkeypatch.setattr("fewstep.evaluation.report.canvas._DPI", 100)
    draw_once(monkeypatch, but=compare)
