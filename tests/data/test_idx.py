"""MNIST's file format."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from fewstep.data import idx as idx_module
from tests.support.sources import bytes_of, load, refused


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, joint: str = "-", gz: bool = False, train: int = 12, test: int = 5) -> None:
    for part, count in (("train", train), ("t10k", test)):
        for kind, array in (
            (f"images{joint}idx3-ubyte", bytes_of((count, 6, 5))),
            (f"labels{joint}idx1-ubyte", np.arange(count, dtype=np.uint8) % 3),
        ):
            content = idx_bytes(array)
            path = folder / f"{part}-{kind}{'.gz' if gz else ''}"
            path.write_bytes(gzip.compress(content) if gz else content)


@pytest.mark.parametrize("joint", ["-", "."])
@pytest.mark.parametrize("gz", [False, True])
def test_idx_files_are_read_under_each_of_their_names(tmp_path: Path, joint: str, gz: bool) -> None:
    write_idx(tmp_path, joint, gz)
    dataset = load("idx", tmp_path)
    assert (len(dataset.train), len(dataset.heldout), dataset.shape) == (12, 5, (1, 6, 5))
    assert dataset.class_names == ("0", "1", "2")
    assert np.array_equal(dataset.train.values[:, 0].numpy(), bytes_of((12, 6, 5)))
    assert dataset.heldout.labels is not None
    assert dataset.heldout.labels.tolist() == [0, 1, 2, 0, 1]


def test_idx_labels_and_test_files_are_optional(tmp_path: Path) -> None:
    write_idx(tmp_path)
    for name in ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte", "t10k-images-idx3-ubyte"):
        (tmp_path / name).unlink()
    dataset = load("idx", tmp_path, heldout=0.25)
    assert (len(dataset.train), len(dataset.heldout), dataset.num_classes) == (9, 3, 0)
    assert dataset.train.labels is None


def test_idx_without_a_root_takes_debians_folder_or_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx_module, "FASHION_MNIST", tmp_path / "fashion-mnist")
    refused("idx", "", "needs root", "dataset-fashion-mnist", str(tmp_path / "fashion-mnist"))
    (tmp_path / "fashion-mnist").mkdir()
    write_idx(tmp_path / "fashion-mnist")
    assert load("idx").name == "fashion-mnist"


def test_idx_folders_that_are_missing_or_empty_are_named(tmp_path: Path) -> None:
    refused("idx", tmp_path / "nowhere", str(tmp_path / "nowhere"), "not a folder")
    refused("idx", tmp_path, str(tmp_path), "train-images-idx3-ubyte")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "0 bytes"),
        (idx_bytes(np.zeros(12, np.uint8)), "0x00000801"),
        (idx_bytes(bytes_of((12, 6, 5)))[:-1], "holds 359"),
        (idx_bytes(bytes_of((12, 6, 5))) + b"x", "holds 361"),
        (gzip.compress(idx_bytes(bytes_of((12, 6, 5))))[:-20], "end-of-stream"),
        (b"\x1f\x8bnonsense", "cannot read"),
    ],
)
def test_broken_idx_images_are_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    refused("idx", tmp_path, str(path), complaint)


def test_idx_labels_of_another_count_are_named(tmp_path: Path) -> None:
    write_idx(tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte"
    path.write_bytes(idx_bytes(np.zeros(4, np.uint8)))
    refused("idx", tmp_path, str(path), "4 labels", "5 images")
