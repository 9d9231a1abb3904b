"""No layout or range of values is guessed without a word."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.recipes.config import RunConfig
from fewstep.training import RunFolder, Runtime, train_run
from fewstep.utils.errors import ConfigError, DataError
from tests.data.test_idx import idx_bytes
from tests.support.inputs import grey, other_formats
from tests.support.sources import bytes_of, load, refused


def in_doubt(source: str, file: Path, *parts: str) -> None:
    """Data of one reading among several: no run begins on them. One that has, goes on (test_inputs.py)."""
    try:
        dataset = load(source, file)
    except DataError as error:
        message = str(error)
    else:
        message = dataset.doubt
        assert message
        with pytest.raises(DataError, match=re.escape(message)):
            train_run(RunConfig("toy"), dataset, RunFolder(file.parent / "run"), Runtime(cpu=True))
        assert not (file.parent / "run").exists()
    for part in parts:
        assert part in message


@pytest.mark.parametrize("shape", [(9, 16, 16, 4), (9, 64, 64, 4), (9, 16, 16, 2), (9, 40, 30, 2), (9, 4, 4, 4)])
def test_two_or_four_channels_last_are_asked_for(tmp_path: Path, shape: tuple[int, ...]) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, images=bytes_of(shape))
    in_doubt("npz", file, str(file), f"may be {shape[-1]} channels", "--data.npz-layout")
    assert load("npz", file, npz_layout="hwc").shape == (shape[3], *shape[1:3])
    assert load("npz", file, npz_layout="chw").shape == shape[1:]


def test_colours_with_transparency_are_laid_over_white_as_in_a_folder(tmp_path: Path) -> None:
    pixels = bytes_of((8, 6, 5, 4))
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    np.savez(tmp_path / "a.npz", images=pixels)
    archive, folder = load("npz", tmp_path / "a.npz", npz_layout="rgba"), load("images", tmp_path)
    assert archive.shape == (3, 6, 5)
    difference = archive.train.values.int() - folder.train.values.int()
    assert int(difference.abs().max()) <= 1
    np.savez(tmp_path / "b.npz", images=bytes_of((8, 6, 5, 3)))
    refused("npz", tmp_path / "b.npz", "(8, 6, 5, 3)", "rgba is", npz_layout="rgba")


WHOLE = grey(120, count=30)


@pytest.mark.parametrize(
    ("images", "white"),
    [
        (WHOLE.astype(np.float32), 255.0),
        (WHOLE / 255, 1.0),
        ((WHOLE // 16).astype(np.float64), 16.0),
        (WHOLE // 128, 1.0),
        (WHOLE // 16, 16.0),
    ],
    ids=["floats to 255", "floats to 1", "floats to 16", "bytes to 1", "bytes to 16"],
)
def test_values_that_stand_for_another_range_are_asked_for(tmp_path: Path, images: np.ndarray, white: float) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, images=images, heldout_images=images[:5])
    in_doubt("npz", file, str(file), "say which stand for black and white", "--data.value-range 0 ")
    dataset = load("npz", file, value_range=(0.0, white))
    assert dataset.data_range == (-1.0, 1.0)
    rows = torch.arange(30)
    expected = torch.from_numpy(2 * images.astype(np.float64) / white - 1)[:, None]
    torch.testing.assert_close(dataset.train.fetch(rows)[0].double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(dataset.heldout.fetch(rows[:5])[0].double(), expected[:5], rtol=0, atol=1e-6)
    refused("npz", file, "beyond --data.value-range 0 0.5", value_range=(0.0, 0.5))


def spotted(images: np.ndarray, value: float) -> np.ndarray:
    """With one value far from the others, in sample 7."""
    images = images.copy()
    images[7, 3, 3] = value
    return images


SIGNED = WHOLE.astype(np.float32) / 127.5 - 1
CENTRED = (np.arange(30 * 64) % 256).reshape(30, 8, 8).astype(np.float32)
DOUBTFUL: list[tuple[str, np.ndarray, str, tuple[float, float] | None]] = [
    ("floats from -128 to 127", CENTRED - 128, "-128 127", (-128, 127)),
    ("floats from -127.5 to 127.5", CENTRED - 127.5, "-127.5 127.5", (-127.5, 127.5)),
    ("floats from -0.5 to 0.5", CENTRED / 255 - 0.5, "-0.5 0.5", (-0.5, 0.5)),
    ("floats from -125 to 125", (CENTRED / 255 - 0.5) * 250, "-128 127", (-125, 125)),
    ("bytes to 16 and one of 255", spotted(CENTRED.astype(np.uint8) // 16, 255), "0 15", (0, 255)),
    ("bytes to 1 and one of 255", spotted(WHOLE // 128, 255), "0 1", (0, 255)),
    ("floats to 1 and one of 255", spotted(WHOLE / 255, 255), "0 1", None),
    ("signed floats and one of 255", spotted(SIGNED, 255), "-1 1", None),
    ("signed floats and one of 9", spotted(SIGNED, 9), "-1 1", None),
    ("the whole range and one of 1.5", spotted(CENTRED / 127.5 - 1, 1.5), "-1 1", None),
]


@pytest.mark.parametrize(("images", "likely", "meant"), [each[1:] for each in DOUBTFUL], ids=[d[0] for d in DOUBTFUL])
def test_what_else_is_in_doubt(
    tmp_path: Path, images: np.ndarray, likely: str, meant: tuple[float, float] | None
) -> None:
    """It is asked for; what is most likely is named; a stray is named with its sample."""
    file = tmp_path / "a.npz"
    np.savez(file, images=images)
    in_doubt("npz", file, str(file), f"say which stand for black and white, as --data.value-range {likely}")
    low, high = (float(word) for word in likely.split())
    if meant is None:
        refused("npz", file, "in 1 of 30 samples, first in sample 7", value_range=(low, high))
    else:
        assert load("npz", file, value_range=meant).data_range == (-1.0, 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_in_no_doubt(tmp_path: Path, seed: int) -> None:
    """Latents near the normal distribution, images with bright spots, floats in [-1, 1]."""
    generator = np.random.default_rng(seed)
    sky = np.zeros((40, 8, 8), np.uint8)
    sky[generator.integers(0, 40, 9), generator.integers(0, 8, 9), generator.integers(0, 8, 9)] = 255
    noise = generator.normal(size=(40, 4, 8, 8)).astype(np.float32)
    latents = (noise, 3 * noise, 9 * noise, generator.standard_t(5, size=(40, 4, 8, 8)))
    for images in (*latents, sky, noise.clip(-1, 1), CENTRED / 127.5 - 1):
        np.savez(tmp_path / "a.npz", images=images)
        assert load("npz", tmp_path / "a.npz", npz_layout="chw").doubt == ""


def test_values_can_be_left_as_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=WHOLE / 255)
    found = load("npz", tmp_path / "a.npz", value_range=(-1.0, 1.0)).train.values
    assert float(found.min()) >= 0
    np.savez(tmp_path / "b.npz", images=WHOLE // 128)
    assert load("npz", tmp_path / "b.npz", value_range=(0.0, 255.0)).train.values.dtype == torch.uint8
    with pytest.raises(ConfigError, match="value_range"):
        load("npz", tmp_path / "b.npz", value_range=(1.0, 0.0))


def test_idx_of_two_levels_is_asked_for_its_range(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(WHOLE // 128))
    in_doubt("idx", tmp_path, str(tmp_path), "bytes from 0 to 1", "--data.value-range 0 1")
    assert load("idx", tmp_path, value_range=(0.0, 1.0)).data_range == (-1.0, 1.0)


def test_values_too_large_to_compute_with_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.random.default_rng(0).normal(size=(9, 4, 4)) * 1e30)
    refused("npz", tmp_path / "a.npz", "array 'images' of", "bring them nearer to 1")


@pytest.mark.parametrize(("dtype", "said"), [(np.float32, "are floats"), (np.int32, "are of 32 bits")])
def test_images_of_floats_or_32_bits_have_no_range(tmp_path: Path, dtype: type, said: str) -> None:
    for number in range(2):
        Image.fromarray(np.full((4, 4), 200 * number, dtype)).save(tmp_path / f"{number}.tif")
    refused("images", tmp_path, "'1.tif'", f"its pixels {said}")


def test_arrays_that_are_not_read_are_counted(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=bytes_of((9, 6, 6)), masks=bytes_of((9, 6, 6)))
    assert load("npz", tmp_path / "a.npz").summary.endswith("; left out: array masks")


def test_classes_without_a_sample_to_train_on_are_counted(tmp_path: Path) -> None:
    parts = {"heldout_images": bytes_of((3, 6, 6)), "heldout_labels": np.arange(3)}
    np.savez(tmp_path / "a.npz", images=bytes_of((4, 6, 6)), labels=np.array([0, 1, 0, 1]), **parts)
    assert "; 1 classes without a sample to train on" in load("npz", tmp_path / "a.npz").summary


def test_every_format_is_read_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    dataset = load("images", other_formats(tmp_path))
    assert dataset.summary == (
        f"{tmp_path.name}: 150 images of 1x16x16, 50 of them held out; left out: 2 .txt, 1 hidden"
    )


def test_a_channel_that_does_not_vary_is_told_of(tmp_path: Path) -> None:
    images = bytes_of((9, 6, 6, 3))
    images[..., 1] = 7
    np.savez(tmp_path / "a.npz", images=images)
    assert "; channel 1 never varies" in load("npz", tmp_path / "a.npz").summary
