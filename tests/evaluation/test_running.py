"""A run from Python: `fewstep.train`, and what it returns."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fewstep
from fewstep.data.base import Dataset, Samples
from fewstep.data.sources import DataConfig
from fewstep.evaluation.running import Run
from fewstep.utils.errors import ConfigError
from tests.support.photographs import save_pictures
from tests.support.tiny import RUNTIME, TINY, assert_same_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ten steps on a folder of pictures in two classes, by a configuration of one's own."""
    root = tmp_path_factory.mktemp("python")
    pictures = save_pictures(root / "pictures", {"flower": 12, "tree": 12})
    config = replace(TINY, recipe="own", data=DataConfig("images", image_size=8, heldout=0.4))
    config = replace(config, training=replace(config.training, sample_images=160))
    return fewstep.train(config, pictures, root / "run", runtime=RUNTIME)


def test_a_run_is_sampled_by_the_names_of_its_classes(trained: Run) -> None:
    drawn = trained.pipeline.generate(4, steps=1, labels=["flower"])
    assert drawn.labels is not None
    assert drawn.labels.tolist() == [0, 0, 0, 0]
    assert drawn.images().shape == (4, 8, 8, 3)
    assert {image.mode for image in drawn.pil()} == {"RGB"}
    assert float(drawn.samples.abs().max()) <= 1.0


def test_a_run_has_its_log_as_arrays(trained: Run) -> None:
    assert trained.log["step"].tolist() == [2, 4, 6, 8, 10]
    assert trained.log["images"].tolist() == [64, 128, 192, 256, 320]
    assert np.isfinite(trained.log["loss"]).all()
    assert trained.result.step == 10
    assert len(list(trained.folder.samples.glob("*.png"))) == 2


def test_a_run_is_measured_and_reported_on(trained: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    rows = trained.evaluate(samples=8, steps=(1,), reference_steps=2)
    assert [row["nfe"] for row in rows] == [1, 1, 0]
    assert all(np.isfinite(row["frechet"]) for row in rows)
    page = trained.report()
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_training_again_goes_on_and_leaves_the_caller_s_random_numbers(trained: Run, tmp_path: Path) -> None:
    """Twice in one process: a finished run is as it was, another gives the same bits; no generator has moved."""
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    config, data = replace(trained.config, data=DataConfig("images", image_size=8, heldout=0.4)), trained.config.data
    again = fewstep.train(trained.config, out=trained.folder.root, runtime=RUNTIME)
    other = fewstep.train(config, data.root, tmp_path / "other", runtime=RUNTIME)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    assert again.result.step == other.result.step == 10
    assert_same_run(other.folder.root, trained.folder.root)


def test_a_file_is_a_recipe_and_data_may_be_in_memory(trained: Run, tmp_path: Path) -> None:
    """The stored configuration of a run, on a data set of one's own, shorter."""
    values = torch.linspace(-1, 1, 40 * 64).reshape(40, 1, 8, 8)
    labels = torch.arange(40) % 2
    parts = Samples(values[:30], labels[:30]), Samples(values[30:], labels[30:])
    dataset = Dataset("own", *parts, num_classes=2, class_names=("dark", "light"))
    stored = trained.folder.config_file
    run = fewstep.train(stored, dataset, tmp_path / "run", images=64, runtime=RUNTIME)
    assert (run.result.step, run.dataset) == (2, dataset)
    assert repr(dataset) == "Dataset('own', samples of 1x8x8: 30 to train on, 10 held out, 2 classes)"
    assert repr(dataset.train) == "Samples(30 of 1x8x8, torch.float32, labelled)"
    assert repr(run) == f"Run('{tmp_path}/run', {run.config.recipe}: 64 images in 2 steps)"
    assert run.config.optimizer.warmup_share == 0.05
    with pytest.raises(ConfigError, match="there is no recipe 'none'"):
        fewstep.train("none")
