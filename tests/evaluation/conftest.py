"""Settings of the tests of evaluation."""

import pytest


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of few pixels but for those of the page in test_report.py, which is rendered once for its module."""
    monkeypatch.setattr("fewstep.evaluation.report.canvas._DPI", 100)
