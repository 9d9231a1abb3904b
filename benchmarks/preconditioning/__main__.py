"""What stands behind the computed preconditioning: how far must the network move with it, and are its l and s right?

The statistics of the mixture of Gaussians in 16 dimensions, estimated with the library's defaults for several seeds,
against a reference that shares no code with it, of many more samples; its tests repeat the first seed of what is
stored. Differences are in units of both stated errors together, their mean square 1 where those are honest; levels of
one seed share their samples, so that their scores go together.
"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional

import fewstep as fs
from benchmarks.harness import RESULTS, Row, Study, markdown, read, write
from benchmarks.preconditioning import gap as gaps
from fewstep.flow.closed_form import toy_mixture
from tests.support.statistics_reference import Reference, estimate, portions, reference

CHECKED = RESULTS / "statistics_check.json"
BANDS = (80.0, 12.0, 2.0, 0.3, 0.06, 0.03, 0.0)
SHOWN = {"mixture, closed form": "mixture", "edm-digits": "digits"}
OTHERS = {name: name for name in ("edm-mixture", "edm-digits, class-conditional")}


def tables() -> dict[str, str]:
    return {
        "Are l and s right": band_table(read(CHECKED)),
        "How far N must move": gaps.table(read(gaps.GAP), SHOWN),
        "How far N must move, other teachers": gaps.table(read(gaps.GAP), OTHERS),
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


def checked(seeds: tuple[int, ...], samples: int, reference_samples: int) -> list[Row]:
    """A row for every seed and level."""
    data, train = toy_mixture(), fs.load_dataset(fs.DataConfig(source="mixture")).train
    x0 = train.fetch(torch.arange(len(train)))[0].double().flatten(1)
    estimates = {seed: estimate(data, x0, samples, seed) for seed in seeds}
    lam = next(iter(estimates.values())).lam
    truth = reference(data, lam, float(lam[1] - lam[0]) / 10, portions(data, reference_samples, seed=1))
    return [row for seed, found in estimates.items() for row in rows_of(seed, found, truth)]


def band_table(rows: list[Row]) -> str:
    """Root mean square and largest score of every band, over all seeds."""
    lines = []
    for high, low in pairwise(BANDS):
        own = [row for row in rows if low <= row["noise"] < high * 1.001]
        scores = [torch.tensor([row[name] for row in own]) for name in ("l_score", "s_score")]
        shown = [f"{float(value):.2f}" for each in scores for value in (each.square().mean().sqrt(), each.abs().max())]
        lines.append((f"{high:g} to {low or 0.002:g}", *shown))
    return markdown(("noise", "`l`", "", "`s`", ""), lines)


STUDY = Study("preconditioning", tables)


def gap(teachers: Annotated[tuple[Path, ...], Positional] = (), closed_form: bool = False, samples: int = 256) -> None:
    """Measure the gap of trained teachers.

    Args:
        teachers: run folders
        closed_form: of the mixture's exact denoiser too
        samples: training samples behind the statistics
    """
    for rows in (
        *(gaps.of_run(folder, samples) for folder in teachers),
        *([gaps.of_closed_form(samples)] if closed_form else []),
    ):
        gaps.store(rows)
        print(gaps.table(rows, {rows[0]["teacher"]: rows[0]["teacher"]}))


def statistics(
    seeds: tuple[int, ...] = (0, 1, 2), samples: int = 4096, reference_samples: int = 262_144, out: Path = CHECKED
) -> None:
    """Check l and s of the mixture against an estimate of another kind, for the estimates of several seeds.

    Args:
        seeds: of the estimates that are checked
        samples: of each estimate
        reference_samples: of what they are checked against
        out: JSON file to write
    """
    rows = checked(seeds, samples, reference_samples)
    print(band_table(rows))
    write(out, rows)


if __name__ == "__main__":
    STUDY.main(gap=gap, statistics=statistics)
