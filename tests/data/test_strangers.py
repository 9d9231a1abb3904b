"""Files from strangers: nothing outside them is read, no more is read than they announce, and the culprit is named."""

import gzip
import json
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.data.base import Dataset
from fewstep.data.demonstrations.importers import import_minari, import_robomimic
from fewstep.data.latents.encode import EncodingWork, encode_folder
from fewstep.data.latents.shards import EncodingSettings, fingerprint
from fewstep.utils.errors import CheckpointError, ConfigError, DataError, FewstepError
from tests.support.photographs import SIDE, save_autoencoder, save_pictures
from tests.support.sources import bytes_of, load, refused

h5py = pytest.importorskip("h5py")


def external_link(group: Any, secret: Path) -> None:
    group["obs/object"] = h5py.ExternalLink(str(secret), "/x")


def link_to_an_external_link(group: Any, secret: Path) -> None:
    group.file["hidden"] = h5py.ExternalLink(str(secret), "/x")
    group["obs/object"] = h5py.SoftLink("/hidden")


def external_storage(group: Any, secret: Path) -> None:
    group["obs"].create_dataset("object", shape=(5, 3), dtype="f8", external=[(str(secret), 0, 120)])


def virtual_array(group: Any, secret: Path) -> None:
    layout = h5py.VirtualLayout(shape=(5, 3), dtype="f8")
    layout[:] = h5py.VirtualSource(str(secret), "x", shape=(5, 3))
    group["obs"].create_virtual_dataset("object", layout)


def linked_episode(group: Any, secret: Path) -> None:
    del group.file["data/demo_1"]
    group.file["data/demo_1"] = h5py.ExternalLink(str(secret), "/episode")


@pytest.mark.parametrize(
    "copy", [external_link, link_to_an_external_link, external_storage, virtual_array, linked_episode]
)
def test_arrays_of_other_files_are_refused(tmp_path: Path, copy: Callable[[Any, Path], None]) -> None:
    secret, file = tmp_path / "secret.hdf5", tmp_path / "demonstrations.hdf5"
    with h5py.File(secret, "w") as opened:
        opened["x"] = np.random.rand(5, 3)
        opened["episode/actions"], opened["episode/obs/object"] = np.random.rand(5, 2), np.random.rand(5, 3)
    with h5py.File(file, "w") as opened:
        for number in range(2):
            group = opened.create_group(f"data/demo_{number}")
            group["actions"] = np.random.rand(5, 2)
            group.create_group("obs")
            if not number:
                group["obs/object"] = np.random.rand(5, 3)
        copy(group, secret)
    with pytest.raises(DataError, match=r"lies in another file: copy its numbers into this one"):
        import_robomimic(file, ("object",))
    with h5py.File(file, "a") as opened:
        opened["episode_0/actions"] = np.random.rand(5, 2)
        opened["episode_0/observations"] = h5py.ExternalLink(str(secret), "/episode/obs")
    with pytest.raises(DataError, match=r"lies in another file"):
        import_minari(file)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoded")
    save_autoencoder(root / "vae")
    save_pictures(root / "images", {"cold": 5, "warm": 7})
    settings = EncodingSettings(image_size=SIDE, shard_size=8, heldout=0.25)
    encode_folder(root / "images", root / "vae", root / "latents", settings, work=EncodingWork(cpu=True, quiet=True))
    return root


@pytest.fixture
def latents(encoded: Path, tmp_path: Path) -> Path:
    shutil.copytree(encoded / "latents", tmp_path / "latents")
    return tmp_path / "latents"


def changed(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "latents.json").read_text())
    for key, change in changes.items():
        manifest[key] = change(manifest[key]) if callable(change) else change
    (folder / "latents.json").write_text(json.dumps(manifest))


def renamed(name: str) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda shards: [shards[0] | {"file": name}, *shards[1:]]


def counted(count: int) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda shards: [shards[0] | {"count": count}, *shards[1:]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shards": renamed("../secret.safetensors")}, "is no name of a shard"),
        ({"shards": renamed("/tmp/secret.safetensors")}, "is no name of a shard"),
        ({"shards": renamed("latents-00000.safetensors/../x")}, "is no name of a shard"),
        ({"count": 13}, "count is 13, but the shards have 12 images"),
        ({"count": 13, "shards": counted(9)}, "has no labels of 9 images in 2 classes"),
        ({"count": 2, "shards": counted(-2)}, "count is 2"),
        ({"class_names": ["cold"]}, "has no labels of 8 images in 1 classes"),
        ({"std": [0.0, 1.0, 1.0, 1.0]}, "channel 0 has a standard deviation of 0"),
        ({"std": [0.0, 0.0, 0.0, 0.0]}, "one positive"),
        ({"std": [-1.0, 1.0, 1.0, 1.0]}, "none negative"),
        ({"std": [1.0, 1.0, 1.0]}, "the same number of means"),
        ({"mean": [0.0, 1e999, 0.0, 0.0]}, "all finite"),
        ({"scale": 0.0}, "positive scale"),
        ({"shape": [3, 8, 8]}, "have no 4 channels"),
    ],
)
def test_manifests_that_do_not_fit_are_refused(latents: Path, changes: dict[str, Any], said: str) -> None:
    changed(latents, **changes)
    refused("latents", latents, str(latents), said)


def test_links_among_shards_are_refused(latents: Path, encoded: Path, tmp_path: Path) -> None:
    shard = latents / "latents-00001.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    refused("latents", latents, "latents-00001.safetensors' is a link")
    settings = EncodingSettings(image_size=SIDE, shard_size=8, heldout=0.25)
    with pytest.raises((DataError, CheckpointError), match=r"latents-00001\.safetensors'? is a link"):
        encode_folder(encoded / "images", encoded / "vae", latents, settings, work=EncodingWork(cpu=True, quiet=True))


@pytest.mark.parametrize("key", ["latents", "mirrored"])
def test_latents_that_are_not_finite_are_named(latents: Path, key: str) -> None:
    file = latents / "latents-00001.safetensors"
    tensors = load_file(file)
    tensors[key][2, 1, 0, 0] = torch.nan
    save_file(tensors, file)
    mended = {"size": file.stat().st_size, "fingerprint": fingerprint(file)}
    changed(latents, shards=lambda shards: [shards[0], shards[1] | mended])
    dataset = load("latents", latents)
    with pytest.raises(DataError, match=rf"latents-00001\.safetensors' has {key} that are not finite"):
        every(dataset)


def every(dataset: Dataset) -> None:
    for samples in (dataset.train, dataset.heldout):
        samples.fetch(torch.arange(len(samples)))


def png_of(width: int, height: int) -> bytes:
    """A grey PNG that announces so many pixels; all of them, black, in a thousandth of the bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_pictures_of_too_many_pixels_are_named(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "a.png").write_bytes(png_of(2, 2))
    (tmp_path / "bomb.png").write_bytes(png_of(width, height))
    refused("images", tmp_path, "'bomb.png'", "DecompressionBombError")


def rewritten(file: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(bytes(content))


def announcing(size: int) -> Callable[[bytearray], None]:
    """The archive's directory, and the entry itself, say that it unpacks to so many bytes."""

    def change(content: bytearray) -> None:
        for mark, place in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
            start = content.find(mark)
            content[start + place : start + place + 4] = struct.pack("<I", size)

    return change


def encrypted(content: bytearray) -> None:
    for mark, place in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        content[content.find(mark) + place] |= 1


def deflate64(content: bytearray) -> None:
    for mark, place in ((b"PK\x01\x02", 10), (b"PK\x03\x04", 8)):
        start = content.find(mark)
        content[start + place : start + place + 2] = struct.pack("<H", 9)


@pytest.mark.parametrize("change", [encrypted, deflate64, announcing(10)])
@pytest.mark.parametrize("source", ["npz", "demonstrations"])
def test_archives_that_cannot_be_unpacked_are_named(
    tmp_path: Path, source: str, change: Callable[[bytearray], None]
) -> None:
    file = tmp_path / "a.npz"
    array = np.random.default_rng(0).normal(size=(30, 3, 3))
    named = {"images": array} if source == "npz" else {"actions": array[:, 0], "observations": array[:, 1]}
    np.savez_compressed(file, **named, episode_ends=np.array([15, 30]))
    rewritten(file, change)
    refused(source, file, str(file), f"array '{next(iter(named))}'")


@pytest.mark.parametrize("dtype", ["<f16", "float4", "|V1", "<c8", "<M8[s]", "|S3"])
@pytest.mark.parametrize("source", ["npz", "demonstrations"])
def test_arrays_of_other_numbers_are_named(tmp_path: Path, source: str, dtype: str) -> None:
    file = tmp_path / "a.npz"
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': (2, 1), }}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(64)
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("images", "actions", "observations", "episode_ends"):
            archive.writestr(f"{name}.npy", content)
    with pytest.raises(FewstepError, match=str(file)) as refusal:
        load(source, file)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("source", ["npz", "demonstrations"])
def test_bombs_in_archives_are_not_unpacked(tmp_path: Path, source: str) -> None:
    file = tmp_path / "announces.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("actions.npy", "w") as entry:
        about = {"descr": "|u1", "fortran_order": False, "shape": (1 << 50, 1, 1)}
        np.lib.format.write_array_header_1_0(entry, about)
        entry.write(bytes(1 << 20))
    refused(source, file, str(file), "array 'actions'")
    file = tmp_path / "holds.npz"
    np.savez_compressed(file, actions=np.zeros((1 << 12, 64, 64), np.uint8))
    with pytest.raises(ConfigError, match=r"out of memory \(array 'actions' of .*holds\.npz takes"):
        small_memory(load, source, file)


def small_memory(call: Callable[..., Any], *words: Any) -> Any:
    """A call on a machine of one megabyte."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.sysconf", lambda name: 1024)
        return call(*words)


def test_bombs_in_gzip_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = struct.pack(">HBB3I", 0, 8, 3, 20, 4, 4)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(header + bytes_of((20, 4, 4)).tobytes() + bytes(1 << 24)))
    read: list[int] = []
    original = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: read.append(size) or original(self, size))
    refused("idx", tmp_path, str(file), "announces 320 values", "fetch it again")
    assert 0 <= min(read) <= max(read) <= 321
    file.write_bytes(gzip.compress(struct.pack(">HBB3I", 0, 8, 3, *(1 << 31,) * 3)))
    with pytest.raises(ConfigError, match=r"out of memory .*announced shape"):
        load("idx", tmp_path)
