"""Runs that learn jumps to the data end alone: sampled by new noise between steps, with or without other jumps."""

from pathlib import Path

import numpy as np
import pytest

import fewstep
from tests.support.commands import Command


@pytest.mark.parametrize("preconditioning", ["bcm", "cm"])
def test_a_run_that_jumps_to_data_alone_is_sampled_by_new_noise(
    tmp_path: Path, command: Command, preconditioning: str
) -> None:
    """By itself, as evaluation samples it: the map's jumps between steps were never trained, and cm has none."""
    run = tmp_path / "run"
    small = ("--network.width", "16", "--network.depth", "1", "--training.images", "64", "--training.batch-size", "32")
    small += ("--model.preconditioning", preconditioning, "--training.sample-images", "32")
    assert command("train", "digits-ct", "--out", str(run), *small, "--evaluation.steps", "1", "2").code == 0
    assert command("report", str(run)).code == 0

    def drawn(*options: str) -> bytes:
        out = tmp_path / "drawn.npz"
        command("sample", str(run), "--steps", "2", "--count", "4", "--out", str(out), *options)
        with np.load(out) as arrays:
            return bytes(arrays["images"].tobytes())

    own = drawn()
    assert own == drawn("--sampler", "gamma", "--gamma", "1")
    if preconditioning == "bcm":
        assert own != drawn("--sampler", "map")
    else:
        refused = command("sample", str(run), "--sampler", "map", "--steps", "2")
        assert refused.code == 2
        assert "jumps to s = t_min = 0.002 alone; sample by --sampler gamma --gamma 1" in refused.err
        run = tmp_path / "model"
        fewstep.load(tmp_path / "run").save_pretrained(run)
        assert own == drawn()
    refused = command("sample", str(run), "--sampler", "map", "--gamma", "1")
    assert refused.code == 2
    assert "--gamma 1 is for the gamma sampler" in refused.err
