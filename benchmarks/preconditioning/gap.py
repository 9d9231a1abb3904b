"""How far a perfect student's network is from the teacher's denoiser, by preconditioning and jump (math.md §3.4).

The consistency gap, the root mean square per element of N* - D on 256 held-out samples, with D taken where the
preconditioning freezes its residual: at the end of the jump for the backward form, at its start for the forward form,
at the better of the two for Euler's.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fewstep as fs
from benchmarks.harness import RESULTS, Row, markdown, read, write
from fewstep.flow.closed_form import toy_mixture
from fewstep.recipes.config import StatisticsConfig
from fewstep.training.statistics import data_mean, kept_statistics, prepared

GAP = RESULTS / "gap.json"
JUMPS = ((80.0, 12.9), (80.0, 1.9), (12.9, 1.9), (12.9, 0.59), (1.9, 0.59), (80.0, 0.002))
COUNT = 256
COLUMNS = {
    "euler": "Euler", "backward, shrunk": "backward", "backward, raw": "backward, raw", "backward, l only": "l only",
    "backward, s only": "s only", "forward": "forward",
}  # fmt: skip
Denoiser = Callable[[Tensor, Tensor], Tensor]
Estimate = Callable[[bool], fs.TrajectoryStatistics]


def rows_of(name: str, denoiser: Denoiser, data: Tensor, estimate: Estimate, conditional: bool) -> list[Row]:
    """The gap of every preconditioning at every jump; `estimate(centred)` gives statistics that are not shrunk."""
    centred, raw = estimate(True), estimate(False)
    found: dict[str, fs.Preconditioning] = {
        "euler": fs.EulerPreconditioning(),
        "backward, shrunk": fs.AnalyticPreconditioning(centred if conditional else centred.shrunk()),
        "backward, raw": fs.AnalyticPreconditioning(raw),
        "backward, l only": fs.AnalyticPreconditioning(centred.without("s")),
        "backward, s only": fs.AnalyticPreconditioning(centred.without("l")),
        "forward": fs.AnalyticPreconditioning(centred, "forward"),
    }
    t, s = torch.tensor(JUMPS, dtype=torch.float64).T
    rows = []
    for method, preconditioning in found.items():
        ends = ("t", "s") if method == "euler" else (preconditioning.frozen_at,)
        kinds = [fs.GapSettings(samples=COUNT, seed=1, solver_steps=64, end=end) for end in ends]  # type: ignore[arg-type]
        gaps = [fs.consistency_gap(preconditioning, denoiser, data, t, s, settings=kind) for kind in kinds]
        for i, (high, low) in enumerate(JUMPS):
            gap = min(gaps, key=lambda each: float(each.rms[i]))
            figures = {"gap": float(gap.rms[i]), "stderr": float(gap.stderr[i])}
            rows.append({"teacher": name, "method": method, "from": high, "to": low, **figures})
    return rows


def of_run(folder: Path, samples: int) -> list[Row]:
    """Rows of a trained teacher; with classes it is asked at each sample's own, and the statistics are not shrunk."""
    config = fs.RunFolder(folder).config()
    dataset, teacher = fs.load_dataset(config.data), fs.load(folder).flow_map.requires_grad_(False)
    x0, labels = dataset.heldout.fetch(torch.arange(COUNT))

    def estimate(centred: bool) -> fs.TrajectoryStatistics:
        settings = StatisticsConfig(samples=samples, centred=centred, shrink=False)
        return prepared(kept_statistics(folder, teacher, dataset, settings), settings, dataset)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return teacher.denoise(x, t, fs.Condition(labels))

    conditional = dataset.num_classes > 0
    return rows_of(config.recipe + ", class-conditional" * conditional, denoiser, x0, estimate, conditional)


def of_closed_form(samples: int) -> list[Row]:
    """Rows of the mixture's exact denoiser."""
    dataset, exact = fs.load_dataset(fs.DataConfig(source="mixture")), toy_mixture()

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return exact.denoise(fs.EDM(), x, t)

    def estimate(centred: bool) -> fs.TrajectoryStatistics:
        train = dataset.train.fetch(torch.arange(samples))[0].double()
        settings = fs.EstimationSettings(samples=samples, centred=centred, shrink=False)
        return fs.estimate_statistics(denoiser, train, settings=settings, mean=data_mean(dataset))

    x0 = dataset.heldout.fetch(torch.arange(COUNT))[0].double()
    return rows_of("mixture, closed form", denoiser, x0, estimate, False)


def store(rows: list[Row]) -> None:
    """In place of what is there of the same teacher."""
    fresh = {row["teacher"] for row in rows}
    write(GAP, [row for row in read(GAP) if row["teacher"] not in fresh] + rows)


def table(rows: list[Row], teachers: dict[str, str]) -> str:
    """A line for each of `teachers` (name -> as shown) and jump, a column for each preconditioning."""
    gaps = {(row["teacher"], row["method"], row["from"], row["to"]): f"{row['gap']:.4f}" for row in rows}
    lines = [
        (shown if jump == JUMPS[0] else "", "{:g} → {:g}".format(*jump), *(gaps[name, kind, *jump] for kind in COLUMNS))
        for name, shown in teachers.items()
        for jump in JUMPS
    ]
    return markdown(("", "jump", *COLUMNS.values()), lines)
