"""Data and finished runs that the tests of training share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fewstep.data.base import Dataset
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.training import RunFolder, train_run
from tests.support.tiny import KINDS, RUNTIME, TEACHER, student


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset(DataConfig())


@pytest.fixture(scope="session")
def unbroken(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an unbroken run of a kind, trained once."""
    root = tmp_path_factory.mktemp("unbroken")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            train_run(KINDS[kind], digits, RunFolder(root / kind), RUNTIME)
        return root / kind

    return folder


@pytest.fixture(scope="session")
def teacher(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a teacher that knows its classes; tests that change it take a copy."""
    root = tmp_path_factory.mktemp("teacher") / "run"
    train_run(TEACHER, digits, RunFolder(root), RUNTIME)
    return root


@pytest.fixture(scope="session")
def unbroken_student(digits: Dataset, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an unbroken student of a kind, trained once."""
    root = tmp_path_factory.mktemp("students")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            train_run(student(kind, teacher), digits, RunFolder(root / kind), RUNTIME)
        return root / kind

    return folder
