"""Commands run within the test process, on small data and networks."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fewstep.cli.main import main
from tests.support.commands import SMALL, STEPS, Command, Finished
from tests.support.figures import Unplaced, draw_once
from tests.support.processes import Forking, forking


@pytest.fixture(scope="session", autouse=True)
def cache(classifiers: Path) -> Iterator[Path]:
    """Where commands run in a test process keep classifiers: one place for all of them, not the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(classifiers))
        yield classifiers


@pytest.fixture(scope="module", autouse=True)
def coarse_figures() -> Iterator[None]:
    """Figures of few pixels, drawn once for all widths and grounds, without a layout: they are most of a report's time.
    The page of test_report.py has whole ones.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.evaluation.report.canvas._DPI", 100)
        patch.setattr("fewstep.evaluation.report.canvas.ConstrainedLayoutEngine", Unplaced)
        draw_once(patch)
        yield


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run `fewstep ...` in an empty folder and return what it left."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Finished:
        capsys.readouterr()
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        return Finished(code, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forking]:
    """What starts real processes."""
    with forking(tmp_path_factory.mktemp("processes")) as found:
        yield found


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 grey 8x8 images in two classes, bright above or bright below, as .npz."""
    file = tmp_path_factory.mktemp("data") / "halves.npz"
    generator = np.random.default_rng(0)
    labels = np.arange(200) % 2
    images = generator.integers(0, 80, (200, 8, 8), dtype=np.uint8)
    images[labels == 0, :4] += 150
    images[labels == 1, 4:] += 150
    np.savez(file, images=images, labels=labels)
    return file


@pytest.fixture(scope="session")
def small_run(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the archive; tests that change it take a copy."""
    root = tmp_path_factory.mktemp("small") / "run"
    words = ["train", "digits", "--data.source", "npz", "--data.root", str(archive), "--out", str(root)]
    assert main([*words, *SMALL, *STEPS]) == 0
    return root
