"""Where work that is not training happens: the GPU where there is one, unless it is to stay on the CPU."""

import importlib
from typing import Any

import pytest
import torch

from fewstep.cli.main import run_command
from fewstep.utils.device import best_device, placed


def test_work_stays_on_the_cpu_inside_and_an_inner_choice_does_not_undo_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert best_device().type == "cuda"
    with placed(cpu=True), placed(cpu=False):
        assert best_device().type == "cpu"
    with placed(cpu=False):
        assert best_device().type == "cuda"


@pytest.mark.parametrize("name", ["sample", "tune-steps", "evaluate", "report", "compare", "statistics", "quickstart"])
def test_every_command_that_draws_takes_the_choice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found: list[str] = []

    def run(options: Any) -> None:
        found.append(best_device().type)

    monkeypatch.setattr(importlib.import_module(f"fewstep.cli.{name.replace('-', '_')}"), "run", run)
    words = ["--runtime.cpu"] if name == "quickstart" else ["somewhere", "--cpu"]
    run_command(name, words)
    run_command(name, words[:-1])
    assert found == ["cpu", "cuda"]
