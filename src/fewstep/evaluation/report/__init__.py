"""Reporting: samples as pictures, figures of a run, and the page that holds them."""

from fewstep.evaluation.report.figures import loss_curves, quality_curves
from fewstep.evaluation.report.heatmap import alignment_heatmap
from fewstep.evaluation.report.page import Grid, RunReport, render, write_report
from fewstep.evaluation.report.statistics import Curve, Jumps, statistics_figure
from fewstep.sampling.images import image_grid, save_each, save_grid, save_npz, to_uint8

__all__ = [
    "Curve",
    "Grid",
    "Jumps",
    "RunReport",
    "alignment_heatmap",
    "image_grid",
    "loss_curves",
    "quality_curves",
    "render",
    "save_each",
    "save_grid",
    "save_npz",
    "statistics_figure",
    "to_uint8",
    "write_report",
]
