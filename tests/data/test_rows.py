"""Rows of a Hugging Face dataset as images to encode: which columns, which errors, the same latents as a folder."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fewstep.data.base import Dataset
from fewstep.data.folder import decode
from fewstep.data.latents.encode import EncodingWork, encode_folder
from fewstep.data.latents.shards import EncodingSettings, load_latents
from fewstep.data.pictures import RowPictures
from fewstep.data.rows import Columns, ImageRows, find_caption_column, find_image_column, holds_rows, read_rows
from fewstep.data.sources import DataConfig, HuggingFaceSource, load_dataset
from fewstep.utils.errors import CheckpointError, DataError, FewstepError, FewstepWarning
from tests.support.photographs import SIDE, save_autoencoder, save_pictures

ORDINARY = Columns()
WORK = EncodingWork(batch_size=4, cpu=True, quiet=True)
SETTINGS = EncodingSettings(image_size=SIDE, shard_size=4, heldout=0.3, dtype="float32")


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def rows(*values: tuple[bytes | None, Any], texts: str = "text", **more: Any) -> ImageRows:
    held = [{"image": {"bytes": content, "path": None}, "text": text, "label": 1} for content, text in values]
    return ImageRows("'data'", held, "image", texts, "label", ("image", "text", "label", "url"), **more)


def test_a_rows_image_is_read_as_its_file_would_be(tmp_path: Path) -> None:
    found = rows((png(), " a one\n"), (png(1), "two"))
    assert found.captions() == ("a one", "two")
    assert found.left_out == ("column url",)
    (tmp_path / "1.png").write_bytes(png(1))
    assert np.array_equal(found.decode(1, 4), decode(tmp_path / "1.png", 4))  # type: ignore[arg-type]
    assert found.content(1) == png(1)
    assert (found.labels(), rows((png(), "a"), class_names=("cat", "dog")).labels()) == (None, (1,))
    assert "UnidentifiedImageError: cannot identify image file what lies there" in str(
        rows((b"no image", "a")).decode(0, 4)
    )
    assert RowPictures(rows((png(), "a"))).place == "data"


def test_a_rows_file_lies_in_the_datasets_own_folders(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for name in ("own/in.png", "out.png"):
        (tmp_path / name).write_bytes(png(1))
    (tmp_path / "own" / "link.png").symlink_to(tmp_path / "out.png")
    for name, content in (("own/in.png", png(1)), ("out.png", b""), ("own/../out.png", b""), ("own/link.png", b"")):
        named = [{"image": {"bytes": None, "path": str(tmp_path / name)}}]
        assert ImageRows("'data'", named, "image", "", "", (), folders=(tmp_path / "own",)).content(0) == content


@pytest.mark.parametrize(
    ("found", "ask", "message"),
    [
        (rows((png(), "a"), (png(), None)), ImageRows.captions, r"'data' has no caption, in words, for row 1:"),
        (rows((png(), " "), (png(), "a")), ImageRows.captions, r"has captions without a word for row 0:"),
        (
            rows((None, "a"), *[(b"", "a")] * 6),
            ImageRows.captions,
            r"captions without image for row 0, .*4 and 2 more:",
        ),
        (rows((png(), "a"), texts=""), ImageRows.captions, r"no column of captions .*\(image, text, label, url\)"),
        (rows((png(), "a"), class_names=("cat",)), ImageRows.labels, r"has no class for row 0:"),
    ],
)
def test_rows_that_lack_something_are_named(found: ImageRows, ask: Callable[[ImageRows], Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ask(found)


def test_columns_are_found_or_asked_for() -> None:
    kinds = {"jpg": "Image", "caption": "Value", "id": "Value"}
    assert find_image_column("'d'", kinds, ORDINARY) == "jpg"
    assert find_image_column("'d'", kinds, Columns(image_column="id")) == "id"
    assert find_caption_column("'d'", tuple(kinds), ORDINARY) == "caption"
    assert find_caption_column("'d'", ("jpg",), ORDINARY) == ""
    for kind, message in (
        ({"a": "Image", "b": "Image"}, r"several columns of images \(a, b\): name one with --image-column"),
        ({"a": "Value"}, r"no column of images among its columns \(a\)"),
    ):
        with pytest.raises(DataError, match=message):
            find_image_column("'d'", kind, ORDINARY)
    with pytest.raises(DataError, match=r"no column 'words'; its columns are jpg, caption, id"):
        find_caption_column("'d'", tuple(kinds), Columns(caption_column="words"))


def test_what_is_a_dataset_and_what_a_folder_of_images(tmp_path: Path) -> None:
    folder = save_pictures(tmp_path / "images", {"cold": 1})
    assert not holds_rows(folder)
    (folder / "more.parquet").write_bytes(b"")
    assert not holds_rows(folder)
    (tmp_path / "rows" / "data").mkdir(parents=True)
    assert not holds_rows(tmp_path / "rows")
    (tmp_path / "rows" / "data" / "train-0.parquet").write_bytes(b"")
    assert holds_rows(tmp_path / "rows")
    assert holds_rows(tmp_path / "rows" / "data" / "train-0.parquet")
    assert holds_rows(Path("nobody-here/flowers"))
    assert not holds_rows(tmp_path / "gone" / "flowers")
    with pytest.raises(FewstepError, match="is a folder of images, which has no columns"):
        encode_folder(folder, tmp_path, tmp_path / "out", SETTINGS, columns=Columns(split="test"))


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Nine pictures in a folder, and the same in order as rows, in two files of one split and a third of another."""
    pytest.importorskip("datasets")
    pa, write = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet").write_table
    folder = save_pictures(tmp_path / "images", {"cold": 9})
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(folder.rglob("*.png"))]
    values = {"image": images, "text": [f"picture {k}" for k in range(9)], "label": [k % 2 for k in range(9)]}
    features = {
        "image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["a", "b"], "_type": "ClassLabel"},
    }  # fmt: skip
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    whole = pa.table(values).replace_schema_metadata(about)
    (tmp_path / "rows").mkdir()
    for name, first, count in (
        ("train-00000-of-00002", 0, 5),
        ("train-00001-of-00002", 5, 4),
        ("test-00000-of-00001", 0, 2),
    ):
        write(whole.slice(first, count), tmp_path / "rows" / f"{name}.parquet")
    save_autoencoder(tmp_path / "vae")
    return tmp_path


def test_a_folder_of_parquet_gives_the_latents_of_its_images(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is stopped; its classes come along, and other rows are refused."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    files, vae = parquet / "rows", parquet / "vae"
    manifest = encode_folder(files, vae, parquet / "out", SETTINGS, work=WORK)
    encode_folder(parquet / "images" / "cold", vae, parquet / "same", SETTINGS, work=WORK)
    assert (manifest.count, manifest.class_names, len(manifest.shards)) == (9, ("a", "b"), 3)
    for shard in manifest.shards:
        found, expected = (load_file(parquet / name / shard.file) for name in ("out", "same"))
        assert torch.equal(found["latents"], expected["latents"])
    before = {file.name: file.read_bytes() for file in (parquet / "out").iterdir()}
    (parquet / "out" / "latents-00001.safetensors").unlink()
    encode_folder(files, vae, parquet / "out", SETTINGS, work=WORK)
    assert {file.name: file.read_bytes() for file in (parquet / "out").iterdir()} == before
    assert load_latents(str(parquet / "out")).num_classes == 2
    with pytest.raises(CheckpointError, match="is of other images than row 0 to row 1"):
        encode_folder(files, vae, parquet / "out", SETTINGS, work=WORK, columns=Columns(split="test"))
    with pytest.raises(DataError, match=r"no column 'picture'; its columns are image, text, label"):
        encode_folder(files, vae, parquet / "new", SETTINGS, work=WORK, columns=Columns("picture"))
    with pytest.raises(DataError, match=r"holds no dataset that can be read: .*validation"):
        encode_folder(files, vae, parquet / "new", SETTINGS, work=WORK, columns=Columns(split="validation"))
    (parquet / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="holds no dataset that can be read"):
        encode_folder(parquet / "broken.parquet", vae, parquet / "new", SETTINGS, work=WORK)
    assert not (parquet / "new").exists()


def config_of(root: Path, **settings: Any) -> DataConfig:
    return DataConfig(HuggingFaceSource(**settings), root=str(root), image_size=4)


def every(data: Dataset) -> list[bytes]:
    """The content of each sample."""
    parts = [part.fetch(torch.arange(len(part)))[0] for part in (data.train, data.heldout)]
    return sorted(each.numpy().tobytes() for each in torch.cat(parts))


@pytest.mark.parametrize("there", [False, True], ids=["memory", "on-disk"])
def test_every_form_of_a_dataset_trains(parquet: Path, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet, a folder of it, both that save_to_disk writes, and the Hub's cache: the same samples."""
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    rows = parquet / "rows"
    parts = datasets.load_dataset(str(rows))
    parts["train"].save_to_disk(parquet / "one")
    parts.save_to_disk(parquet / "several")
    copy = parquet / "hub" / "datasets--me--pictures"
    (copy / "refs").mkdir(parents=True)
    (copy / "refs" / "main").write_text("0" * 40)
    shutil.copytree(rows, copy / "snapshots" / ("0" * 40))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(parquet / "hub"))
    monkeypatch.chdir(parquet)
    memory = load_dataset(DataConfig("images", root=str(parquet / "images" / "cold"), image_size=4))  # type: ignore[arg-type]
    for place in (rows, parquet / "one", parquet / "several", Path("me/pictures")):
        found = load_dataset(config_of(place, on_disk=there))
        assert found.class_names == ("a", "b")
        assert len(found.train) + len(found.heldout) == 9
        assert every(found) == every(memory)
        test = load_dataset(config_of(place, on_disk=there, split="test")) if place.name != "one" else None
        assert test is None or len(test.train) + len(test.heldout) == 2
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_second_start_decodes_no_row(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_dataset(config_of(parquet / "rows", on_disk=True))
    with monkeypatch.context() as patch:
        patch.setattr(ImageRows, "content", None)
        second = load_dataset(config_of(parquet / "rows", on_disk=True))
    assert (second.fingerprint, second.sigma_data) == (first.fingerprint, first.sigma_data)


def test_classes_may_be_numbers_or_words(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    values = {
        "image": [{"bytes": png(k), "path": None} for k in range(4)], "number": [2, 0, 2, 0],
        "word": ["dog", "cat", "dog", "cat"], "hole": [None, "a", "b", "c"],
    }  # fmt: skip
    datasets.Dataset.from_dict(values).to_parquet(tmp_path / "x.parquet")
    root = tmp_path / "x.parquet"
    assert load_dataset(config_of(root)).num_classes == 0
    assert load_dataset(config_of(root, label_column="word")).class_names == ("cat", "dog")
    with pytest.warns(FewstepWarning, match="no sample of class 1"):
        assert load_dataset(config_of(root, label_column="number")).class_names == ("0", "2")
    for column, message in (("hole", "no numbers from 0 or words in every row"), ("gone", "no column 'gone'; its col")):
        with pytest.raises(DataError, match=message):
            load_dataset(config_of(root, label_column=column))


def test_bad_datasets_are_one_line(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(parquet / "hub"))
    monkeypatch.chdir(parquet)
    datasets.Dataset.from_dict({"a": [1, 2]}).to_parquet(parquet / "bare.parquet")
    (parquet / "cut.parquet").write_bytes((parquet / "rows" / "train-00000-of-00002.parquet").read_bytes()[:-40])
    datasets.load_dataset(str(parquet / "rows")).save_to_disk(parquet / "several")
    for root, settings, parts in (
        ("bare.parquet", {}, ["no column of images among its columns (a)", "name one with --data.source.image-column"]),
        ("cut.parquet", {}, ["holds no dataset that can be read"]),
        ("rows", {"split": "validation"}, ["holds no dataset that can be read", "validation"]),
        ("several", {"split": "validation"}, ["it has no split 'validation', but train, test"]),
        ("nobody/nothing", {}, ["nothing is fetched while training", "hf download --repo-type dataset nobody/nothing"]),
        ("", {}, ["needs root"]),
    ):
        with pytest.raises(DataError) as said:
            load_dataset(DataConfig(HuggingFaceSource(**settings), root=root, image_size=4))
        assert "\n" not in str(said.value)
        assert all(part in str(said.value) for part in parts), said.value


def test_only_the_columns_that_are_asked_for_are_read(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions, classes and the images' sizes come without an image's bytes."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    found = read_rows(parquet / "rows", ORDINARY)
    whole = tuple(len(found.content(k)) for k in range(len(found)))
    monkeypatch.setattr(ImageRows, "content", None)
    assert found.sizes == whole
    assert found.captions()[8] == "picture 8"
    assert found.labels() == (0, 1, 0, 1, 0, 1, 0, 1, 0)
