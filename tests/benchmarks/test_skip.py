"""The study of the skip: ratios of steps, what is a bound, what foretells; every method differs from Euler's."""

from itertools import combinations

import pytest

from benchmarks.harness import Row, read
from benchmarks.skip import learnability, outcome
from benchmarks.skip.methods import BASELINE, DATASETS, DRAWS, GRID, JUMP_END, LONG, methods, plan
from benchmarks.skip.outcome import KEYS, Key

STEPS = (25, 50, 100, 200, 400)


def cell(method: str, seed: int, speed: float, at: float = 1.0) -> Row:
    """A student whose every measure is at/(speed steps)."""
    curve = [
        {"step": step, "measure": key.measure, "nfe": key.nfe, "value": at / (speed * step)}
        for step in STEPS
        for key in KEYS
    ]
    return {"dataset": "mixture", "method": method, "seed": seed, "curve": curve}


def pair(speed: float) -> list[Row]:
    return [cell(name, seed, own, 1 + seed) for seed in (0, 1, 2) for name, own in ((BASELINE, 1.0), ("fast", speed))]


@pytest.mark.parametrize("speed", [0.5, 1.0, 2.0, 4.0])
def test_a_ratio_is_how_many_times_faster_a_method_is(speed: float) -> None:
    found = outcome.compared(pair(speed), BASELINE, "fast", Key("sample", 2))
    assert found is not None
    assert found["ratio"] == pytest.approx(speed, rel=1e-6)
    assert (found["seeds"], found["bound"]) == (3, "")


def test_what_is_there_at_the_first_moment_is_a_bound() -> None:
    found = outcome.compared(pair(64.0), BASELINE, "fast", Key("frechet", 1))
    assert found is not None
    assert found["bound"] == ">"
    back = outcome.compared(pair(1 / 64), BASELINE, "fast", Key("frechet", 1))
    assert back is not None
    assert back["bound"] == "<"


def test_seeds_that_one_side_lacks_are_left_out() -> None:
    cells = [*pair(2.0), cell(BASELINE, 7, 100.0)]
    found = outcome.compared(cells, BASELINE, "fast", Key("sample", 1))
    assert found is not None
    assert found["seeds"] == 3
    assert outcome.compared(cells, BASELINE, "none", Key("sample", 1)) is None


def test_students_of_two_teachers_are_no_pairs() -> None:
    cells = [{"teacher": "a"}, {"teacher": "b"}]
    assert outcome.strangers([], "a") == outcome.strangers(cells[:1], "a") == ""
    assert outcome.strangers(cells, "a").startswith("this is teacher a, stored students have b: ")


def test_all_stored_students_of_a_data_set_have_one_teacher() -> None:
    stored = {(row["dataset"], row["teacher"]) for row in GRID.rows()}
    assert DATASETS.keys() <= {dataset for dataset, _ in stored}
    assert len(stored) == len({dataset for dataset, _ in stored})


def test_the_bar_is_bold_and_seconds_take_the_cost_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = [
        {"dataset": "mixture", "method": "fast", "ratio": 1.6},
        {"dataset": "mixture", "method": "fast, before the first step", "ratio": 20.0},
    ]
    monkeypatch.setattr(outcome, "read", lambda file: cost)
    rows = outcome.acceleration(pair(4.0), ("mixture",), {"mixture": [BASELINE, "fast"]}, BASELINE)
    assert len(rows) == len(KEYS)
    assert {row["method"] for row in rows} == {"fast"}
    euler = rows[0]["steps_euler"]
    assert rows[0]["seconds_ratio"] == pytest.approx(euler / (euler / 4.0 * 1.6 + 20.0))
    (line,) = outcome.summary(rows, [("mixture", "fast", BASELINE), ("digits", "fast", BASELINE)]).splitlines()[2:]
    assert line.count("**4.00 (4.00–4.00)**") == len(KEYS)
    assert line.endswith("| 1.60 | 20 | 3 |")
    few = outcome.acceleration(pair(4.0)[:4], ("mixture",), {"mixture": [BASELINE, "fast"]}, BASELINE)
    assert "**" not in outcome.summary(few, [("mixture", "fast", BASELINE)])


def test_what_foretells_is_ranked_over_methods() -> None:
    rows = [
        {"dataset": "mixture", "method": str(i), "against": BASELINE, "ratio": 1.0 + i, **key._asdict()}
        for i in range(5)
        for key in KEYS
    ]
    known = {("mixture", str(i)): {"rises": float(i), "falls": -float(i)} for i in range(5)}
    lines = outcome.foretold(rows, known).splitlines()
    assert lines[2].startswith("| rises | 1.00 (5) |")
    assert lines[3].startswith("| falls | -1.00 (5) |")


@pytest.mark.parametrize("dataset", [*DATASETS, *LONG])
def test_all_methods_train_something_else_for_as_long(dataset: str) -> None:
    """Euler's and every other differ in model, statistics, network or objective, and in nothing else."""
    found = list(methods(dataset).values())
    parts = [(config.model, config.statistics, config.network, config.objective) for config in found]
    assert all(one != other for one, other in combinations(parts, 2))
    rest = [(c.data, c.optimizer, c.training, c.teacher, c.initial) for c in found]
    assert all(each == rest[0] for each in rest)


def test_the_plan_has_each_cell_once_and_all_that_is_stored() -> None:
    cells = list(plan())
    assert len(set(cells)) == len(cells)
    assert {GRID.name(row) for rows in GRID.stored().values() for row in rows} <= GRID.cells().keys()
    assert {BASELINE, "regressed" + JUMP_END + DRAWS} <= {cell.method for cell in cells}
    assert all(row["form"] in learnability.forms(row["dataset"]) for row in read(learnability.FILE))
