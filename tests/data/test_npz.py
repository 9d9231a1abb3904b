"""NumPy archives."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.sources import bytes_of, load, refused


def save(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("given_shape", "shape"),
    [((9, 8, 7), (1, 8, 7)), ((9, 8, 8, 3), (3, 8, 8)), ((9, 20, 18, 1), (1, 20, 18)), ((9, 4, 8, 8), (4, 8, 8))],
)
def test_npz_images_become_channels_first(tmp_path: Path, given_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
    array = bytes_of(given_shape)
    dataset = load("npz", save(tmp_path / "a.npz", anything=array), heldout=0.2)
    assert (dataset.name, dataset.shape, dataset.num_classes) == ("a", shape, 0)
    assert (len(dataset.train), len(dataset.heldout)) == (7, 2)
    assert dataset.train.values.dtype == torch.uint8


def test_npz_floats_labels_and_heldout_are_taken_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, heldout = rng.normal(size=(6, 4, 8, 8)), rng.normal(size=(3, 4, 8, 8))
    arrays = {"images": images, "heldout_images": heldout, "labels": np.arange(6, dtype=np.int32) % 2}
    dataset = load("npz", save(tmp_path / "a.npz", **arrays, heldout_labels=np.array([0, 1, 2])))
    assert np.array_equal(dataset.train.values.numpy(), images.astype(np.float32))
    assert np.array_equal(dataset.heldout.values.numpy(), heldout.astype(np.float32))
    assert (dataset.num_classes, dataset.class_names) == (3, ("0", "1", "2"))
    refused("npz", save(tmp_path / "b.npz", **arrays), "'b'", "no labels for its held-out")


def test_ambiguous_npz_shapes_ask_for_a_layout(tmp_path: Path) -> None:
    for shape in ((9, 3, 3, 3), (9, 2, 1, 1), (9, 3, 8, 1)):
        path = save(tmp_path / "a.npz", images=bytes_of(shape))
        refused("npz", path, str(path), "'images'", "ambiguous", "npz_layout")
        assert load("npz", path, npz_layout="chw").shape == shape[1:]
        assert load("npz", path, npz_layout="hwc").shape == (shape[3], *shape[1:3])
    path = save(tmp_path / "a.npz", images=bytes_of((2, 20, 20, 20)))
    refused("npz", path, str(path), "no axis looks like channels")


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"x": bytes_of((4, 8, 8)), "y": bytes_of((4, 8, 8))}, "x, y"),
        ({}, "nothing"),
        ({"images": bytes_of((4, 8))}, "(4, 8)"),
        ({"images": np.zeros((), np.uint8)}, "()"),
        ({"images": np.zeros((4, 8, 8), np.int64)}, "int64"),
        ({"images": np.zeros((4, 8, 8), bool)}, "bool"),
        ({"images": np.full((4, 8, 8), np.nan)}, "sample 0"),
        ({"images": np.concatenate([np.ones((3, 8, 8)), np.full((1, 8, 8), 1e300)])}, "sample 3"),
        ({"images": np.array([{}] * 4)}, "Object arrays"),
        ({"images": bytes_of((4, 8, 8)), "labels": np.zeros(3, int)}, "'labels'"),
        ({"images": bytes_of((4, 8, 8)), "labels": np.zeros(4)}, "float64"),
        ({"images": bytes_of((4, 8, 8)), "labels": np.array([0, 1, -1, 0])}, "from -1 to 1"),
        ({"images": bytes_of((4, 8, 8)), "labels": np.array([0, 1, 10**12, 0])}, "1000000000000"),
        ({"images": bytes_of((1, 8, 8))}, "at least 2"),
        ({"images": bytes_of((0, 8, 8))}, "at least 2"),
    ],
)
def test_archives_that_cannot_be_data_say_why(tmp_path: Path, arrays: dict[str, np.ndarray], complaint: str) -> None:
    path = save(tmp_path / "a.npz", **arrays)
    refused("npz", path, str(path), complaint)


def test_npz_parts_of_two_shapes_and_constant_values_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "sizes.npz", images=bytes_of((4, 8, 8)), heldout_images=bytes_of((4, 8, 9)))
    refused("npz", path, "'sizes'", "(1, 8, 9)")
    refused("npz", save(tmp_path / "flat.npz", images=np.ones((4, 8, 8))), "'flat'", "standard deviation 0.0")


def test_files_that_are_no_archives_are_named(tmp_path: Path) -> None:
    refused("npz", "", "needs root")
    refused("npz", tmp_path / "nowhere.npz", str(tmp_path / "nowhere.npz"), "no file")
    whole = save(tmp_path / "whole.npz", images=bytes_of((4, 8, 8))).read_bytes()
    np.save(tmp_path / "bare.npy", bytes_of((4, 8, 8)))
    refused("npz", tmp_path / "bare.npy", str(tmp_path / "bare.npy"), "numpy.savez")
    flipped = bytearray(whole)
    flipped[300] ^= 1
    contents = {"empty": b"", "text": b"hello", "pickle": b"\x80\x04N.", "cut": whole[:-40], "flipped": bytes(flipped)}
    for name, content in contents.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        refused("npz", path, str(path))


@pytest.mark.parametrize("damage", [(b"'shape'", b"'shape("), (b"(4,", b"(9,"), (b"4, 8, 8)", b"9" * 8 + b")")])
def test_arrays_with_broken_headers_are_named(tmp_path: Path, damage: tuple[bytes, bytes]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, bytes_of((4, 8, 8)))
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", buffer.getvalue().replace(*damage))
    refused("npz", path, str(path), "'images'")
