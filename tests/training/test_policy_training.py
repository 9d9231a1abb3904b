"""Training on demonstrations: exact resume, accumulation, teachers that fit, files from before there were policies."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.data.demonstrations.episodes import Demonstrations, load_demonstrations, save_demonstrations
from fewstep.data.demonstrations.normaliser import ChunkConfig
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.networks.mlp import MLPConfig
from fewstep.objectives import ISD, SCD, DiagonalMatching, Objective, Regression, Tangent
from fewstep.recipes.config import OptimizerConfig, RunConfig, TrainingConfig
from fewstep.training import RunFolder, Runtime, load, train_run
from fewstep.utils.errors import ConfigError
from tests.support.objectives import made

QUIET = Runtime(cpu=True, quiet=True, threads=1)


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Episodes of 1 to 12 steps."""
    lengths = (1, 12, 5, 7, 9, 3)
    generator = torch.Generator().manual_seed(0)
    observations, actions = (torch.randn(sum(lengths), n, generator=generator) for n in (3, 2))
    return str(
        save_demonstrations(
            Demonstrations(observations, actions, torch.tensor(lengths).cumsum(0)), tmp_path / "d.safetensors"
        )
    )


def configuration(file: str, objective: Objective, images: int = 64) -> RunConfig:
    return RunConfig(
        recipe="policy-mlp",
        data=DataConfig(source="demonstrations", root=file, chunks=ChunkConfig(2, 4, 2), heldout=0.2),
        network=MLPConfig(width=16, depth=1, embedding_width=16),
        objective=objective,  # type: ignore[arg-type]
        optimizer=OptimizerConfig(lr=1e-2, warmup_images=0),
        training=TrainingConfig(images=images, batch_size=8, sample_images=0, checkpoint_images=24, keep=9),
    )


def weights(root: Path) -> dict[str, Tensor]:
    return load(root).flow_map.network.state_dict()  # type: ignore[no-any-return]


def trained(config: RunConfig, root: Path, runtime: Runtime = QUIET) -> dict[str, Tensor]:
    train_run(config, load_dataset(config.data), RunFolder(root), runtime)
    return weights(root)


def test_a_stopped_policy_goes_on_exactly(file: str, tmp_path: Path) -> None:
    config = configuration(file, made(ISD, flow_matching_ratio=0.5))
    whole = trained(config, tmp_path / "whole")
    trained(config, tmp_path / "stopped")
    for later in RunFolder(tmp_path / "stopped").checkpoints()[1:]:
        for part in sorted(later.rglob("*"), reverse=True):
            part.unlink()
        later.rmdir()
    again = trained(config, tmp_path / "stopped")
    assert all(torch.equal(again[key], whole[key]) for key in whole)


def test_parts_of_a_batch_give_the_weights_of_the_whole(file: str, tmp_path: Path) -> None:
    config = configuration(file, made(ISD, flow_matching_ratio=0.5))
    whole, parts = trained(config, tmp_path / "a"), trained(config, tmp_path / "b", replace(QUIET, micro_batch=2))
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=0, atol=1e-5)


def test_a_teacher_must_see_and_move_the_same_numbers(file: str, tmp_path: Path) -> None:
    for name, objective in (("flow", DiagonalMatching()), ("mean", Regression())):
        trained(configuration(file, objective), tmp_path / name)
    student = configuration(file, SCD(tangent=made(Tangent, kind="finite-difference")))
    student = replace(student, teacher=str(tmp_path / "flow"), initial="teacher")
    trained(student, tmp_path / "student")
    with pytest.raises(ConfigError, match="is a regression"):
        trained(replace(student, teacher=str(tmp_path / "mean")), tmp_path / "none")
    longer = replace(student, data=replace(student.data, chunks=ChunkConfig(3, 4, 2)))
    with pytest.raises(ConfigError, match=r"other chunks"):
        trained(longer, tmp_path / "none")
    own = load_demonstrations(file)
    scaled = Demonstrations(5 * own.observations + 3, own.actions, own.ends)
    other = replace(
        student, data=replace(student.data, root=str(save_demonstrations(scaled, tmp_path / "o.safetensors")))
    )
    with pytest.raises(ConfigError, match="other observations"):
        trained(other, tmp_path / "none")


@pytest.mark.parametrize(
    ("objective", "sampler"), [(Regression(), "mean"), (DiagonalMatching(), "euler"), (ISD(), "map"), (SCD(), "gamma")]
)
def test_a_policy_acts_by_what_it_was_trained_for(file: str, objective: Objective, sampler: str) -> None:
    assert configuration(file, objective).objective.acting == sampler


def test_models_and_runs_from_before_policies_are_read(tmp_path: Path) -> None:
    """Their files lack the keys that came with policies; loading, resuming and sampling go on as they were."""
    config = RunConfig(
        recipe="digits",
        network=MLPConfig(width=16, depth=1, embedding_width=16),
        training=TrainingConfig(images=16, batch_size=8, sample_images=0, checkpoint_images=8),
        optimizer=OptimizerConfig(warmup_images=0),
    )
    root = tmp_path / "run"
    trained(config, root)
    for name, path in (
        (root / "config.json", ("run", "data", "chunks")),
        (RunFolder(root).last_checkpoint() / "config.json", ("flow_map", "observation")),
    ):
        record = json.loads(name.read_text())
        part = record
        for key in path[:-1]:
            part = part[key]
        del part[path[-1]]
        name.write_text(json.dumps(record))
    state = RunFolder(root).last_checkpoint() / "state.json"
    state.write_text(json.dumps({"step": 2, "images": 16, "seconds": 1.0}))
    before = weights(root)
    assert all(torch.equal(value, before[key]) for key, value in trained(config, root).items())
    record = json.loads((root / "config.json").read_text())
    del record["run"]["data"]["heldout"]
    (root / "config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="missing key"):
        RunFolder(root).config()
