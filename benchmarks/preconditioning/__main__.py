"""What stands behind the computed preconditioning: how far must the network move with it, and are its l and s right?

How far a perfect student's network is from the teacher's denoiser (math.md §3.4): the root mean square per element of
N* - D on 256 held-out samples, with D at the end of the jump for the backward form, at its start for the forward form,
at the better of the two for Euler's. The statistics of the mixture, estimated with the library's defaults, are held
against a reference that shares no code with it, of many more samples; its tests repeat the first seed of what is
stored. Differences are in units of both stated errors together; levels of one seed share their samples.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from tyro.conf import Positional

import fewstep as fs
from benchmarks.harness import RESULTS, Row, Study, grouped, markdown, put, read, write
from fewstep.data.draws import even_draw
from fewstep.flow.closed_form import toy_mixture
from fewstep.recipes.config import StatisticsConfig
from fewstep.training.statistics import data_mean, kept_statistics, prepared
from tests.support.statistics_reference import Reference, estimate, portions, reference

GAP = RESULTS / "gap.json"
JUMPS = ((80.0, 12.9), (80.0, 1.9), (12.9, 1.9), (12.9, 0.59), (1.9, 0.59), (80.0, 0.002))
COUNT = 256
Estimate = Callable[[bool], fs.TrajectoryStatistics]
CHECKED = RESULTS / "statistics_check.json"
BANDS = (80.0, 12.0, 2.0, 0.3, 0.06, 0.03, 0.0)


def tables() -> dict[str, str]:
    return {
        "Are l and s right": band_table(read(CHECKED)),
        "How far N must move": gap_table(read(GAP)),
    }


def rows_of(seed: int, found: fs.TrajectoryStatistics, truth: Reference) -> list[Row]:
    """A row for every level; scores are differences in units of both stated errors together."""
    columns = {"noise": found.tau}
    for name in ("l", "s"):
        own, error = getattr(found, name), getattr(found, f"{name}_stderr")
        other, other_error = getattr(truth, name), getattr(truth, f"{name}_stderr")
        score = (own - other) / torch.hypot(error, other_error)
        values = {"": own, "_stderr": error, "_reference": other, "_reference_stderr": other_error, "_score": score}
        columns |= {name + key: value for key, value in values.items()}
    lists = {name: values.tolist() for name, values in columns.items()}
    return [
        {"seed": seed, **{name: float(f"{values[i]:.6g}") for name, values in lists.items()}}
        for i in range(len(found.lam))
    ]


def band_table(rows: list[Row]) -> str:
    """Root mean square and largest score of every band, over all seeds."""
    lines = []
    for high, low in pairwise(BANDS):
        own = [row for row in rows if low <= row["noise"] < high * 1.001]
        scores = [torch.tensor([row[name] for row in own]) for name in ("l_score", "s_score")]
        shown = [f"{float(value):.2f}" for each in scores for value in (each.square().mean().sqrt(), each.abs().max())]
        lines.append((f"{high:g} to {low or 0.002:g}", *shown))
    return markdown(("noise", "`l`", "", "`s`", ""), lines)


def gap_rows(name: str, denoiser: Any, data: Tensor, estimate: Estimate, conditional: bool) -> list[Row]:
    """The gap of every preconditioning at every jump; `estimate(centred)` gives statistics that are not shrunk."""
    centred, raw = estimate(True), estimate(False)
    found: dict[str, fs.Preconditioning] = {
        "euler": fs.EulerPreconditioning(),
        "backward": fs.AnalyticPreconditioning(centred if conditional else centred.shrunk()),
        "raw": fs.AnalyticPreconditioning(raw),
        "l only": fs.AnalyticPreconditioning(centred.without("s")),
        "s only": fs.AnalyticPreconditioning(centred.without("l")),
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
    x0, labels = dataset.heldout.fetch(even_draw(dataset.heldout, COUNT, seed=1))

    def estimate(centred: bool) -> fs.TrajectoryStatistics:
        settings = StatisticsConfig(samples=samples, centred=centred, shrink=False)
        return prepared(kept_statistics(folder, teacher, dataset, settings), settings, dataset)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return teacher.denoise(x, t, fs.Condition(labels))

    conditional = dataset.num_classes > 0
    return gap_rows(config.recipe + ", class-conditional" * conditional, denoiser, x0, estimate, conditional)


def of_closed_form(samples: int) -> list[Row]:
    """Rows of the mixture's exact denoiser."""
    dataset, exact = fs.load_dataset(fs.DataConfig(source="mixture")), toy_mixture()

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return exact.denoise(fs.EDM(), x, t)

    def estimate(centred: bool) -> fs.TrajectoryStatistics:
        train = dataset.train.fetch(even_draw(dataset.train, samples, seed=1))[0].double()
        settings = fs.EstimationSettings(samples=samples, centred=centred, shrink=False)
        return fs.estimate_statistics(denoiser, train, settings=settings, mean=data_mean(dataset))

    x0 = dataset.heldout.fetch(even_draw(dataset.heldout, COUNT, seed=1))[0].double()
    return gap_rows("mixture, closed form", denoiser, x0, estimate, False)


def gap_table(rows: list[Row]) -> str:
    """A line for each teacher and jump, a column for each preconditioning."""
    jumps = grouped(rows, lambda row: (row["teacher"], row["from"], row["to"]))
    lines = [
        (name, f"{high:g} → {low:g}", *(f"{row['gap']:.4f}" for row in own)) for (name, high, low), own in jumps.items()
    ]
    return markdown(("teacher", "jump", *dict.fromkeys(row["method"] for row in rows)), lines)


STUDY = Study("preconditioning", tables)


def gap(teachers: Annotated[tuple[Path, ...], Positional] = (), closed_form: bool = False, samples: int = 256) -> None:
    """Measure the gap of trained teachers, and of the mixture's closed form; SAMPLES are behind their statistics."""
    for rows in (
        *(of_run(folder, samples) for folder in teachers),
        *([of_closed_form(samples)] if closed_form else []),
    ):
        put(GAP, rows, "teacher")
        print(gap_table(rows))


def statistics(
    seeds: tuple[int, ...] = (0, 1, 2), samples: int = 4096, reference_samples: int = 262_144, out: Path = CHECKED
) -> None:
    """Check l and s of the mixture against an estimate of another kind, for the estimates of several seeds."""
    data, train = toy_mixture(), fs.load_dataset(fs.DataConfig(source="mixture")).train
    x0 = train.fetch(torch.arange(len(train)))[0].double().flatten(1)
    estimates = {seed: estimate(data, x0, samples, seed) for seed in seeds}
    lam = estimates[seeds[0]].lam
    truth = reference(data, lam, float(lam[1] - lam[0]) / 10, portions(data, reference_samples, seed=1))
    rows = [row for seed, found in estimates.items() for row in rows_of(seed, found, truth)]
    print(band_table(rows))
    write(out, rows)


if __name__ == "__main__":
    STUDY.main(gap=gap, statistics=statistics)
