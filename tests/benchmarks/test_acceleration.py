"""The acceleration study's table: what is compared with what, under which keys, and what the ratio is."""

import math
from typing import Any

import pytest

from benchmarks.acceleration import tables
from benchmarks.acceleration.students import GRID


def cell(method: str, seed: int, pace: float, measures: tuple[str, ...] = ("sample", "frechet")) -> dict[str, Any]:
    """A student whose values fall as 2^(-step/pace)."""
    curve = [
        {"step": step, "measure": measure, "nfe": 2, "value": 2.0 ** (-step / pace)}
        for step in (100, 200, 400)
        for measure in measures
    ]
    return {"dataset": "digits", "method": method, "seed": seed, "batch": 128, "curve": curve}


def test_every_ablation_is_compared_with_what_it_changes() -> None:
    names = ["analytic", "euler", "analytic, raw", "CD, multistep", "euler, adversarial", "analytic, adversarial"]
    assert set(tables.pairs(names)) == {
        ("euler", "analytic"),
        ("CD, multistep", "analytic"),
        ("CD, multistep", "euler"),
        ("analytic", "analytic, raw"),
        ("euler", "analytic, raw"),
        ("euler", "euler, adversarial"),
        ("euler, adversarial", "analytic, adversarial"),
        ("analytic", "analytic, adversarial"),
    }
    assert tables.pairs(["analytic, raw", "euler"]) == [("euler", "analytic, raw")]


def test_rows_have_the_ratio_of_steps_and_the_keys_of_their_pair() -> None:
    """Curves whose halving takes 100 and 50 steps: to the slower one's end in 400 and 200."""
    cells = [cell("euler", seed, 100) for seed in (0, 1, 2)] + [cell("analytic", seed, 50) for seed in (0, 1)]
    cells += [cell("analytic, raw", 0, 100, ("frechet",))]
    rows = tables.comparisons(cells)
    main = {row["measure"]: row for row in rows if row["method"] == "analytic"}
    assert set(main) == {"sample", "frechet"}
    assert main["sample"]["ratio"] == pytest.approx(2)
    assert (main["sample"]["steps_euler"], main["sample"]["steps_analytic"]) == pytest.approx((400, 200))
    assert {"dataset", "measure", "nfe", "ratio", "low", "high", "seeds"} <= main["sample"].keys()
    assert main["sample"]["seeds"] == 2
    (raw,) = (row for row in rows if (row["method"], row["baseline"]) == ("analytic, raw", "analytic"))
    assert (raw["measure"], raw["ratio"]) == ("frechet", pytest.approx(0.5))
    assert (raw["steps_baseline"], raw["steps_method"]) == pytest.approx((200, 400))
    assert raw["low"] is None
    assert "0.50" in tables.line(raw)


def test_a_run_that_ends_without_a_finite_value_has_no_ratio() -> None:
    broken = cell("analytic", 0, 50)
    broken["curve"][-1]["value"] = math.nan
    assert [row["measure"] for row in tables.comparisons([cell("euler", 0, 100), broken])] == ["sample"]


def test_a_run_that_is_at_the_target_from_its_first_moment_has_no_ratio() -> None:
    quick = cell("analytic", 0, 1000)
    for row in quick["curve"]:
        row["value"] = 0.01
    (row, _) = tables.comparisons([cell("euler", 0, 100), quick])
    assert row["at_start"] == 1
    assert [row[key] for key in ("ratio", "low", "high")] == [None] * 3
    assert row["final_analytic"] == 0.01
    assert "None" not in tables.line(row)


def test_stored_cells_are_found_again() -> None:
    assert GRID.rows() == GRID.store.rows()
    assert len(GRID.store.names()) == len(GRID.rows()) > 60
