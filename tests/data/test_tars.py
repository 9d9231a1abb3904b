"""Tars of images: what is a sample, its class and its caption, and what is refused."""

import io
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.data.folder import decode
from fewstep.data.latents.encode import EncodingWork, encode_folder
from fewstep.data.latents.shards import EncodingSettings, load_latents
from fewstep.data.pictures import ShardPictures, find_pictures
from fewstep.data.rows import Columns
from fewstep.data.sources import DataConfig, WebdatasetSource, load_dataset
from fewstep.data.tars import read_shards
from fewstep.utils.errors import ConfigError, DataError, FewstepWarning
from tests.support.photographs import SIDE, save_autoencoder, save_pictures
from tests.support.sources import bytes_of, refused


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(bytes_of((6, 8, 3), seed)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(file: Path, members: dict[str, bytes], kind: int = tarfile.USTAR_FORMAT) -> Path:
    """An hour old."""
    with tarfile.open(file, "w", format=kind) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    then = time.time() - 3600
    os.utime(file, (then, then))
    return file


def sample(number: int, **more: bytes) -> dict[str, bytes]:
    return {f"{number:03d}.png": png(number)} | {f"{number:03d}.{kind}": content for kind, content in more.items()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_runs_of_one_key(tmp_path: Path, kind: int) -> None:
    """In every format of tar; with folders, long names, several dots, capital endings, and what is no sample."""
    long = "deep/" * 14 + "0123456789" * 2
    members = {
        "a/1.json": b'{"label": "dog", "width": 8}', "a/1.JPG.txt": b"x", "a/1.PNG": png(1), "a/1.txt": b" one \n",
        "b/1.json": b'{"cls": "cat"}', "b/1.png": png(2), "b/1.txt": b"two",
        f"{long}.png": png(3), f"{long}.json": b'"dog"', f"{long}.txt": "dr\u00fc".encode(),
        "._hidden.png": b"no", "lonely.txt": b"nothing", "readme": b"hello",
    }  # fmt: skip
    found = read_shards(str(write_tar(tmp_path / "x.tar", members, kind)))
    assert [found.keys[k] for k in range(len(found))] == ["a/1", "b/1", long]
    assert [found.image(k) for k in range(3)] == [png(1), png(2), png(3)]
    assert (found.labels, found.class_names) == ((1, 0, 1), ("cat", "dog"))
    assert found.captions() == ("one", "two", "dr\u00fc")
    assert found.left_out == ("1 .jpg.txt", "4 .txt", "1 without suffix", "2 keys without an image")
    (tmp_path / "1.png").write_bytes(png(3))
    assert np.array_equal(ShardPictures(found).read(2, 4), decode(tmp_path / "1.png", 4))
    assert ShardPictures(found).size(2) == len(png(3))


def test_what_a_root_means(tmp_path: Path) -> None:
    """Tars in natural order: 2 before 10."""
    for number in (2, 10, 1):
        write_tar(tmp_path / f"train-{number}.tar", sample(number, cls=str(number % 3).encode()))
    write_tar(tmp_path / "val-000.tar", sample(0, cls=b"0"))
    keys = {
        str(tmp_path): ["001", "002", "010", "000"],
        str(tmp_path / "train-*.tar"): ["001", "002", "010"],
        str(tmp_path / "train-{1..2}.tar"): ["001", "002"],
        str(tmp_path / "val-{000..004}.tar"): ["000"],
        str(tmp_path / "train-10.tar"): ["010"],
    }
    for root, expected in keys.items():
        assert read_shards(root).keys.all() == expected
    found = read_shards(str(tmp_path))
    assert (found.labels, found.class_names) == ((1, 2, 1, 0), ("0", "1", "2"))
    assert found.name(2) == "train-10.tar:010"


def test_the_index_is_made_once_and_again_where_a_tar_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", sample(number) | sample(number + 5))
    first = read_shards(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.data.tars.tarfile.open", None)
        second = read_shards(str(tmp_path))
    assert second.keys.all() == first.keys.all() == ["000", "005", "001", "006"]
    assert [second.image(k) for k in range(4)] == [first.image(k) for k in range(4)]
    write_tar(tmp_path / "1.tar", sample(7))
    with pytest.raises(DataError, match=r"^'.*1\.tar' has changed since it was indexed: start again$"):
        second.image(2)
    with pytest.warns(FewstepWarning, match=r"has changed since it was indexed: it is indexed anew$"):
        assert read_shards(str(tmp_path)).keys.all() == ["000", "005", "007"]


TWO = sample(1, cls=b"0") | sample(2, cls=b"1")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (sample(1) | {"001.pyd": b"."}, r"x\.tar' has '001\.pyd', a pickle, which may run code"),
        ({"meta.pickle": b"."} | sample(1), r"x\.tar' has 'meta\.pickle', a pickle"),
        (sample(1, cls=b"0") | sample(2), r"has no class for 1 of 2 samples, first for x\.tar:002"),
        (sample(1, cls=b"cat"), r"x\.tar' has '001\.cls' that cannot be read"),
        (sample(1, json=b"{"), r"x\.tar' has '001\.json' that cannot be read"),
        (sample(1, cls=b"-1"), r"has classes from -1 to -1: number them 0, 1, 2"),
        (sample(1, webp=png()), r"x\.tar' has 2 images of key '001' \(png, webp\)"),
        ({"a.txt": b"words"}, r"has no images in 1 tars"),
    ],
)
def test_bad_members_are_one_line(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message) as said:
        read_shards(str(write_tar(tmp_path / "x.tar", members)))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda content: content[:700], r"is truncated or no tar"),
        (lambda content: content[:1300], r"is truncated or no tar"),
        (lambda content: content[:1024], r"stops without the empty block that ends a tar"),
        (lambda content: content[:1024] + b"x" * 512 + content[1536:], r"stops with a damaged header"),
        (lambda content: b"", r"is truncated or no tar \(empty file\)"),
        (lambda content: png(), r"is truncated or no tar"),
    ],
)
def test_a_truncated_tar_is_one_line(tmp_path: Path, cut: Callable[[bytes], bytes], message: str) -> None:
    file = write_tar(tmp_path / "x.tar", TWO)
    assert len(png(1)) < 512
    file.write_bytes(cut(file.read_bytes()))
    with pytest.raises(DataError, match=rf"^'{file}' .*{message}") as said:
        read_shards(str(file))
    assert "\n" not in str(said.value)


def test_places_without_tars_are_one_line(tmp_path: Path) -> None:
    refused("webdataset", tmp_path, "needs root, a .tar, a folder of those, or a pattern")
    refused("webdataset", "", "needs root, a .tar")
    (tmp_path / "x.tar.gz").write_bytes(b"")
    refused("webdataset", tmp_path, "x.tar.gz' is no plain tar", "unpack it to .tar")


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    members = {f"{k}.png": png(k) for k in range(4)} | {"9.png": b"no image"}
    config = DataConfig(WebdatasetSource(), root=str(write_tar(tmp_path / "x.tar", members)), image_size=4)
    for source in (WebdatasetSource(), WebdatasetSource(on_disk=True)):
        refused("webdataset", config.root, "x.tar:9", "cannot identify image file what lies there", image_size=4)
        skipping = DataConfig(source, root=config.root, image_size=4, skip_unreadable=True)
        with pytest.warns(FewstepWarning, match="1 of 5 images"):
            found = load_dataset(skipping)
        assert len(found.train) + len(found.heldout) == 4
        assert "1 unreadable" in found.summary


def test_tars_are_encoded_with_their_captions(tmp_path: Path) -> None:
    """To the latents of the same images in a folder."""
    folder = save_pictures(tmp_path / "images", {"cold": 5})
    files = sorted(folder.rglob("*.png"))
    members: dict[str, bytes] = {}
    for number, file in enumerate(files):
        members |= {f"{number}.png": file.read_bytes(), f"{number}.txt": b"cold"}
    tar = write_tar(tmp_path / "x.tar", members)
    save_autoencoder(tmp_path / "vae")
    settings, work = EncodingSettings(image_size=SIDE, heldout=0.3), EncodingWork(cpu=True, quiet=True)
    encode_folder(tar, tmp_path / "vae", tmp_path / "out", settings, work=work)
    encode_folder(folder / "cold", tmp_path / "vae", tmp_path / "same", settings, work=work)
    found, same = load_latents(str(tmp_path / "out")), load_latents(str(tmp_path / "same"))
    assert (found.mean, found.sigma_data) == (same.mean, same.sigma_data)
    pictures = find_pictures(tar, Columns())
    assert pictures.captions(None) == ("cold",) * 5
    with pytest.raises(ConfigError, match="leave out --captions"):
        pictures.captions(tmp_path / "captions.jsonl")
    with pytest.raises(ConfigError, match="no columns and splits"):
        find_pictures(tar, Columns(split="test"))
    worded = write_tar(tmp_path / "y.tar", sample(0, txt=b"a") | sample(1))
    with pytest.raises(DataError, match=r"has no caption, KEY\.txt with words, of y\.tar:001"):
        find_pictures(worded, Columns()).captions(None)
