"""Figures of a run's samples: kept in figures.json, and as a table with what must be known of them."""

import json
from pathlib import Path
from typing import Any

from fewstep.data.base import Dataset
from fewstep.evaluation.metrics.measure import ENOUGH, Evaluator
from fewstep.training.provenance import FIGURES_FILE
from fewstep.utils.files import read_rows, readable, reading, updating, write_atomically
from fewstep.utils.text import aligned, listed, quoted

Row = dict[str, Any]
_IDENTITY = ("method", "nfe", "extractor", "reference", "samples", "seed", "guidance_scale")
_NUMBER = int | float
_KINDS = {"method": str, "extractor": str, "reference": str, "nfe": int, "frechet": _NUMBER, "samples": int}
_NUMBERS = ("kernel", "kernel_error", "precision", "recall", "accuracy", "features", "latency_ms", "seconds")
_MOST_CALLS = 10**9


def write_figures(rows: list[Row], folder: Path) -> Path:
    """Store rows in figures.json beside those stored earlier; a row measured anew replaces its older self."""
    fresh = {tuple(row.get(key) for key in _IDENTITY) for row in rows}
    file = folder / FIGURES_FILE
    with updating(folder):
        kept = [row for row in read_figures(folder) if tuple(row.get(key) for key in _IDENTITY) not in fresh]
        write_atomically(file, json.dumps([*readable(rows), *kept], indent=2) + "\n")
    return file


def read_figures(folder: Path) -> list[Row]:
    """Rows stored earlier, or none; raises CheckpointError when the file is damaged."""
    file = folder / FIGURES_FILE
    advice = f"delete it, and run fewstep evaluate {quoted(folder)} anew"
    rows = [_in_todays_names(row) for row in read_rows(file, _KINDS, advice)]
    with reading(file, advice):
        for row in rows:
            wrong = [key for key in _NUMBERS if not isinstance(row.get(key), _NUMBER | None)]
            if wrong or not 0 <= row["nfe"] <= _MOST_CALLS:
                raise ValueError(f"{', '.join(wrong) or 'nfe'} of {row['method']!r} is none")
    return rows


def _in_todays_names(row: Row) -> Row:
    """A row as rows are called now: those stored with "omega" for the guidance scale have it in the method's name."""
    if "omega" not in row:
        return row
    renamed = {"guidance_scale" if key == "omega" else key: value for key, value in row.items()}
    return renamed | {"method": str(row["method"]).replace(", omega ", ", guidance ")}


def format_table(rows: list[Row], dataset: Dataset, evaluator: Evaluator) -> str:
    """Rows as aligned text, and what they rest on."""
    cells = [("method", "NFE", "Frechet", "accuracy", "precision", "recall", "ms/sample")]
    for row in rows:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        latency_ms = "" if row["latency_ms"] is None else f"{row['latency_ms']:.1f}"
        quality = (f"{row['frechet']:.2f}", accuracy, f"{row['precision']:.2f}", f"{row['recall']:.2f}")
        cells.append((row["method"], str(row["nfe"]), *quality, latency_ms))
    first = rows[0]
    notes = [f"Frechet distance in the features of {first['extractor']} to {first['reference']}; not FID."]
    if any(row.get("tuned_on") for row in rows):
        notes.append("Tuned times were chosen on half of these held-out samples: on the rest, see step_times.json.")
    notes += [f"{row['method']}, NFE {row['nfe']}: {row['strays']}" for row in rows if row.get("strays")]
    return "\n".join([aligned(cells), *notes, *caveats(first["samples"], dataset, evaluator)])


def caveats(samples: int, dataset: Dataset, evaluator: Evaluator) -> list[str]:
    """What to know of distances of so many samples: a line each."""
    (held, features), lines = evaluator.features.shape, []
    if min(samples, held) < ENOUGH * features:
        lines.append(
            f"Few samples: at {samples}, and {held} held out, the Frechet distance of {features} features is biased "
            "upwards; compare it only at equal counts (--samples, and --data.heldout in training)."
        )
    if evaluator.labels is not None:
        there = set(evaluator.labels.tolist())
        trained = set() if dataset.train.labels is None else set(dataset.train.labels.tolist())
        for what, numbers in (
            ("Not measured, since no sample is held out", set(range(dataset.num_classes)) - there),
            ("Measured, but without a sample to train on", there - trained),
        ):
            lines += [f"{what}: class {listed([dataset.class_names[k] for k in sorted(numbers)])}."] * bool(numbers)
        if samples < len(there):
            lines.append(f"Too few samples for all classes: {samples} of {len(there)} are measured.")
    return lines
