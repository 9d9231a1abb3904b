"""Every data source, every way in which one can be wrong, the order of training, and augmentation."""

from __future__ import annotations

import gzip
import io
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fewstep.data import DataConfig, Dataset, Samples, batch_indices, load_dataset, random_flip
from fewstep.data import folder as folder_module
from fewstep.data import idx as idx_module
from fewstep.data.folder import decode, list_images
from fewstep.data.labels import split
from fewstep.errors import ConfigError, DataError, FewstepWarning, MissingExtraError, ShapeError
from fewstep.randomness import Draws


def load(source: str, root: Path | str = "", **settings: object) -> Dataset:
    return load_dataset(DataConfig(source=source, root=str(root), **settings))


def refused(source: str, root: Path | str, *parts: str, **settings: object) -> None:
    """Loading raises a DataError of one line that contains every part."""
    with pytest.raises(DataError) as caught:
        load(source, root, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def bytes_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# Samples and Dataset


def test_fetch_brings_bytes_to_minus_one_to_one_and_leaves_floats() -> None:
    values = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(3, 1, 1, 1)
    samples = Samples(values, torch.tensor([2, 0, 1]))
    x, labels = samples.fetch(torch.tensor([1, 0, 2, 1]))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.flatten(), torch.tensor([1.0, -1.0, -0.6, 1.0]))
    assert labels is not None
    assert labels.tolist() == [0, 2, 1, 0]
    floats = torch.randn(3, 1, 2, 2)
    assert torch.equal(Samples(floats).fetch(torch.arange(3))[0], floats)
    assert len(samples) == 3


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (torch.zeros(3, 2, 2), None),
        (torch.zeros(3, 1, 0, 2), None),
        (torch.zeros(3, 1, 2, 2, dtype=torch.float64), None),
        (torch.zeros(3, 1, 2, 2), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(3, 1, 2, 2), torch.zeros(3)),
    ],
)
def test_samples_of_other_shapes_or_types_are_refused(values: torch.Tensor, labels: torch.Tensor | None) -> None:
    with pytest.raises(DataError, match="give"):
        Samples(values, labels)


@pytest.mark.parametrize(
    "images", [bytes_of((50, 3, 9, 7)), np.float32(3e3 + np.random.default_rng(1).random((50, 1, 9, 7)))]
)
def test_moments_equal_those_of_numpy_however_the_values_are_chunked(
    images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.from_numpy(images)
    expected = images.astype(np.float64) / 127.5 - 1 if images.dtype == np.uint8 else images.astype(np.float64)
    prints = set()
    for size in (1, 1000, 1 << 22):
        monkeypatch.setattr("fewstep.data.base._CHUNK_ELEMENTS", size)
        dataset = Dataset("toy", Samples(values), Samples(values[:2]))
        assert dataset.mean == pytest.approx(expected.mean(), rel=1e-12)
        assert dataset.sigma_data == pytest.approx(expected.std(), rel=1e-9)
        prints.add(dataset.fingerprint)
    assert len(prints) == 1


def test_the_fingerprint_follows_contents_and_not_the_name() -> None:
    values, labels = torch.from_numpy(bytes_of((6, 1, 4, 4))), torch.tensor([0, 1, 0, 1, 0, 1])

    def fingerprint(values: torch.Tensor, labels: torch.Tensor, cut: int = 4, name: str = "a", one: str = "1") -> str:
        train, heldout = Samples(values[:cut], labels[:cut]), Samples(values[cut:], labels[cut:])
        return Dataset(name, train, heldout, 2, ("0", one)).fingerprint

    changed = values.clone()
    changed[5, 0, 3, 3] += 1
    base = fingerprint(values, labels)
    assert base == fingerprint(values.clone(), labels.clone(), name="b")
    others = {
        fingerprint(changed, labels),
        fingerprint(values, 1 - labels),
        fingerprint(values, labels, cut=3),
        fingerprint(values, labels, one="one"),
    }
    assert len(others | {base}) == 5


def test_datasets_whose_parts_do_not_fit_are_refused() -> None:
    values, labels = torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    good = Samples(values, labels)
    names = ("a", "b", "c")
    with pytest.raises(DataError, match="at least one of each"):
        Dataset("toy", good, Samples(values[:0], labels[:0]), 3, names)
    with pytest.raises(DataError, match="held-out samples of shape"):
        Dataset("toy", good, Samples(torch.randn(4, 1, 2, 3), labels), 3, names)
    with pytest.raises(DataError, match="class names"):
        Dataset("toy", good, good, 3, ("a",))
    with pytest.raises(DataError, match="labels from 0 to 2: give labels from 0 to 1"):
        Dataset("toy", good, good, 2, ("a", "b"))
    with pytest.raises(DataError, match="no labels for its held-out"):
        Dataset("toy", good, Samples(values), 3, names)
    for bad in (torch.full_like(values, 0.5), torch.full_like(values, float("nan"))):
        with pytest.raises(DataError, match="standard deviation"):
            Dataset("toy", Samples(bad), Samples(values))


# Splits


@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=80),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_splits_are_disjoint_complete_stratified_and_repeatable(labels: list[int], fraction: float, seed: int) -> None:
    count = len(labels)
    samples = Samples(torch.arange(count, dtype=torch.float32).reshape(-1, 1, 1, 1), torch.tensor(labels))
    train, heldout = split(samples, fraction, seed)
    assert sorted(torch.cat([train.values, heldout.values]).flatten().tolist()) == list(range(count))
    assert len(heldout) == min(max(round(fraction * count), 1), count - 1)
    assert heldout.labels is not None
    for label in set(labels):
        share = labels.count(label) * len(heldout) / count
        assert abs(heldout.labels.tolist().count(label) - share) <= 1
    assert torch.equal(split(samples, fraction, seed)[1].values, heldout.values)


# Digits


def test_digits_are_in_range_split_evenly_and_repeatably() -> None:
    digits = load("digits")
    assert (digits.name, digits.shape, digits.num_classes) == ("digits", (1, 8, 8), 10)
    assert (len(digits.train), len(digits.heldout)) == (1204, 593)
    assert float(digits.train.values.min()) == -1.0
    assert float(digits.train.values.max()) == 1.0
    assert digits.train.labels is not None
    assert digits.heldout.labels is not None
    shares = torch.bincount(digits.train.labels) / torch.bincount(digits.heldout.labels)
    assert torch.allclose(shares, torch.full((10,), 1204 / 593), rtol=0.05)
    rows = {tuple(row) for row in digits.train.values.flatten(1).tolist()}
    assert not rows & {tuple(row) for row in digits.heldout.values.flatten(1).tolist()}
    assert digits.fingerprint == load("digits").fingerprint
    assert digits.fingerprint != load("digits", seed=1).fingerprint


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install fewstep\[digits\]"):
        load("digits")


def test_digits_in_colour_are_the_grey_thrice() -> None:
    colour, grey = load("digits", channels=3), load("digits")
    assert colour.shape == (3, 8, 8)
    assert torch.equal(colour.train.values, grey.train.values.expand(-1, 3, -1, -1))


# IDX files


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


# Image folders


def write_image(path: Path, array: np.ndarray | None = None, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(bytes_of((6, 6, 3), len(str(path))) if array is None else array).save(path, **options)


def test_subfolders_are_classes_at_any_depth_and_other_files_are_ignored(tmp_path: Path) -> None:
    for name in ("dog/1.png", "dog/more/2.PNG", "cat/1.webp", "cat/2.jpg", "cat/3.jpeg"):
        write_image(tmp_path / name)
    for name in ("cat/.hidden.png", ".trash/4.png", "cat/notes.txt", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not an image")
    listing = list_images(str(tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in listing.files] == [
        "cat/1.webp",
        "cat/2.jpg",
        "cat/3.jpeg",
        "dog/1.png",
        "dog/more/2.PNG",
    ]
    assert (listing.labels, listing.ignored) == ((0, 0, 0, 1, 1), 3)
    dataset = load("images", tmp_path)
    assert (dataset.class_names, dataset.shape) == (("cat", "dog"), (3, 6, 6))
    assert len(dataset.train) + len(dataset.heldout) == 5


def test_images_without_subfolders_have_no_labels(tmp_path: Path) -> None:
    for name in "abcd":
        write_image(tmp_path / f"{name}.png", bytes_of((5, 7)))
    dataset = load("images", tmp_path, heldout=0.5)
    assert (dataset.shape, dataset.num_classes, dataset.train.labels) == ((1, 5, 7), 0, None)
    assert load("images", tmp_path, channels=3).shape == (3, 5, 7)


def test_links_to_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    write_image(tmp_path / "store" / "1.png")
    write_image(tmp_path / "data" / "own" / "1.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "own" / "circle").symlink_to(tmp_path / "data")
    assert list_images(str(tmp_path / "data")).class_names == ("linked", "own")


def test_one_grey_image_among_colours_becomes_colour(tmp_path: Path) -> None:
    grey = bytes_of((6, 6))
    write_image(tmp_path / "a.png", grey)
    write_image(tmp_path / "b.png")
    write_image(tmp_path / "c.png")
    dataset = load("images", tmp_path)
    everything = torch.cat([dataset.train.values, dataset.heldout.values])
    assert any(np.array_equal(image.numpy(), np.stack([grey] * 3)) for image in everything)


def test_colour_becomes_the_grey_that_pillow_gives(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", bytes_of((40, 40, 3), 1))
    write_image(tmp_path / "b.png", bytes_of((40, 40, 3), 2))
    dataset = load("images", tmp_path, channels=1, heldout=0.5)
    expected = {Image.open(path).convert("L").tobytes() for path in tmp_path.iterdir()}
    assert {part.values[0].numpy().tobytes() for part in (dataset.train, dataset.heldout)} == expected


def test_mixed_sizes_are_cut_to_the_centre_square(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = (255, 0, 0)
    write_image(tmp_path / "wide.png", wide)
    write_image(tmp_path / "tall.png", wide.transpose(1, 0, 2).copy())
    refused("images", tmp_path, "wide.png", "tall.png", "24x8", "8x24", "image_size")
    dataset = load("images", tmp_path, image_size=4)
    for samples in (dataset.train, dataset.heldout):
        assert samples.shape == (3, 4, 4)
        assert (samples.values[:, 0] > 230).all()
        assert (samples.values[:, 0, 1:3, 1:3] == 255).all()
        assert (samples.values[:, 1:] == 0).all()


def test_resizing_is_antialiased(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    assert abs(decode(tmp_path / "a.png", 8).astype(int) - 128).max() <= 6


def test_every_mode_is_brought_to_eight_bits_over_white(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_image(path, np.array([[0, 257, 65535]], np.uint16))
    assert decode(path).tolist() == [[0, 1, 255]]
    write_image(path, np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8))
    assert decode(path).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    write_image(path, np.array([[[10, 255], [10, 0]]], np.uint8))
    assert decode(path).tolist() == [[10, 255]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.putpixel((1, 0), 1)
    palette.save(path)
    assert decode(path).tolist() == [[[1, 2, 3], [4, 5, 6]]]
    palette.save(path, transparency=1)
    assert decode(path).tolist() == [[[1, 2, 3], [255, 255, 255]]]
    Image.new("1", (1, 1), 1).save(path)
    assert decode(path).tolist() == [[255]]
    Image.new("CMYK", (1, 1)).save(tmp_path / "a.jpg")
    assert decode(tmp_path / "a.jpg").tolist() == [[[255, 255, 255]]]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    array = bytes_of((2, 3, 3))
    write_image(tmp_path / "a.png", array, exif=exif)
    assert np.array_equal(decode(tmp_path / "a.png"), np.rot90(array, -1))


def test_image_folders_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    refused("images", "", "needs root")
    refused("images", tmp_path / "nowhere", str(tmp_path / "nowhere"), "no folder")
    (tmp_path / "notes.txt").write_text("x")
    refused("images", tmp_path / "notes.txt", str(tmp_path / "notes.txt"), "no folder")
    refused("images", tmp_path, str(tmp_path), "no PNG, JPEG or WebP images", "1 other")
    write_image(tmp_path / "a.png")
    refused("images", tmp_path, str(tmp_path), "1 samples", "at least 2")
    write_image(tmp_path / "cat" / "b.png")
    refused("images", tmp_path, str(tmp_path), "1 images beside", "'a.png'")
    write_image(tmp_path / "sets" / "train" / "a.png")
    write_image(tmp_path / "sets" / "test" / "a.png")
    refused("images", tmp_path / "sets", str(tmp_path / "sets"), "splits", "test, train")


def broken_images(folder: Path) -> list[str]:
    """Two good images and four broken ones, whose names are returned."""
    write_image(folder / "good1.png")
    write_image(folder / "good2.png")
    buffer = io.BytesIO()
    Image.fromarray(bytes_of((64, 64, 3))).save(buffer, "PNG")
    (folder / "cut.png").write_bytes(buffer.getvalue()[:5000])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.webp").write_bytes(b"<html>404</html>")
    Image.new("L", (4, 4)).save(folder / "other.png", "TIFF")
    return ["cut.png", "empty.jpg", "text.webp", "other.png"]


def test_unreadable_images_are_all_named_or_skipped_with_a_warning(tmp_path: Path) -> None:
    bad = broken_images(tmp_path)
    refused("images", tmp_path, str(tmp_path), "4 of 6 images", "skip_unreadable", *bad)
    with pytest.warns(FewstepWarning, match=r"(?s)4 of 6 images.*cut\.png.*skipped"):
        dataset = load("images", tmp_path, skip_unreadable=True)
    assert len(dataset.train) + len(dataset.heldout) == 2
    (tmp_path / "good1.png").unlink()
    (tmp_path / "good2.png").unlink()
    refused("images", tmp_path, "4 of 4 images", "no image is left", skip_unreadable=True)


def test_labels_stay_with_their_images_when_some_are_skipped(tmp_path: Path) -> None:
    for index in range(4):
        write_image(tmp_path / f"class{index % 2}" / f"{index}.png", np.full((2, 2), index % 2 * 99 + 1, np.uint8))
    (tmp_path / "class0" / "00.png").write_bytes(b"")
    with pytest.warns(FewstepWarning, match=r"00\.png"):
        dataset = load("images", tmp_path, skip_unreadable=True, heldout=0.5)
    for samples in (dataset.train, dataset.heldout):
        assert samples.labels is not None
        assert (samples.values[:, 0, 0, 0] == samples.labels * 99 + 1).all()


def test_only_the_first_ten_unreadable_images_are_named(tmp_path: Path) -> None:
    for index in range(12):
        (tmp_path / f"bad{index:02}.png").write_bytes(b"")
    refused("images", tmp_path, "12 of 12", "bad09.png", "and 2 more")
    with pytest.raises(DataError) as caught:
        load("images", tmp_path)
    assert "bad10.png" not in str(caught.value)


def test_decompression_bombs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "small.png", bytes_of((2, 2)))
    write_image(tmp_path / "bomb.png", bytes_of((20, 20)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused("images", tmp_path, "1 of 2", "'bomb.png'", "DecompressionBombError")


def test_images_too_large_for_memory_ask_for_a_smaller_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png")
    monkeypatch.setattr(folder_module.np, "empty", full)
    refused("images", tmp_path, "2 images of 6x6", "image_size")


# NumPy archives


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


# Random latents and the configuration


def test_random_latents_are_standard_normal_and_repeatable() -> None:
    settings: dict[str, object] = {"random_shape": (2, 8, 8), "random_classes": 5, "random_count": 600}
    dataset = load("random", **settings)
    assert (dataset.shape, dataset.num_classes, len(dataset.train) + len(dataset.heldout)) == ((2, 8, 8), 5, 600)
    assert abs(dataset.mean) < 0.02
    assert abs(dataset.sigma_data - 1) < 0.02
    assert dataset.train.labels is not None
    assert set(dataset.train.labels.tolist()) == set(range(5))
    assert dataset.fingerprint == load("random", **settings).fingerprint
    assert dataset.fingerprint != load("random", **settings, seed=1).fingerprint
    assert load("random", **settings | {"random_classes": 0}).num_classes == 0
    with pytest.raises(DataError, match="'random' has 2 channels"):
        load("random", **settings, channels=3)


def test_sizes_are_asked_for_only_where_images_are_resized() -> None:
    assert load("digits", image_size=8).shape == (1, 8, 8)
    refused("digits", "", "'digits'", "8x8", "image_size", image_size=16)


@pytest.mark.parametrize(
    "settings",
    [
        {"source": "mnist"},
        {"heldout": 0.0},
        {"heldout": 1.0},
        {"heldout": float("nan")},
        {"image_size": -1},
        {"channels": 2},
        {"random_shape": (0, 8, 8)},
        {"random_classes": -1},
        {"random_count": 1},
    ],
)
def test_configurations_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="give"):
        load_dataset(DataConfig(**settings))


# Order and augmentation


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(1, 30),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 100),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=6),
)
def test_any_split_into_batches_reads_one_sequence_of_permutations(
    count: int, seed: int, start: int, sizes: list[int]
) -> None:
    first_epoch = start // count
    end = start + sum(sizes)
    epochs = [
        batch_indices(count, seed, epoch * count, count).tolist() for epoch in range(first_epoch, end // count + 1)
    ]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    sequence = [index for epoch in epochs for index in epoch][start - first_epoch * count :]
    position, read = start, []
    for size in sizes:
        batch = batch_indices(count, seed, position, size)
        assert batch.shape == (size,)
        read += batch.tolist()
        position += size
    assert read == sequence[: sum(sizes)]


def test_orders_differ_by_epoch_and_seed_and_cannot_be_spoilt() -> None:
    first = batch_indices(100, 0, 0, 100)
    assert not torch.equal(first, batch_indices(100, 0, 100, 100))
    assert not torch.equal(first, batch_indices(100, 1, 0, 100))
    kept = first.clone()
    first.zero_()
    assert torch.equal(batch_indices(100, 0, 0, 100), kept)


@pytest.mark.parametrize(("count", "start", "size"), [(0, 0, 1), (5, -1, 1), (5, 0, 0)])
def test_batches_that_do_not_exist_are_refused(count: int, start: int, size: int) -> None:
    with pytest.raises(ShapeError, match="give at least one sample"):
        batch_indices(count, 0, start, size)


def test_flips_mirror_about_half_of_the_samples_whatever_the_batch() -> None:
    x = torch.randn(400, 2, 3, 4)
    draws = Draws(0, 7, torch.arange(400))
    flipped = random_flip(x, draws, 3)
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    assert ((flipped == x).flatten(1).all(1) ^ mirrored).all()
    assert 160 < int(mirrored.sum()) < 240
    parts = [random_flip(x[part], Draws(0, 7, part), 3) for part in torch.arange(400).split(150)]
    assert torch.equal(torch.cat(parts), flipped)
    for bad in (x[:5], x[:, 0]):
        with pytest.raises(ShapeError, match="one draw per sample"):
            random_flip(bad, draws, 3)
