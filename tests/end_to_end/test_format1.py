"""Runs and saved models of format 1 (tests/fixtures/format1): they load, sample the same, and go on to the same bits.

The folders and `expected.safetensors` were written by the last fewstep of that format: samples of each, and the weights
with which two runs that stopped half-way there had ended.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fewstep
from fewstep import SamplingSettings
from fewstep.data.sources import load_dataset
from fewstep.training import RunFolder, train_run
from tests.support.tiny import RUNTIME

FIXTURES = Path(__file__).parents[1] / "fixtures" / "format1"
EXPECTED = load_file(FIXTURES / "expected.safetensors")
TO_DATA_ALONE = {"cd", "ct", "ect", "sct", "scd"}
OF_THE_DIAGONAL = {"teacher", "flow-matching"}
NAMES = sorted(name for name in EXPECTED if ".final." not in name)


def settings_of(name: str) -> SamplingSettings:
    """What the stored samples were drawn with."""
    if name in TO_DATA_ALONE:
        return SamplingSettings(sampler="gamma", gamma=1.0, steps=2)
    return SamplingSettings(sampler="heun" if name in OF_THE_DIAGONAL else "map", steps=2)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_format_1_loads_and_samples_the_same(name: str) -> None:
    """Weights, path, preconditioning (computed ones too), tuned times: all of it decides these numbers."""
    pipeline = fewstep.load(FIXTURES / name)
    torch.testing.assert_close(
        pipeline.generate(4, settings_of(name), clip=False).samples, EXPECTED[name], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir() if (path / "checkpoints").is_dir()))
def test_a_run_of_format_1_has_its_configuration_and_log(name: str) -> None:
    run = RunFolder(FIXTURES / name)
    config = run.config()
    assert config.training.images in (24, 48, 96)
    assert run.read_log()[0]["step"] == 2


def test_tuned_times_and_names_are_kept() -> None:
    pipeline = fewstep.load(FIXTURES / "saved")
    assert [each.times for each in pipeline.step_times] == [(1.0, 0.4, 0.0)]
    assert fewstep.load(FIXTURES / "isd-t").step_times == pipeline.step_times
    assert pipeline.config.class_names == ("0", "1")
    assert pipeline.config.data_range is not None


def test_a_policy_of_format_1_acts() -> None:
    policy = fewstep.load_policy(FIXTURES / "policy")
    policy.reset()
    action = policy.select_action(torch.zeros(2).numpy())
    assert action.shape == (2,)
    assert (abs(action) <= 1).all()


@pytest.mark.filterwarnings("ignore:the run ended before its learning rate")
@pytest.mark.parametrize("name", ["isd-half", "ctm"])
def test_a_run_of_format_1_goes_on_to_the_same_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint is taken up and its second half trained; statistics and discriminator included."""
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    run = RunFolder(Path(name))
    config = run.config()
    assert run.last_checkpoint().name == "step-00000003"
    train_run(config, load_dataset(config.data), run, RUNTIME)
    weights = load_file(run.last_checkpoint() / "weights.safetensors")
    assert len(weights) > 5
    for key, value in weights.items():
        torch.testing.assert_close(value, EXPECTED[f"{name}.final.{key}"], rtol=1e-6, atol=1e-7)


def test_a_file_that_says_no_format_is_of_the_first(tmp_path: Path) -> None:
    """As files were before they said so."""
    run = shutil.copytree(FIXTURES / "isd-t", tmp_path / "run")
    for file in run.rglob("config.json"):
        record = json.loads(file.read_text())
        del record["format"]
        file.write_text(json.dumps(record))
    assert torch.equal(fewstep.load(run).generate(2).samples, fewstep.load(FIXTURES / "isd-t").generate(2).samples)
