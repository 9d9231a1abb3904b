"""The study of policies: what its tables say of known episodes, which cells are taken for done, their settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import policies  # noqa: E402
import policies_summary  # noqa: E402
from fewstep.data.demonstrations.episodes import Demonstrations, save_demonstrations  # noqa: E402
from fewstep.policies.rollout import wilson  # noqa: E402


def row(method: str, steps: int, seed: int, successes: int, **more: Any) -> dict[str, Any]:
    known = {
        "task": "ring", "method": method, "steps": steps, "seed": seed, "success": successes / 50, "episodes": 50,
        "successes": successes, "latency_ms": 2.0 if steps else None, "mean_steps": 40.0 + seed, "score": 0.5,
        "routes": {"left": 10 + seed, "right": 5}, "errors": [], "seconds": 1.0,
    }  # fmt: skip
    return known | more


ROWS = [
    row("iSD", 1, 0, 40), row("iSD", 1, 1, 44), row("flow matching", 1, 0, 20), row("flow matching", 16, 0, 45),
    row("expert", 0, 0, 50, demonstrations=100, steps_shown=4000, tried=103),
]  # fmt: skip


def test_the_table_pools_the_seeds() -> None:
    text = policies_summary.section("ring", ROWS)
    assert "100 demonstrations of 4,000 steps, from 103 episodes of the expert." in text
    names = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("|")][2:]
    assert names == ["expert", "flow matching", "flow matching", "iSD"]
    low, high = wilson(84, 100)
    (line,) = [line for line in text.splitlines() if line.startswith("| iSD ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["iSD", "1", "40, 44", "84 / 100", f"{low:.2f}–{high:.2f}", "40", "0.50", "10, 11", "5, 5", "2.0"]


def test_everything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "policies.md"
    page.write_text(f"before\n{policies_summary.BEGIN}\nold\n{policies_summary.END}\nafter\n")
    monkeypatch.setattr(policies_summary, "PAGE", page)
    monkeypatch.setattr(policies_summary, "FIGURE", tmp_path / "policies.png")
    policies_summary.summarise(ROWS, tmp_path)
    stored = json.loads((tmp_path / "policies.json").read_text())
    assert [(each["method"], each["success"]) for each in stored][:2] == [("iSD", 0.8), ("iSD", 0.88)]
    assert {"task", "method", "steps", "seed", "success", "episodes", "latency_ms"} <= set(stored[0])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert (tmp_path / "policies.png").read_bytes().startswith(b"\x89PNG")


def test_cells_of_other_settings_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "CELLS", tmp_path / "cells.jsonl")
    own, other = policies.settings("ring", "iSD"), "00000000"
    assert own != policies.settings("ring", "regression")
    lines = [[row("iSD", 1, 0, 40, settings=own)], [row("iSD", 1, 1, 44, settings=other)], [row("expert", 0, 0, 50)]]
    text = "\n".join(json.dumps(line) for line in lines)
    policies.CELLS.write_text(text + '\n[{"task": "ring", "meth')
    assert [(each["method"], each["seed"]) for each in policies.read_cells()] == [("iSD", 0), ("expert", 0)]


def test_flow_matching_comes_before_what_starts_from_it() -> None:
    found = list(policies.plan(["ring"], list(policies.METHODS), [0, 1]))
    assert found[0] == ("ring", "expert", 0)
    assert len(found) == len(set(found)) == 1 + 2 * len(policies.METHODS)
    assert found.index(("ring", "flow matching", 1)) < found.index(("ring", "iSD from flow matching", 1))


def test_the_cells_of_a_task_differ_in_nothing_but_the_method(tmp_path: Path) -> None:
    made = [policies.configuration("pusht", method, tmp_path, 3, "") for method in policies.METHODS]
    first = made[0]
    for config in made:
        assert (config.network, config.optimizer, config.training, config.data) == (
            first.network,
            first.optimizer,
            first.training,
            first.data,
        )
    assert first.training.images == 4000 * 256
    assert first.training.seed == 3


def test_stored_cells_are_todays() -> None:
    stored = [each for line in policies.CELLS.read_text().splitlines() for each in json.loads(line)]
    assert policies.read_cells() == stored


def test_demonstrations_of_another_count_are_not_taken_for_the_studys(tmp_path: Path) -> None:
    ends = torch.tensor([2, 4, 6])
    few = Demonstrations(torch.zeros(6, 6), torch.zeros(6, 2), ends, "pointmaze-ring")
    save_demonstrations(few, tmp_path / "pointmaze-ring.safetensors")
    with pytest.raises(SystemExit, match="does not hold the study's 100 episodes"):
        policies.demonstrations_of("pointmaze-ring", tmp_path)
