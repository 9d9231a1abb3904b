"""Placing few steps: the search on known functions, honest halves, exact maps that leave nothing to tune."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fewstep.evaluation.metrics.features import IdentityExtractor
from fewstep.evaluation.metrics.fidelity import frechet_distance
from fewstep.evaluation.metrics.measure import Evaluator
from fewstep.evaluation.tune_steps import Point, TuningPlan, format_table, gain_error, search, split_in_halves, tune
from fewstep.flow.closed_form import GaussianData, GaussianOutput
from fewstep.flow.flow_map import FlowMap, FlowMapConfig
from fewstep.flow.paths import EDM, VP, Linear, Path, Trig
from fewstep.flow.preconditioning.base import Preconditioning
from fewstep.flow.preconditioning.jumps import EulerPreconditioning, LinearPreconditioning
from fewstep.flow.preconditioning.network_scaling import IdentityScaling
from fewstep.flow.times import edm_grid, uniform_grid
from fewstep.networks.base import Network
from fewstep.networks.condition import Condition
from fewstep.networks.mlp import MLPConfig
from fewstep.sampling.generate import SamplingSettings, generate
from fewstep.sampling.pipeline import Pipeline, load_pipeline
from fewstep.sampling.step_times import TIMES_FILE, StepTimes, Tuned, TunedSteps, read_tuned_steps
from fewstep.utils.errors import CheckpointError, ConfigError, DataError, ShapeError
from fewstep.utils.random import Draws

SD = 0.6
PATHS: dict[str, Path] = {"edm": EDM(), "linear": Linear(), "trig": Trig(SD), "vp": VP()}
STARTS = {
    1: ((0.5,), (0.71,)),
    2: ((2 / 3, 1 / 3), (0.9, 0.2)),
    3: ((0.75, 0.5, 0.25), (0.94, 0.71, 0.14)),
}


def bowl(centre: Point) -> Callable[[Point], float]:
    """A distance that is least, 1, at the centre."""
    return lambda point: 1 + 20 * sum((u - c) ** 2 for u, c in zip(point, centre, strict=True))


@given(u=st.floats(0.02, 0.98))
def test_one_time_is_found(u: float) -> None:
    found = search(bowl((u,)), STARTS[1], 40)
    assert found.point[0] == pytest.approx(u, abs=0.01)
    assert found.evaluations <= 30


@given(st.lists(st.floats(0.05, 0.95), min_size=3, max_size=3).map(lambda us: sorted(us, reverse=True)))
def test_three_times_are_found(centre: list[float]) -> None:
    """Where the best place is in order with room between its times: within the finest step of it, each."""
    gaps = [a - b for a, b in itertools.pairwise(centre)]
    if min(gaps) < 0.02:
        return
    found = search(bowl(tuple(centre)), STARTS[3], 200)
    assert found.point == pytest.approx(centre, abs=0.015)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 3), evaluations=st.integers(1, 60))
def test_any_search_keeps_its_promises(seed: int, n: int, evaluations: int) -> None:
    """On a rough function: ordered, within bounds, within its budget, never worse than any start, the same again."""
    generator = torch.Generator().manual_seed(seed)
    waves, phases = (20 * torch.rand(n, generator=generator), 6 * torch.rand(n, generator=generator))
    asked: list[Point] = []

    def rough(point: Point) -> float:
        asked.append(point)
        return float(2 + (waves * torch.tensor(point) + phases).sin().sum() / n)

    found = search(rough, STARTS[n], evaluations)
    assert len(asked) == len(set(asked)) == found.evaluations <= evaluations
    for point in asked:
        assert all(above - below > 1 / 300 for above, below in itertools.pairwise((1.0, *point, 0.0)))
    assert found.first == rough(STARTS[n][0])
    assert found.value == rough(found.point) <= found.first
    assert found == search(rough, STARTS[n], evaluations)


@pytest.mark.parametrize("n", STARTS)
def test_rounding_moves_nothing(n: int) -> None:
    """Differences far below the value itself leave the first start as it is; so does a function without values."""
    found = search(lambda point: 5 + 1e-6 * math.sin(1e4 * sum(point)), STARTS[n], 50)
    assert found.point == STARTS[n][0]
    for nothing in (math.nan, math.inf):
        assert search(lambda point, nothing=nothing: nothing, STARTS[n], 50).point == STARTS[n][0]  # type: ignore[misc]


def test_a_start_without_a_value_is_left() -> None:
    found = search(lambda point: math.inf if point == (0.5,) else abs(point[0] - 0.2) + 1, ((0.5,),), 30)
    assert found.first == math.inf
    assert found.point[0] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": (1,)}, r"nothing to place"),
        ({"steps": (4, 1)}, r"nothing to place"),
        ({"steps": ()}, r"from 2 to 8"),
        ({"steps": (0,)}, r"\[0\]: give counts from 2"),
        ({"steps": (-2, 2)}, r"give counts from 2"),
        ({"steps": (9,)}, r"from 2 to 8"),
        ({"steps": (2, 4, 2)}, r"each count once"),
        ({"evaluations": 3}, r"at least 4 evaluations"),
        ({"samples": 19}, r"at least 20 samples"),
    ],
)
def test_what_cannot_be_tuned(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TuningPlan(**wrong)  # type: ignore[arg-type]


def test_evaluation_keeps_its_noise() -> None:
    TuningPlan(seed=7).check_noise(6)
    TuningPlan(seed=7).check_noise(9)
    for seed in (7, 8):
        with pytest.raises(ConfigError, match=r"give another --seed"):
            TuningPlan(seed=7).check_noise(seed)


def test_halves_share_no_sample() -> None:
    features = torch.arange(2 * 101, dtype=torch.float64).reshape(101, 2)
    reference = Evaluator("numbers", features, None, IdentityExtractor((1, 1, 2)))
    a, b = split_in_halves(reference)
    assert (len(a), len(b)) == (50, 51)
    together = torch.cat([a, b])
    assert torch.equal(together.sort(dim=0).values, features)
    assert not torch.equal(together, features)
    assert torch.equal(a, split_in_halves(reference)[0])
    with pytest.raises(DataError, match=r"numbers has 39 samples: tuning needs at least 40"):
        split_in_halves(replace(reference, features=features[:39]))


def test_the_error_of_a_gain_is_its_spread() -> None:
    """Against the standard deviation of the gain over fresh samples and fresh real data."""
    gains, errors = [], []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        noise, real = (torch.randn(200, 2, dtype=torch.float64, generator=generator) for _ in range(2))
        before, after = noise + 0.5, 1.2 * noise + 0.3
        errors.append(gain_error(before, after, real))
        gains.append(frechet_distance(before, real) - frechet_distance(after, real))
    spread = float(torch.tensor(gains).std())
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.3)
    assert gain_error(before, before, real) == 0


class Exact(Network):
    """The exact network of Gaussian data of shape (1, 1, 2)."""

    def __init__(self, path: Path, preconditioning: Preconditioning) -> None:
        super().__init__((1, 1, 2), 0, False)
        self.output = GaussianOutput(GaussianData(torch.tensor(0.5), SD), path, preconditioning)
        self.place = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        found: Tensor = self.output(x, t, s)
        return found.to(x.dtype)


def exact_map(path: Path) -> FlowMap:
    preconditioning = EulerPreconditioning(path)
    return FlowMap(path, preconditioning, Exact(path, preconditioning))


def evaluator(count: int = 400) -> Evaluator:
    """Held-out samples of the Gaussian, measured by their values."""
    x0 = 0.5 + SD * Draws(3, 0, torch.arange(count)).normal(0, (2,), torch.float64)
    return Evaluator("a Gaussian", x0, None, IdentityExtractor((1, 1, 2)))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("steps", [2, 4])
def test_an_exact_map_keeps_its_default(path: Path, steps: int) -> None:
    """Every placement of an exact map gives the same samples: there is nothing to win, and nothing is moved."""
    spacing = "edm" if path == EDM() else "uniform"
    plan = TuningPlan(samples=200, evaluations=16)
    found = tune(Pipeline(exact_map(path)), SamplingSettings(steps=steps, spacing=spacing), evaluator(100), plan)  # type: ignore[arg-type]
    assert found.tuned.times == found.default_times
    assert (found.check.gain, found.gain_error, found.kept) == (0, 0, False)
    assert found.search.tuned == found.search.default
    assert found.evaluations <= 16


def euler_scale(middle: float) -> float:
    """What two steps of Euler's method on the Gaussian's ODE multiply the noise by: 1 + h v(t)/(x - alpha m) each."""

    def rate(t: float) -> float:
        return (-(1 - t) * SD**2 + t) / ((1 - t) ** 2 * SD**2 + t**2)

    return (1 - (1 - middle) * rate(1.0)) * (1 - middle * rate(middle))


def test_a_solver_is_placed_where_theory_says() -> None:
    """The two-step Euler samples' deviation is closest to the data's at a time in closed form; the gain is real."""
    plan, settings = TuningPlan(samples=2000, evaluations=40), SamplingSettings("euler", 2, spacing="uniform")
    found = tune(Pipeline(exact_map(Linear())), settings, evaluator(2000), plan)
    best = min((k / 1000 for k in range(20, 981)), key=lambda middle: abs(euler_scale(middle) - SD))
    assert found.default_times == (1.0, 0.5, 0.0)
    assert found.tuned.times[1] == pytest.approx(best, abs=0.03)
    assert found.kept
    assert found.check.gain > 5 * found.gain_error
    assert found.tuned.purpose == ("euler", 0.0, 1.0, 2)
    assert "half A (1000 of 2000) of a Gaussian, noise of seed 2000" in found.tuned.source
    assert "kept" in format_table([found])
    assert found == tune(Pipeline(exact_map(Linear())), settings, evaluator(2000), plan)


def test_each_half_is_measured_from_its_own_noise() -> None:
    held, settings = evaluator(100), SamplingSettings("euler", 2, spacing="uniform")
    found = tune(Pipeline(exact_map(Linear())), settings, held, TuningPlan(samples=50, evaluations=8, seed=5))
    halves = zip("AB", split_in_halves(held), (found.search, found.check), (5, 6), strict=True)
    for name, half, distances, seed in halves:
        assert (distances.half, distances.heldout, distances.seed) == (name, 50, seed)
        for times, value in ((found.default_times, distances.default), (found.tuned.times, distances.tuned)):
            placed = replace(settings, times=times, seed=seed)
            samples = generate(exact_map(Linear()), 50, placed).samples.flatten(1).double()
            assert value == frechet_distance(samples, half)


def test_only_a_gain_beyond_its_error_is_kept() -> None:
    settings = SamplingSettings("euler", 2, spacing="uniform")
    found = tune(Pipeline(exact_map(Linear())), settings, evaluator(100), TuningPlan(samples=50, evaluations=8))
    for gain, kept in ((0.21, True), (0.19, False), (-0.5, False)):
        check = replace(found.check, default=1.0, tuned=1.0 - gain)
        assert replace(found, check=check, gain_error=0.2).kept is kept
    same = replace(found.tuned, times=found.default_times)
    assert not replace(found, tuned=same, check=replace(found.check, default=1.0, tuned=0.0), gain_error=0.2).kept


def test_gamma_sampling_is_tuned_for_its_gamma() -> None:
    settings = SamplingSettings("gamma", 2, gamma=0.5, spacing="uniform")
    found = tune(Pipeline(exact_map(Linear())), settings, evaluator(100), TuningPlan(samples=50, evaluations=8))
    assert found.tuned.purpose == ("gamma", 0.5, 1.0, 2)
    assert replace(settings, spacing="auto").tuned((found.tuned,)) == found.tuned


class Broken(Exact):
    """Samples without numbers."""

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition | None = None) -> Tensor:
        return torch.full_like(x, math.nan)


def test_a_model_without_finite_samples_is_refused() -> None:
    path = Linear()
    flow_map = FlowMap(path, LinearPreconditioning(), Broken(path, LinearPreconditioning()))
    with pytest.raises(ShapeError, match="NaN"):
        tune(Pipeline(flow_map), SamplingSettings(steps=2), evaluator(60), TuningPlan(samples=40, evaluations=4))


KNOWN = (
    StepTimes("map", 0.0, 1.0, (1.0, 0.3, 0.0), "tests"),
    StepTimes("gamma", 0.5, 1.0, (1.0, 0.6, 0.0), "tests"),
    StepTimes("map", 0.0, 2.0, (1.0, 0.8, 0.0), "tests"),
)


@pytest.mark.parametrize(
    ("settings", "middle"),
    [
        (SamplingSettings(), 0.3),
        (SamplingSettings(gamma=0.5), 0.3),
        (SamplingSettings("gamma", gamma=0.0), 0.3),
        (SamplingSettings("gamma", gamma=0.5), 0.6),
        (SamplingSettings("gamma", gamma=0.7), 0.5),
        (SamplingSettings("euler"), 0.5),
        (SamplingSettings(guidance_scale=2.0), 0.8),
        (SamplingSettings(guidance_scale=2.0, interval=(0.2, 0.9)), 0.5),
        (SamplingSettings(guidance_scale=1.0, interval=(0.2, 0.9)), 0.3),
        (SamplingSettings(guidance_scale=1.5), 0.5),
        (SamplingSettings(spacing="uniform"), 0.5),
        (SamplingSettings(spacing="edm"), float(edm_grid(Linear(), 2)[1])),
        (SamplingSettings(times=(1.0, 0.4, 0.0)), 0.4),
        (SamplingSettings(times=(1.0, 0.4, 0.0), spacing="auto"), 0.4),
    ],
)
def test_known_times_serve_their_own_purpose_alone(settings: SamplingSettings, middle: float) -> None:
    assert settings.grid(Linear(), KNOWN).tolist() == [1.0, middle, 0.0]


def test_other_step_counts_and_no_known_times_keep_the_default() -> None:
    assert torch.equal(SamplingSettings(steps=3).grid(Linear(), KNOWN), uniform_grid(Linear(), 3))
    assert torch.equal(SamplingSettings(steps=3).grid(EDM()), edm_grid(EDM(), 3))
    assert torch.equal(SamplingSettings(steps=3, spacing="uniform").grid(EDM()), uniform_grid(EDM(), 3))


def test_samples_are_drawn_at_the_known_times() -> None:
    flow_map = exact_map(Linear())
    settings = SamplingSettings("euler", 2)
    plain = generate(flow_map, 3, settings).samples
    known = StepTimes("euler", 0.0, 1.0, (1.0, 0.3, 0.0), "tests")
    tuned = generate(Pipeline(flow_map).with_step_times((known,)), 3, settings).samples
    assert torch.equal(tuned, generate(flow_map, 3, replace(settings, times=(1.0, 0.3, 0.0))).samples)
    assert torch.equal(plain, generate(flow_map, 3, replace(settings, spacing="uniform")).samples)
    assert not torch.equal(tuned, plain)


@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.5, 0.5, 0.0), (0.0, 1.0)])
def test_times_that_do_not_fall(times: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="and fall"):
        StepTimes("map", 0.0, 1.0, times, "")


def small_map() -> FlowMap:
    network = MLPConfig(width=8, depth=1, embedding_width=8)
    return FlowMapConfig(Linear(), LinearPreconditioning(), IdentityScaling(), network, (1, 2, 2)).build()


def test_times_travel_with_the_model(tmp_path: FilePath) -> None:
    pipeline = Pipeline(small_map()).with_step_times(KNOWN)
    pipeline.save(tmp_path / "saved")
    loaded = load_pipeline(tmp_path / "saved")
    assert loaded.step_times == KNOWN
    loaded.with_step_times(()).save(tmp_path / "saved")  # in the same place: nothing of the old times is left
    assert load_pipeline(tmp_path / "saved").step_times == ()


@pytest.mark.parametrize("damage", [{}, [{"times": [1, 0]}], [{"sampler": "best"}]])
def test_damaged_times_of_a_model_are_named(damage: object, tmp_path: FilePath) -> None:
    Pipeline(small_map()).save(tmp_path)
    file = tmp_path / "config.json"
    record = json.loads(file.read_text())
    record["pipeline"]["step_times"] = damage
    file.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"config\.json: pipeline\.step_times"):
        load_pipeline(tmp_path)


def test_what_was_found_is_kept_by_purpose(tmp_path: FilePath) -> None:
    assert read_tuned_steps(tmp_path) is None
    first, second = (Tuned(each, True, {"samples": 9}) for each in KNOWN[:2])
    stored = TunedSteps(10).adding(first).adding(second)
    stored.write(tmp_path)
    assert read_tuned_steps(tmp_path) == stored
    assert stored.step_times == KNOWN[:2]
    again = stored.adding(replace(first, kept=False))
    assert again.step_times == KNOWN[1:2]
    assert len(again.found) == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"step": 1}', '{"step": 1, "found": [{"kept": true}]}', '{"found": 3}'])
def test_a_damaged_file_is_named(text: str, tmp_path: FilePath) -> None:
    (tmp_path / TIMES_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"step_times\.json is damaged .* delete it"):
        read_tuned_steps(tmp_path)
