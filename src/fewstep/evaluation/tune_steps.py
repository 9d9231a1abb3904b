"""Where a model's few steps are best placed: searched on one half of the held-out data, checked on the other.

The search minimises the Frechet distance to half A, every candidate from the same noise. What it finds is then drawn
from other noise and compared with the default on half B, which the search has not seen; it is kept only where it wins
there by more than that gain's standard error. Neither noise is the evaluation's.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.evaluation.evaluate import draw_features, sampler_settings
from fewstep.evaluation.metrics.fidelity import frechet_distance
from fewstep.evaluation.metrics.measure import ANYTHING, Asked, Evaluator
from fewstep.flow.paths import Path
from fewstep.flow.times import edm_grid
from fewstep.recipes.config import RunConfig
from fewstep.sampling.generate import SamplingSettings
from fewstep.sampling.pipeline import Pipeline
from fewstep.sampling.step_times import StepTimes, Tuned, TunedSteps, read_tuned_steps
from fewstep.training.run_folder import RunFolder
from fewstep.utils.device import best_device
from fewstep.utils.errors import CheckpointError, ConfigError, DataError
from fewstep.utils.files import updating
from fewstep.utils.random import permutation
from fewstep.utils.text import aligned, counted

Point = tuple[float, ...]
Objective = Callable[[Point], float]

_FINEST = 1 / 256  # of the unit clock: less moves a distance by no more than its noise
_TOLERANCE = 1e-3  # the share of its value that a move must gain, so that rounding never decides
_COARSE = 15  # candidates on the first grid of a single time
_MOST_STEPS = 8
_GROUPS = 10
_SMALLEST_HALF = 2 * _GROUPS
LEAST = 2 * _SMALLEST_HALF
"""Held-out samples that times can be tuned on."""


@dataclass(frozen=True)
class Found:
    """The best point of a search and its value, the first start's value, and the evaluations spent."""

    point: Point
    value: float
    first: float
    evaluations: int


class _Memo:
    """The objective, evaluated once a point; a point beyond the limit, or without a finite value, is worth infinity."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.limit = objective, 0
        self.values: dict[Point, float] = {}

    def __call__(self, point: Point) -> float:
        if point not in self.values:
            if len(self.values) >= self.limit:
                return math.inf
            value = self.objective(point)
            self.values[point] = value if math.isfinite(value) else math.inf
        return self.values[point]

    def better(self, point: Point, best: Point) -> Point:
        """The point, if it gains more than rounding could on the best so far; else the best so far."""
        return point if self(point) < (1 - _TOLERANCE) * self(best) else best


def search(objective: Objective, starts: Sequence[Point], evaluations: int) -> Found:
    """Minimise a distance (>= 0) over falling points 1 > u_1 > ... > u_n > 0, from starts, in so many evaluations.

    One coordinate: the best of an even grid of at most 15 and the starts is refined. Several: coordinate descent from
    each start in turn, the budget shared evenly. Steps halve from half a gap of the even grid down to 1/256; a move
    must gain a thousandth. Deterministic; the first start is returned unless another point is better by as much.
    """
    memo, n = _Memo(objective), len(starts[0])
    memo.limit = evaluations
    cells = min(_COARSE, evaluations // 2) if n == 1 else n
    grid = [(k / (cells + 1),) for k in range(1, cells + 1)] if n == 1 else []
    best = starts[0]
    for point in (*starts, *grid):
        best = memo.better(point, best)
    origins = [best] if n == 1 else list(dict.fromkeys(starts))
    for number, origin in enumerate(origins, start=1):
        memo.limit = max(len(memo.values), evaluations * number // len(origins))
        best = memo.better(_descend(memo, origin, 0.5 / (cells + 1)), best)
    return Found(best, memo(best), memo(starts[0]), len(memo.values))


def _descend(memo: _Memo, best: Point, step: float) -> Point:
    """Move one coordinate at a time while that helps, then by half the step, down to the finest."""
    while step >= _FINEST:
        before = best
        for i, move in itertools.product(range(len(best)), (step, -step)):
            point = (*best[:i], best[i] + move, *best[i + 1 :])
            if _ordered(point):
                best = memo.better(point, best)
        if best == before:
            step /= 2
    return best


def _ordered(point: Point) -> bool:
    return all(above - below >= _FINEST for above, below in itertools.pairwise((1.0, *point, 0.0)))


@dataclass(frozen=True)
class TuningPlan:
    """What is tuned, and at what cost. Raises ConfigError for what cannot be tuned."""

    steps: tuple[int, ...] = (2, 4)
    """Step counts, each tuned apart."""
    evaluations: int = 80
    """Placements tried for each step count; every one draws all samples."""
    samples: int = 2000
    """Samples drawn for each."""
    seed: int = 2000
    """Of the search's noise; the check's is the next."""

    def __post_init__(self) -> None:
        if 1 in self.steps:
            raise ConfigError("one step goes from t_max to t_min: there is nothing to place; tune 2 steps or more")
        if not self.steps or min(self.steps) < 2 or max(self.steps) > _MOST_STEPS:
            raise ConfigError(f"steps to tune are {list(self.steps)}: give counts from 2 to {_MOST_STEPS}")
        if len(set(self.steps)) < len(self.steps):
            raise ConfigError(f"steps to tune are {list(self.steps)}: give each count once")
        if self.evaluations < 4 or self.samples < _SMALLEST_HALF:
            raise ConfigError(
                f"{self.evaluations} evaluations of {self.samples} samples: a search needs at least 4 evaluations of "
                f"at least {_SMALLEST_HALF} samples"
            )

    def check_noise(self, evaluation_seed: int) -> None:
        """Raise ConfigError where evaluation would meet the noise that the times were chosen on."""
        if evaluation_seed in (self.seed, self.seed + 1):
            raise ConfigError(
                f"seed {self.seed} would tune on noise that evaluation measures with (seed {evaluation_seed}; the "
                f"tuning uses {self.seed} and {self.seed + 1}): give another --seed"
            )


def split_in_halves(evaluator: Evaluator) -> tuple[Tensor, Tensor]:
    """Features (n, d) of the halves A and B of the held-out samples, by an order that depends on their number alone.

    Raises DataError when there are too few.
    """
    middle = len(evaluator.features) // 2
    if middle < _SMALLEST_HALF:
        raise DataError(
            f"{evaluator.name} has {counted(len(evaluator.features), 'sample')}: tuning needs at least {LEAST}, half "
            "to search on and half to check with"
        )
    order = permutation(0, 0, len(evaluator.features))
    return evaluator.features[order[:middle]], evaluator.features[order[middle:]]


@dataclass(frozen=True)
class Distances:
    """Frechet distances to one half of the held-out samples, both placements drawn from the same noise."""

    half: str
    heldout: int
    seed: int
    default: float
    tuned: float

    @property
    def gain(self) -> float:
        """By how much the tuned placement's distance is smaller."""
        return self.default - self.tuned


@dataclass(frozen=True)
class Tuning:
    """What was found for one number of steps.

    search: on half A, which chose the times. check: on half B, the figures that count. gain_error: standard error of
    the check's gain. evaluations: placements tried.
    """

    tuned: StepTimes
    default_times: tuple[float, ...]
    search: Distances
    check: Distances
    gain_error: float
    samples: int
    evaluations: int
    extractor: str

    @property
    def kept(self) -> bool:
        """Whether the tuned times win on half B, beyond the error of their gain."""
        return self.tuned.times != self.default_times and self.check.gain > self.gain_error

    def record(self) -> Tuned:
        """As it is stored."""
        figures = asdict(self) | {"gain": self.check.gain}
        return Tuned(self.tuned, self.kept, {key: value for key, value in figures.items() if key != "tuned"})


def tune(
    pipeline: Pipeline,
    settings: SamplingSettings,
    evaluator: Evaluator,
    plan: TuningPlan,
    asked: Asked = ANYTHING,
) -> Tuning:
    """Search the times between t_max and t_min for these settings' sampler and steps, and check what is found.

    The settings' own placement is the default. asked: of the plan's samples (`Evaluator.asked`). Raises DataError
    for too few held-out samples, ShapeError where the model's samples are not finite.
    """
    half, other = split_in_halves(evaluator)
    default = tuple(settings.grid(pipeline.flow_map.path).tolist())

    def features(times: Point, seed: int) -> Tensor:
        placed = replace(settings, times=times, seed=seed)
        return draw_features(pipeline, plan.samples, placed, evaluator.extractor, asked)[1]

    def distance(times: Point) -> float:
        drawn = features(times, plan.seed)
        return frechet_distance(drawn, half) if bool(drawn.isfinite().all()) else math.inf

    found, times = _search_times(distance, pipeline.flow_map.path, default, plan.evaluations)
    search = Distances("A", len(half), plan.seed, found.first, found.value)
    before, after = (features(each, plan.seed + 1) for each in (default, times))
    first, last = (frechet_distance(each, other) for each in (before, after))
    check = Distances("B", len(other), plan.seed + 1, first, last)
    sampler, gamma, guidance_scale, _ = settings.purpose
    source = (
        f"half A ({len(half)} of {len(evaluator.features)}) of {evaluator.name}, noise of seed {plan.seed}; Frechet "
        f"distance to half B {first:.4g} -> {last:.4g} in the features of {evaluator.extractor.name}"
    )
    return Tuning(
        tuned=StepTimes(sampler, gamma, guidance_scale, times, source),
        default_times=default,
        search=search,
        check=check,
        gain_error=gain_error(before, after, other),
        samples=plan.samples,
        evaluations=found.evaluations,
        extractor=evaluator.extractor.name,
    )


def _search_times(distance: Objective, path: Path, default: Point, evaluations: int) -> tuple[Found, Point]:
    """The search on the path's unit clock from the default and from EDM's spacing; the times that it found."""
    start, other = (_fractions(path, times) for times in (default, edm_grid(path, len(default) - 1).tolist()))

    def times_at(point: Point) -> Point:
        """From t_max through fractions of the unit clock to t_min."""
        inner = path.time_from_unit(torch.tensor(point, dtype=torch.float64))
        return default if point == start else (path.t_max, *inner.tolist(), path.t_min)

    with tqdm(total=evaluations, desc=f"{len(default) - 1} steps", disable=None, leave=False) as bar:

        def shown(point: Point) -> float:
            bar.update()
            return distance(times_at(point))

        found = search(shown, (start, other), evaluations)
    return found, times_at(found.point)


def _fractions(path: Path, times: Sequence[float]) -> Point:
    """The unit clock at the inner times, to a billionth."""
    cells = range(10**9)

    def time(cell: int) -> float:
        return float(path.time_from_unit(torch.tensor(cell / len(cells), dtype=torch.float64)))

    return tuple(bisect.bisect_left(cells, each, key=time) / len(cells) for each in times[1:-1])


def gain_error(default: Tensor, tuned: Tensor, real: Tensor) -> float:
    """Standard error of the fall in Frechet distance to `real` (m, d) from `default` to `tuned`, both (n, d).

    By the jackknife over ten groups (Tukey 1958): each leaves out a tenth of the real features and the samples of a
    tenth of the noise, the same for both, since what they share moves both distances alike.
    """
    gains = []
    for group in range(_GROUPS):
        a, b, rest = (_without(group, each) for each in (default, tuned, real))
        gains.append(frechet_distance(a, rest) - frechet_distance(b, rest))
    found = torch.tensor(gains, dtype=torch.float64)
    return float(((_GROUPS - 1) * found.var(correction=0)).sqrt())


def _without(group: int, features: Tensor) -> Tensor:
    """All but one of ten runs of neighbours: any run of samples has the classes in their shares (`classes_like`)."""
    return features[torch.arange(len(features)) * _GROUPS // len(features) != group]


def tune_run(
    run: RunFolder, config: RunConfig, evaluator: Evaluator, plan: TuningPlan
) -> tuple[list[Tuning], CheckpointError | None]:
    """Tune the newest checkpoint for each number of steps, and store each in RUN/step_times.json as it is found.

    config: the run's own, its evaluation as it is to be tuned for. What was tuned for the same checkpoint and another
    purpose stays there, what was tuned for another checkpoint goes. What kept them from being stored is returned too,
    so that no search is lost. Raises what `tune` raises, CheckpointError when the run has no checkpoint or a file of it
    is damaged.
    """
    pipeline, step = run.model().to(best_device()), run.state()["step"]
    asked = evaluator.asked(pipeline.flow_map, plan.samples, config.evaluation)
    read_tuned_steps(run.root)  # what is damaged is said before the search
    found: list[Tuning] = []
    unstored: CheckpointError | None = None
    for settings in sampler_settings(config, plan.steps):
        found.append(tune(pipeline, settings, evaluator, plan, asked))
        try:
            with updating(run.root):
                stored = read_tuned_steps(run.root)
                kept = stored if stored is not None and stored.step == step else TunedSteps(step)
                kept.adding(found[-1].record()).write(run.root)
        except CheckpointError as error:
            unstored = error
    return found, unstored


def format_table(found: Sequence[Tuning]) -> str:
    """The times and distances as aligned text: default -> tuned."""
    rows: list[tuple[str, ...]] = [("steps", "half A (searched)", "half B (check)", "gain on B", "", "times")]
    for each in found:
        pairs = (f"{distances.default:.3f} -> {distances.tuned:.3f}" for distances in (each.search, each.check))
        gain = f"{each.check.gain:.3f} ± {each.gain_error:.3f}"
        placed = (" ".join(f"{t:.4g}" for t in times) for times in (each.default_times, each.tuned.times))
        verdict = "kept" if each.kept else "not kept"
        rows.append((str(each.tuned.steps), *pairs, gain, verdict, " -> ".join(dict.fromkeys(placed))))
    note = f"Frechet distance, {found[0].samples} samples, in the features of {found[0].extractor}: default -> tuned."
    return f"{aligned(rows, left=len(rows[0]))}\n{note}"
