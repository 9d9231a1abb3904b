"""Folders of images."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data import folder as folder_module
from fewstep.data.folder import decode, list_images
from fewstep.utils.errors import DataError, FewstepWarning
from tests.support.sources import bytes_of, load, refused


def write_image(path: Path, array: np.ndarray | None = None, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(bytes_of((6, 6, 3), len(str(path))) if array is None else array).save(path, **options)


def test_subfolders_are_classes_at_any_depth_and_other_files_are_ignored(tmp_path: Path) -> None:
    for name in ("dog/1.png", "dog/more/2.PNG", "cat/1.webp", "cat/2.jpg", "cat/3.jpeg"):
        write_image(tmp_path / name)
    for name in ("cat/.hidden.png", ".trash/4.png", "cat/notes.txt", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not an image")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_bytes(b"not an image")
    (tmp_path / "bird").mkdir()
    listing = list_images(str(tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in listing.files] == [
        "cat/1.webp",
        "cat/2.jpg",
        "cat/3.jpeg",
        "dog/1.png",
        "dog/more/2.PNG",
    ]
    assert listing.labels == (0, 0, 0, 1, 1)
    assert listing.left_out == ("2 .txt", "1 hidden", "1 without suffix", "2 folders without images (bird, notes)")
    dataset = load("images", tmp_path)
    assert dataset.left_out == listing.left_out
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
    listing = list_images(str(tmp_path / "data"))
    assert listing.class_names == ("linked", "own")
    assert listing.left_out == ("1 links to folders that are read already",)


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


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_frames_beyond_the_first_are_counted(tmp_path: Path, suffix: str) -> None:
    frames = [Image.fromarray(np.eye(16, dtype=np.uint8) * 100 * k) for k in range(3)]
    frames[1].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[2:])
    frames[2].save(tmp_path / f"b.{suffix}")
    assert load("images", tmp_path, heldout=0.5).left_out == ("all frames but the first of 1 images",)
    assert 50 < decode(tmp_path / f"a.{suffix}").max() < 150


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
    refused("images", tmp_path, str(tmp_path), "1 sample:", "at least 2")
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
    Image.new("L", (4, 4)).save(folder / "other.png", "EPS")  # a program, which Pillow would have run
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
