"""Learning curves of a run: what is kept of them, and when their points are measured."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.data.base import Dataset, Samples
from fewstep.data.sources import DataConfig
from fewstep.evaluation.curve import curve_watcher, write_curve
from fewstep.evaluation.methods import read_curves
from fewstep.recipes import recipe
from fewstep.recipes.config import RunConfig
from fewstep.training import RunFolder, build
from fewstep.utils.errors import ConfigError, FewstepWarning
from tests.evaluation.test_compare import line


def test_lines_beyond_a_resumed_step_are_dropped(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (1, 2, 3):
        write_curve(run, [line(step, 1.0 / step), line(step, 1.0, nfe=2)])
    write_curve(run, [line(3, 0.5, "alignment")])
    assert len(read_curves(run)) == 3
    write_curve(run, [line(2, 7.0)])
    assert read_curves(run) == {("frechet", 1): [(1.0, 1.0), (2.0, 7.0)], ("frechet", 2): [(1.0, 1.0)]}
    with (tmp_path / "curve.jsonl").open("a") as file:
        file.write('{"torn')
    write_curve(run, [line(3, 6.0)])
    assert read_curves(run)["frechet", 1][-1] == (3.0, 6.0)


@pytest.fixture(scope="module")
def unlabelled() -> Dataset:
    values = torch.randn(96, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    return Dataset("points", Samples(values[:64]), Samples(values[64:]))


def watched(config: RunConfig) -> RunConfig:
    evaluation = replace(config.evaluation, curve_images=64, curve_steps=(1, 3), curve_samples=32)
    network = replace(config.network, width=16, depth=1, embedding_width=16)
    return replace(config, data=DataConfig(source="random"), network=network, evaluation=evaluation)


def test_the_curve_watcher_measures_the_model_at_its_steps(tmp_path: Path, unlabelled: Dataset) -> None:
    config, run = watched(recipe("digits-flow-matching")), RunFolder(tmp_path)
    pipeline = build(config, unlabelled)
    watch = curve_watcher(run, config, unlabelled, None)
    assert not (tmp_path / "curve.jsonl").exists()
    watch(pipeline, 2)
    run.append_log({"step": 2, "seconds": 3.0})
    watch(pipeline, 4)
    lines = [json.loads(each) for each in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [(each["step"], each["images"], each["nfe"]) for each in lines] == [
        (step, step * config.training.batch_size, nfe) for step in (2, 4) for nfe in (1, 3)
    ]  # fmt: skip
    assert [each["seconds"] for each in lines] == [None, None, 6.0, 6.0]
    assert all(each["measure"] == "frechet" and each["value"] > 0 for each in lines)
    assert lines[0]["value"] == lines[2]["value"]  # the same model and noise

    for parameter in pipeline.flow_map.parameters():
        parameter.data.fill_(math.nan)
    watch(pipeline, 6)
    assert math.isnan(read_curves(run)["frechet", 1][-1][1])


@pytest.mark.parametrize(
    "change", [{"curve_steps": ()}, {"curve_steps": (0,)}, {"curve_samples": 3}, {"curve_images": -1}]
)
def test_learning_curves_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"curve_\w+ is .* at least \d"):
        replace(recipe("digits").evaluation, **change)


def test_a_damaged_line_costs_no_other(tmp_path: Path) -> None:
    """It is named and left out; what stands after it stays."""
    run = RunFolder(tmp_path)
    for step in (1, 2, 3):
        write_curve(run, [line(step, 1.0 / step)])
    file = tmp_path / "curve.jsonl"
    file.write_text("\n".join(["{", *file.read_text().splitlines()[1:], ""]))
    with pytest.warns(FewstepWarning, match=r"curve\.jsonl, line 1 cannot be read"):
        write_curve(run, [line(4, 0.1)])
    assert [step for step, _ in read_curves(run)["frechet", 1]] == [2.0, 3.0, 4.0]
