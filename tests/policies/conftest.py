"""One small policy for all tests of this folder, trained on a point's demonstrations."""

from pathlib import Path

import pytest

from fewstep.data.demonstrations.episodes import save_demonstrations
from fewstep.data.sources import load_dataset
from fewstep.policies.rollout import record
from fewstep.training import RunFolder, Runtime, train_run
from tests.support.pointtask import point_task, run_config


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 episodes of the expert."""
    file = tmp_path_factory.mktemp("demos") / "point.safetensors"
    return save_demonstrations(record(point_task().task, 60).demonstrations, file)


@pytest.fixture(scope="session")
def point_run(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run."""
    root = tmp_path_factory.mktemp("policies") / "run"
    config = run_config(str(demonstrations))
    train_run(config, load_dataset(config.data), RunFolder(root), Runtime(cpu=True, quiet=True, threads=1))
    return root
