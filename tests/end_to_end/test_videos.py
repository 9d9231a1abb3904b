"""A teacher of videos, distilled on the command line from an archive of latents, drawn, and exported."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep
from fewstep.data.base import Dataset, Samples
from fewstep.data.npz import load_npz
from fewstep.sampling.images import film_strips, save_animation
from fewstep.utils.errors import DataError
from tests.export.test_export import load_pipeline, noise
from tests.support.commands import Command
from tests.support.foreign import TINY, save_foreign

pytest.importorskip("diffusers")
KIND = "WanTransformer3DModel"
SHORT = (
    "--training.batch-size", 8, "--training.images", 16, "--training.checkpoint-images", 16, "--training.flip",
    "--training.sample-images", 16, "--evaluation.steps", 1, 2, "--evaluation.samples", 6,
    "--evaluation.curve-images", 0, "--evaluation.reference-steps", 2, "--runtime.cpu", "--runtime.quiet",
    "--runtime.threads", 1,
)  # fmt: skip


def videos(count: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32)


@pytest.mark.filterwarnings("ignore:clips has no prompts")
def test_jumps_of_videos_are_computed_from_the_teacher(command: Command, tmp_path: Path) -> None:
    save_foreign(tmp_path / "wan", KIND)
    np.savez(tmp_path / "clips.npz", images=videos(16, TINY[KIND].shape))
    words = ("--data.source", "npz", "--data.root", "clips.npz", *SHORT, "--model.preconditioning", "analytic")
    few = ("--statistics.points", 4, "--statistics.samples", 4, "--evaluation.samples", 4)
    trained = command("train", "distil-diffusers", "--teacher", "wan", *words, *few, "--out", "run")
    assert trained.code == 0, trained.err
    assert fewstep.load("run").generate(2, steps=1).samples.isfinite().all()


@pytest.mark.filterwarnings("ignore:clips has no prompts")
def test_a_teacher_of_videos_is_distilled_drawn_and_exported(command: Command, tmp_path: Path) -> None:
    """What features of images would measure is left out, and said; the student is measured against its teacher."""
    shape = TINY[KIND].shape
    save_foreign(tmp_path / "wan", KIND)
    np.savez(tmp_path / "clips.npz", images=videos(16, shape))
    data = ("--data.source", "npz", "--data.root", "clips.npz")
    trained = command("train", "distil-diffusers", "--teacher", "wan", *data, *SHORT, "--out", "run")
    assert trained.code == 0
    assert "clips: 16 videos of 4x2x8x8, 5 of them held out" in trained.out
    assert "Not to be measured: clips has videos" in trained.out
    with Image.open("run/samples/step-00000002.png") as grid:
        assert grid.width > grid.height / 4  # film strips, ten in a row

    measured = command("evaluate", "run")
    assert (measured.code, "Not measured: clips has videos" in measured.out) == (0, True)
    assert json.loads(Path("run/alignment.json").read_text())["jumps"]["samples"] == 5
    refused = command("tune-steps", "run", "--samples", 20)
    assert (refused.code, "clips has videos" in refused.err, refused.err.count("\n")) == (2, True, 1)

    for name in ("a.gif", "a.npz", "a.png"):
        assert command("sample", "run", "--out", name, "--count", 3, "--cpu").code == 0
    with Image.open("a.gif") as moving:
        assert (moving.n_frames, moving.is_animated) == (shape[1], True)
    assert load_npz("a.npz").train.shape == shape
    assert command("report", "run").code == 0

    student = fewstep.load("run")
    assert command("export", "run", "--to", "diffusers", "--out", "student", "--parts", "none").code == 0
    start = noise(shape, 2)
    found = load_pipeline(tmp_path / "student", trust_remote_code=True)
    drawn = found(num_inference_steps=2, latents=start, output_type="latent").images
    assert drawn.shape == (2, *shape)
    assert student.flow_map.sample_shape == shape


@pytest.mark.parametrize(("shape", "layout"), [((5, 3, 4, 6, 8), "chw"), ((5, 4, 6, 8, 3), "hwc")])
def test_archives_of_videos_have_channels_first_or_last(shape: tuple[int, ...], layout: str, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "clips.npz", images=frames)
    loaded = load_npz(str(tmp_path / "clips.npz"))
    expected = frames if layout == "chw" else frames.transpose(0, 4, 1, 2, 3)
    assert loaded.train.shape == (3, 4, 6, 8)
    assert isinstance(loaded.train, Samples)
    assert np.array_equal(loaded.train.values.numpy(), expected)
    mirrored, _ = loaded.train.fetch(torch.arange(5), torch.tensor([True] * 5))
    torch.testing.assert_close(mirrored, torch.from_numpy(expected[..., ::-1].copy()) / 127.5 - 1)


def test_archives_of_videos_that_may_be_read_in_two_ways_are_asked_for(tmp_path: Path) -> None:
    for shape, message in (
        ((5, 3, 4, 3, 3), "ambiguous: set --data.npz-layout"),
        ((5, 20, 4, 6, 8), "no axis looks like channels"),
        ((5, 1, 3, 4, 6, 8), r"of videos \(N, T, H, W, C\) or \(N, C, T, H, W\)"),
    ):
        np.savez(tmp_path / "clips.npz", images=np.zeros(shape, np.uint8))
        with pytest.raises(DataError, match=message):
            load_npz(str(tmp_path / "clips.npz"))


def test_a_channel_of_videos_that_never_varies_is_known() -> None:
    values = torch.from_numpy(videos(6, (3, 2, 4, 4)))
    values[:, 1] = 2.0
    dataset = Dataset("clips", Samples(values), Samples(values))
    assert dataset.train.constant == (1,)
    assert dataset.of_videos
    assert dataset.sigma_data == pytest.approx(float(values.double().std(correction=0)), rel=1e-6)


def test_videos_are_shown_frame_by_frame(tmp_path: Path) -> None:
    """Side by side in a strip; one after another in a PNG without loss."""
    frames = torch.randint(0, 256, (2, 3, 4, 5, 6), dtype=torch.uint8)
    strips = film_strips(frames)
    assert strips.shape == (2, 3, 5, 24)
    assert torch.equal(strips[..., 6:12], frames[:, :, 1])
    file = save_animation(frames[:1], tmp_path / "clip.png", scale=1)
    with Image.open(file) as moving:
        for number in range(4):
            moving.seek(number)
            found = torch.from_numpy(np.array(moving.convert("RGB"))).permute(2, 0, 1)
            assert torch.equal(found, frames[0, :, number])
