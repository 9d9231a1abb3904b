"""The acceleration study's table: what is compared, and what the ratio is."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep as fs
from benchmarks.acceleration import __main__ as tables
from benchmarks.acceleration import students
from benchmarks.acceleration.students import GRID, Walks
from fewstep.flow.paths import EDM, Linear
from fewstep.networks.condition import Condition
from fewstep.training import train_run
from tests.support.tiny import RUNTIME, TEACHER, student


def cell(method: str, seed: int, pace: float, measures: tuple[str, ...] = ("sample", "frechet")) -> dict[str, Any]:
    """A student whose values fall as 2^(-step/pace)."""
    curve = [
        {"step": step, "measure": measure, "nfe": 2, "value": 2.0 ** (-step / pace)}
        for step in (100, 200, 400)
        for measure in measures
    ]
    return {"dataset": "digits", "method": method, "seed": seed, "batch": 128, "curve": curve}


def compare(cells: list[dict[str, Any]], method: str = "analytic", baseline: str = "euler") -> Any:
    return tables.compare(cells, baseline, method, "sample", 2)


def test_the_ratio_is_of_steps_over_the_seeds_of_both() -> None:
    """Curves whose halving takes 100 and 50 steps: to the slower one's end in 400 and 200."""
    cells = [cell("euler", seed, 100) for seed in (0, 1, 2)] + [cell("analytic", seed, 50) for seed in (0, 1)]
    found = compare(cells)
    assert found["ratio"] == pytest.approx(2)
    assert found["final"] == pytest.approx([2.0**-4, 2.0**-8])
    assert tables.ratio(found) == "2.00 (2.00–2.00)"
    single = compare([*cells, cell("analytic, raw", 0, 100)], "analytic, raw", "analytic")
    assert single["ratio"] == pytest.approx(0.5)
    assert single["low"] is None
    assert tables.ratio(single) == "0.50"


def test_what_a_method_lacks_and_a_run_without_a_finite_end_have_no_ratio() -> None:
    broken = cell("analytic", 0, 50)
    broken["curve"][-2]["value"] = math.nan
    assert compare([cell("euler", 0, 100), broken]) is None
    assert compare([cell("euler", 0, 100), cell("analytic", 0, 50, ("frechet",))]) is None
    assert compare([cell("euler", 0, 100), cell("analytic", 1, 50)]) is None


def test_a_run_that_is_at_the_target_from_its_first_moment_has_no_ratio() -> None:
    quick = cell("analytic", 0, 1000)
    for row in quick["curve"]:
        row["value"] = 0.01
    found = compare([cell("euler", 0, 100), quick])
    assert found["at_start"] == 1
    assert [found[key] for key in ("ratio", "low", "high")] == [None] * 3
    assert found["final"][1] == 0.01
    assert tables.ratio(found) == "–"


def test_jumps_to_levels_in_between_are_one_measure() -> None:
    """The root mean square of those that stop above the data end."""
    curve = [
        {"step": 1, "measure": f"jump 80 -> {end}", "nfe": 1, "value": value}
        for end, value in (("1.9", 3.0), ("0.59", 4.0), ("0.002", 100.0))
    ]
    cells = [{"dataset": "digits", "method": "euler", "seed": 0, "curve": curve}]
    (found,) = tables.curves(cells, "euler", *tables.BETWEEN).values()
    assert found == [(1, pytest.approx(12.5**0.5))]


def test_stored_cells_are_found_again() -> None:
    assert len(GRID.rows()) == sum(map(len, GRID.stored().values())) > 60


def test_walks_that_are_drawn_alike_are_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others in their start, their ends, their grid, solver or path, or under a condition are walked anew."""
    walked: list[Tensor] = []

    def walk(steps: Any, flow_map: Any, x: Tensor, *others: Any) -> Tensor:
        walked.append(x)
        return x + len(walked)

    monkeypatch.setattr(fs.TeacherSteps, "walk", walk)
    x, n, k = torch.randn(3, 2), torch.tensor([0, 1, 2]), torch.tensor([4, 3, 3])
    steps: Any = fs.TeacherSteps()
    free, labelled = Condition(), Condition(labels=torch.zeros(3, dtype=torch.int64))
    walks, student = Walks(), SimpleNamespace(path=EDM())
    with walks.shared():
        first = steps.walk(student, x, n, k, free, None)
        assert first.equal(x + 1)
        first.zero_()
    with walks.shared():
        assert steps.walk(student, x, n, k, free, None).equal(x + 1)
        assert len(walked) == 1
        for other in ((x + 1, n, k, free), (x, n + 1, k, free), (x, n, k + 1, free), (x, n, k, labelled)):
            steps.walk(student, *other, None)
        changed: Any
        for changed in (fs.TeacherSteps(solver="euler"), fs.TeacherSteps(points=19)):
            changed.walk(student, x, n, k, free, None)
        steps.walk(SimpleNamespace(path=Linear()), x, n, k, free, None)
    assert len(walked) == 8


def test_a_student_of_shared_walks_is_trained_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two forms under the same seed the second walks not at all."""
    digits = fs.load_dataset(unlabelled := fs.DataConfig(labels=False))
    train_run(replace(TEACHER, data=unlabelled), digits, fs.RunFolder(folder := tmp_path / "teacher"), RUNTIME)
    truth: Any = SimpleNamespace(plan=SimpleNamespace(moments=(2, 4)), dataset=digits, teacher=fs.load(folder).flow_map)
    anew, walked = fs.TeacherSteps.walk, []

    def walk(*arguments: Any) -> Tensor:
        walked.append(arguments)
        return anew(*arguments)

    def weights(model: fs.FlowMap, *_: Any) -> list[dict[str, Any]]:
        return [{name: value.clone() for name, value in model.state_dict().items()}]

    monkeypatch.setattr(fs.TeacherSteps, "walk", walk)
    monkeypatch.setattr(students, "measure", weights)
    walks, forms = Walks(), [replace(student(kind, folder), data=unlabelled) for kind in ("ctm", "ctm-skip")]
    curves, counts = [], []
    for kept in (None, walks):
        for form in forms:
            curves.append(students.train_student(form, 3, folder, truth, kept)["curve"])
            counts.append(len(walked))
    assert counts == [4, 8, 12, 12]
    torch.testing.assert_close(curves[2:], curves[:2], rtol=0, atol=0)
