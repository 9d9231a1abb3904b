"""Are the statistics of a closed-form denoiser what they should be, within the errors they state? (math.md §3.2)

The mixture of Gaussians in 16 dimensions, `estimate_statistics` with its defaults for several seeds, against a
reference that shares no code with it, of many more samples, by differences over a tenth of the grid's step; its tests
repeat the first seed of what is stored. Differences are in units of both stated errors together, their mean square 1
where those are honest; levels of one seed share their samples, so that their scores go together.
"""

from itertools import pairwise

import torch

import fewstep as fs
from benchmarks.harness import RESULTS, Row, markdown
from fewstep.flow.closed_form import toy_mixture
from tests.support.statistics_reference import Reference, estimate, portions, reference

CHECKED = RESULTS / "statistics_check.json"
BANDS = (80.0, 12.0, 2.0, 0.3, 0.06, 0.03, 0.0)


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


def table(rows: list[Row]) -> str:
    """Root mean square and largest score of every band, over all seeds."""
    lines = []
    for high, low in pairwise(BANDS):
        own = [row for row in rows if low <= row["noise"] < high * 1.001]
        scores = [torch.tensor([row[name] for row in own]) for name in ("l_score", "s_score")]
        shown = [f"{float(value):.2f}" for each in scores for value in (each.square().mean().sqrt(), each.abs().max())]
        lines.append((f"{high:g} to {low or 0.002:g}", *shown))
    return markdown(("noise", "`l`", "", "`s`", ""), lines)
