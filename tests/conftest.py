"""Settings shared by all tests: hypothesis draws the same examples in every run, and few of them; one thread."""

import functools
import gc
import inspect
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Where tests run; the process that hands them out to others imports nothing for them."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import torch
    from hypothesis import settings

    settings.register_profile("fewstep", deadline=None, max_examples=15, derandomize=True)
    settings.load_profile("fewstep")
    torch.set_num_threads(1)  # networks of this size lose more by sharing work than they win


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector, a tenth of the time, need not look through it anew."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def fast_zero_tangents() -> Iterator[None]:
    """Forward mode at a fraction of its cost, where nothing is compiled."""
    from tests.support.zero_tangents import shapes_by_broadcasting

    with shapes_by_broadcasting():
        yield


@pytest.fixture(scope="session", autouse=True)
def sources_read_once() -> Iterator[None]:
    """The command line reads the words of every option from the source of its class, a third of a command's time."""
    from tyro._docstrings import _ClassTokenization

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
        patch.setattr(_ClassTokenization, "make", staticmethod(functools.cache(_ClassTokenization.make)))
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(classifiers: Path) -> Iterator[None]:
    """What is kept of data and models does not go into the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(classifiers))
        yield


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests keep the classifiers of their data: one folder for all workers, whose files appear whole."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "classifiers"
    folder.mkdir(exist_ok=True)
    return folder
