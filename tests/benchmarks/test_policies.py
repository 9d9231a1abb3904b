"""The study of policies: what its tables say of known episodes, which cells are taken for done, their settings."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.policies import __main__ as study
from fewstep.data.demonstrations.episodes import Demonstrations, save_demonstrations
from fewstep.policies.rollout import wilson


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
    text = study.section(ROWS)
    assert "100 demonstrations of 4,000 steps, from 103 episodes of the expert." in text
    names = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("|")][2:]
    assert names == ["expert", "flow matching", "flow matching", "iSD"]
    low, high = wilson(84, 100)
    (line,) = [line for line in text.splitlines() if line.startswith("| iSD ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["iSD", "1", "40, 44", "84 / 100", f"{low:.2f}–{high:.2f}", "40", "0.50", "10, 11", "5, 5", "2.0"]


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    study.draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_settings_differ_by_method() -> None:
    assert study.settings(study.Cell("pusht", "iSD", 0)) != study.settings(study.Cell("pusht", "regression", 0))
    assert study.settings(study.Cell("pusht", "expert", 0)) == ""


def test_flow_matching_comes_before_what_starts_from_it() -> None:
    found = list(study.plan(("ring",), (0, 1)))
    assert found[0] == study.Cell("ring", "expert", 0)
    assert len(found) == len(set(found)) == 1 + 2 * len(study.METHODS)
    last = study.Cell("ring", "iSD from flow matching", 1)
    assert found.index(study.Cell("ring", "flow matching", 1)) < found.index(last)


def test_the_cells_of_a_task_differ_in_nothing_but_the_method(tmp_path: Path) -> None:
    made = [study.configuration("pusht", method, tmp_path, 3, "") for method in study.METHODS]
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


def test_stored_cells_are_found_again() -> None:
    assert len(study.GRID.rows()) == sum(map(len, study.GRID.stored().values())) > 100


def test_demonstrations_of_another_count_are_not_taken_for_the_studys(tmp_path: Path) -> None:
    ends = torch.tensor([2, 4, 6])
    few = Demonstrations(torch.zeros(6, 6), torch.zeros(6, 2), ends, "pointmaze-ring")
    save_demonstrations(few, tmp_path / "pointmaze-ring.safetensors")
    with pytest.raises(SystemExit, match="does not hold the study's 100 episodes"):
        study.demonstrations_of("pointmaze-ring", tmp_path)
