"""Evaluation: metrics, measurements of runs, comparisons, reports."""
