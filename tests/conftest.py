"""Settings shared by all tests: hypothesis draws the same examples in every run, and few of them; one thread."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.support.zero_tangents import shapes_by_broadcasting

settings.register_profile("fewstep", deadline=None, max_examples=15, derandomize=True)
settings.load_profile("fewstep")

# Networks of this size lose more by sharing work than they win.
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def fast_zero_tangents() -> Iterator[None]:
    """Forward mode at a fraction of its cost, where nothing is compiled."""
    with shapes_by_broadcasting():
        yield


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests keep the classifiers of their data: one folder for all workers, whose files appear whole."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "classifiers"
    folder.mkdir(exist_ok=True)
    return folder
