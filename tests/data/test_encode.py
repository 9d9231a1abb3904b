"""Encoding a folder of images: what is stored, what is measured of it, and that stopping it changes no byte."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.data.folder import decode, list_images
from fewstep.data.labels import held_out
from fewstep.data.latents import encode as encoding
from fewstep.data.latents.autoencoders import Autoencoder, Decoder, load_autoencoder
from fewstep.data.latents.encode import EncodingWork, encode_folder, summary
from fewstep.data.latents.shards import EncodingSettings, load_latents, read_manifest
from fewstep.utils.errors import CheckpointError, ConfigError, DataError, FewstepWarning
from fewstep.utils.files import LOCK_FILE, Lock
from fewstep.utils.random import Draws
from fewstep.utils.serialization import to_json
from tests.support.photographs import SIDE, make_autoencoder, save_autoencoder, save_pictures

CPU = torch.device("cpu")
WORK = EncodingWork(batch_size=4, cpu=True, quiet=True)
SETTINGS = EncodingSettings(image_size=SIDE, shard_size=10, heldout=0.3, dtype="float32")
CLASSES = {"cold": 9, "warm": 14}
COUNT = sum(CLASSES.values())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("images") / "weather", CLASSES)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder")
    save_autoencoder(folder)
    return folder


@pytest.fixture(scope="module")
def whole(images: Path, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of latents encoded without a stop."""
    folder = tmp_path_factory.mktemp("latents") / "whole"
    encode_folder(images, autoencoder, folder, SETTINGS, work=WORK)
    return folder


def stored(folder: Path, key: str) -> Tensor:
    return torch.cat([load_file(file)[key] for file in sorted(folder.glob("*.safetensors"))])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def posterior(images: Path, autoencoder: Path, mirrored: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every image, one by one."""
    model = load_autoencoder(autoencoder, CPU)
    parts = []
    for file in list_images(str(images)).files:
        pixels = torch.from_numpy(decode(file, SIDE)).permute(2, 0, 1)[None] / 127.5 - 1
        parts.append(model.encode(pixels.flip(-1) if mirrored else pixels))
    mean, std = zip(*parts, strict=True)
    return torch.cat(mean), torch.cat(std)


@pytest.mark.parametrize(("key", "side"), [("latents", 0), ("mirrored", 1)])
def test_latents_are_draws_from_each_image_and_its_mirror_image(
    key: str, side: int, whole: Path, images: Path, autoencoder: Path
) -> None:
    mean, std = posterior(images, autoencoder, mirrored=key == "mirrored")
    noise = Draws(SETTINGS.seed, side, torch.arange(COUNT)).normal(60, tuple(mean.shape[1:]))
    torch.testing.assert_close(stored(whole, key), mean + std * noise, atol=1e-5, rtol=1e-5)
    assert stored(whole, "indices").tolist() == list(range(COUNT))
    assert stored(whole, "labels").tolist() == [0] * CLASSES["cold"] + [1] * CLASSES["warm"]
    assert [path.name for path in sorted(whole.iterdir())] == [
        "encoding.json", "latents-00000.safetensors", "latents-00001.safetensors", "latents-00002.safetensors",
        "latents.json",
    ]  # fmt: skip


def test_the_mean_of_the_posterior_in_half_precision(images: Path, autoencoder: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, posterior="mean", dtype="float16", flip=False, shard_size=100)
    manifest = encode_folder(images, autoencoder, tmp_path / "out", settings, work=WORK)
    tensors = load_file(tmp_path / "out" / "latents-00000.safetensors")
    assert "mirrored" not in tensors
    mean, std = posterior(images, autoencoder)
    torch.testing.assert_close(tensors["latents"], mean.half(), atol=1e-3, rtol=1e-3)
    expected = std.double().square().mean((0, 2, 3)).sqrt()
    assert torch.tensor(manifest.posterior_std) == pytest.approx(expected.tolist(), rel=1e-6)


def test_the_statistics_are_those_of_the_training_part(whole: Path, images: Path, autoencoder: Path) -> None:
    latents, labels = stored(whole, "latents").double(), stored(whole, "labels")
    training = latents[~held_out(COUNT, labels, SETTINGS.heldout, SETTINGS.seed)]
    assert 0 < len(training) < COUNT
    manifest = json.loads((whole / "latents.json").read_text())
    assert manifest["mean"] == pytest.approx(training.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert manifest["std"] == pytest.approx(training.std((0, 2, 3), correction=0).tolist(), rel=1e-12)
    assert (manifest["count"], manifest["class_names"]) == (COUNT, ["cold", "warm"])
    assert [shard["count"] for shard in manifest["shards"]] == [10, 10, 3]
    assert manifest["image_shape"] == [3, SIDE, SIDE]


class Killed(BaseException):
    """Stands for whatever stops a process in the middle."""


def stop_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> None:
    original, made = getattr(owner, name), []

    def stopping(*args: Any, **options: Any) -> Any:
        made.append(name)
        if len(made) > calls:
            raise Killed
        return original(*args, **options)

    monkeypatch.setattr(owner, name, stopping)


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (encoding, "write_atomically", 0),
        (encoding, "write_atomically", 2),
        (Autoencoder, "encode", 7),
        (os, "replace", 3),
        (encoding, "fingerprint", 1),
        (encoding, "write_atomically", 4),
    ],
    ids=["record", "shard", "batch", "rename", "measuring", "manifest"],
)
def test_a_stopped_encoding_ends_with_the_same_bytes(
    owner: Any, name: str, calls: int, whole: Path, images: Path, autoencoder: Path,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, owner, name, calls)
        with pytest.raises(Killed):
            encode_folder(images, autoencoder, out, SETTINGS, work=WORK)
    assert not (out / "latents.json").exists()
    out.mkdir(exist_ok=True)
    if (out / "encoding.json").exists():  # what a process leaves that cannot even clean up
        (out / ".latents-00002.safetensors.0123abcd").write_bytes(b"half")
    written = contents(out)
    encode_folder(images, autoencoder, out, SETTINGS, work=WORK)
    assert contents(out) == contents(whole)
    assert all(contents(out)[key] == value for key, value in written.items() if not key.startswith("."))


def test_encoding_again_encodes_nothing(
    whole: Path, images: Path, autoencoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(whole)
    stop_at(monkeypatch, Autoencoder, "encode", 0)
    encode_folder(images, autoencoder, whole, SETTINGS, work=WORK)
    assert contents(whole) == before


def test_batches_and_shards_change_no_more_than_the_last_bits(
    whole: Path, images: Path, autoencoder: Path, tmp_path: Path
) -> None:
    for name, size, batch in (("shards", 4, 4), ("batches", 10, 7)):
        settings = replace(SETTINGS, shard_size=size)
        encode_folder(images, autoencoder, tmp_path / name, settings, work=replace(WORK, batch_size=batch))
        for key in ("latents", "mirrored"):
            torch.testing.assert_close(stored(tmp_path / name, key), stored(whole, key), atol=1e-5, rtol=1e-5)


def test_another_scale_needs_no_new_encoding(whole: Path, images: Path, autoencoder: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    manifest = encode_folder(images, autoencoder, tmp_path / "out", SETTINGS, 0.5, WORK)
    assert manifest.scale == 0.5
    before, after = contents(whole), contents(tmp_path / "out")
    assert [key for key in before if before[key] != after[key]] == ["latents.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 8}, r"settings\.image_size: 16 -> 8"),
        ({"flip": False, "seed": 3}, r"settings\.flip: True -> False; settings\.seed: 0 -> 3"),
        ({"posterior": "mean"}, r"settings\.posterior: 'sample' -> 'mean'"),
        ({"shard_size": 5}, r"settings\.shard_size: 10 -> 5"),
    ],
)
def test_other_settings_are_refused_with_the_difference(
    change: dict[str, Any], message: str, whole: Path, images: Path, autoencoder: Path
) -> None:
    before = contents(whole)
    with pytest.raises(CheckpointError, match=f"encoded otherwise .*{message}"):
        encode_folder(images, autoencoder, whole, replace(SETTINGS, **change), work=WORK)
    assert contents(whole) == before


def test_another_autoencoder_is_refused_and_a_moved_one_is_not(
    whole: Path, images: Path, autoencoder: Path, tmp_path: Path
) -> None:
    save_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"autoencoder\.weights: '\w{16}' -> '\w{16}'"):
        encode_folder(images, tmp_path / "other", whole, SETTINGS, work=WORK)
    shutil.copytree(autoencoder, tmp_path / "moved")
    shutil.copytree(whole, tmp_path / "out")
    manifest = encode_folder(images, tmp_path / "moved", tmp_path / "out", SETTINGS, work=WORK)
    assert manifest.autoencoder.path == str(tmp_path / "moved")


def test_other_images_are_refused(whole: Path, images: Path, autoencoder: Path, tmp_path: Path) -> None:
    before = contents(whole)
    for name, change in (
        ("added", lambda folder: shutil.copy(folder / "cold" / "00.png", folder / "cold" / "zz.png")),
        ("grown", lambda folder: Image.new("RGB", (99, 99)).save(folder / "warm" / "13.png")),
        ("gone", lambda folder: [(folder / "warm" / f"{i}.png").unlink() for i in (11, 12, 13)]),
    ):
        shutil.copytree(images, tmp_path / name)
        change(tmp_path / name)
        with pytest.raises(CheckpointError, match=r"is of other images than .* now|is of images that are gone"):
            encode_folder(tmp_path / name, autoencoder, whole, SETTINGS, work=WORK)
    assert contents(whole) == before


def test_unreadable_images_are_named_and_what_is_written_stays(images: Path, autoencoder: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(images, folder)
    for name in ("warm/04.png", "warm/05.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(DataError, match=r"2 of 23 images .*'warm/04\.png' .*'warm/05\.png' .* skip_unreadable"):
        encode_folder(folder, autoencoder, out, SETTINGS, work=WORK)
    assert sorted(contents(out)) == ["encoding.json", "latents-00000.safetensors"]
    with pytest.warns(FewstepWarning, match=r"2 of 23 images.*they are skipped"):
        manifest = encode_folder(folder, autoencoder, out, SETTINGS, work=replace(WORK, skip_unreadable=True))
    assert manifest.count == COUNT - 2
    skipped = set(range(COUNT)) - set(stored(out, "indices").tolist())
    assert skipped == {CLASSES["cold"] + 4, CLASSES["cold"] + 5}
    assert len(stored(out, "labels")) == len(stored(out, "latents")) == COUNT - 2
    # Mended after the shard was written, they would be other images; removed before, the encoding goes on.
    shutil.rmtree(out)
    with pytest.raises(DataError):
        encode_folder(folder, autoencoder, out, SETTINGS, work=WORK)
    for name in ("warm/04.png", "warm/05.png"):
        (folder / name).unlink()
    assert encode_folder(folder, autoencoder, out, SETTINGS, work=WORK).count == COUNT - 2


def test_latents_beyond_half_precision_are_refused(images: Path, autoencoder: Path, tmp_path: Path) -> None:
    shutil.copytree(autoencoder, tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"quant_conv.bias": weights["quant_conv.bias"] + 1e6}, file)
    settings = replace(SETTINGS, dtype="float16", posterior="mean")
    with pytest.raises(DataError, match=r"latents of 'cold/00\.png' are not finite as float16: try --dtype float32"):
        encode_folder(images, tmp_path / "vae", tmp_path / "out", settings, work=WORK)


def test_grey_autoencoders_and_images_without_classes(images: Path, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "grey", channels=1, latents=2)
    manifest = encode_folder(images / "cold", tmp_path / "grey", tmp_path / "out", SETTINGS, work=WORK)
    assert (manifest.image_shape, manifest.shape) == ((1, SIDE, SIDE), (2, SIDE // 2, SIDE // 2))
    assert manifest.class_names == ()
    assert "labels" not in load_file(tmp_path / "out" / "latents-00000.safetensors")


@pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderKLWan"])
def test_other_autoencoders_encode_a_folder(kind: str, images: Path, tmp_path: Path) -> None:
    """One latent for an image where the autoencoder has one; an image is a video of one frame to one of videos."""
    model = make_autoencoder(kind)
    model.save_pretrained(tmp_path / "vae")
    settings = replace(SETTINGS, posterior="mean")
    manifest = encode_folder(images / "cold", tmp_path / "vae", tmp_path / "out", settings, work=WORK)
    frames = (1,) if kind == "AutoencoderKLWan" else ()
    assert (manifest.shape, manifest.image_shape) == ((4, *frames, SIDE // 2, SIDE // 2), (3, SIDE, SIDE))
    assert ("posterior's" in summary(manifest)) == bool(frames)
    expected, _ = posterior(images / "cold", tmp_path / "vae")
    torch.testing.assert_close(stored(tmp_path / "out", "latents"), expected, atol=1e-5, rtol=1e-5)
    dataset = load_latents(str(tmp_path / "out"))
    values, _ = dataset.train.fetch(torch.arange(len(dataset.train)))
    assert values.shape[1:] == dataset.shape == manifest.shape
    spread = values.transpose(0, 1).flatten(1).std(1, correction=0)
    torch.testing.assert_close(spread, torch.ones(4), atol=1e-4, rtol=1e-4)
    seen = Decoder(manifest.spec, load_autoencoder(tmp_path / "vae", CPU)).images(values)
    assert seen.shape == (len(values), 3, SIDE, SIDE)


def test_folders_that_cannot_take_latents(images: Path, autoencoder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "encoding.json").write_text("{}")
    for name, message in (
        ("file", "is a file, not a folder"),
        ("full", "is not empty and holds no latents"),
        ("damaged", r"encoding\.json is damaged"),
    ):
        with pytest.raises(CheckpointError, match=message):
            encode_folder(images, autoencoder, tmp_path / name, SETTINGS, work=WORK)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]


def test_two_encoders_do_not_share_a_folder(images: Path, autoencoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lock = Lock(out, "held")
    before = contents(out)
    with pytest.raises(CheckpointError, match="is being encoded into by another process"):
        encode_folder(images, autoencoder, out, SETTINGS, work=WORK)
    assert contents(out) == before
    lock.release()
    encode_folder(images, autoencoder, out, SETTINGS, work=WORK)
    assert not (out / LOCK_FILE).exists()


def test_a_damaged_shard_is_named(whole: Path, images: Path, autoencoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    file = out / "latents-00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=r"latents-00001\.safetensors' is damaged: delete it"):
        encode_folder(images, autoencoder, out, SETTINGS, work=WORK)
    file.write_bytes(content[:50])
    with pytest.raises(CheckpointError, match=r"latents-00001\.safetensors is damaged .*delete it"):
        encode_folder(images, autoencoder, out, SETTINGS, work=WORK)
    file.unlink()
    (out / "latents.json").write_text("{")
    encode_folder(images, autoencoder, out, SETTINGS, work=WORK)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    ("settings", "scale", "message"),
    [
        (replace(SETTINGS, image_size=15), 1.0, r"side 15 do not divide by 2.*such as 14"),
        (SETTINGS, 0.0, r"standard deviation is 0\.0"),
        (SETTINGS, math.nan, r"standard deviation is nan"),
    ],
)
def test_settings_that_do_not_fit(
    settings: EncodingSettings, scale: float, message: str, images: Path, autoencoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        encode_folder(images, autoencoder, tmp_path / "out", settings, scale, WORK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"image_size": 0}, {"shard_size": 0}, {"heldout": 1.0}, {"seed": -1}])
def test_settings_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give sizes from 1"):
        replace(SETTINGS, **change)
    with pytest.raises(ConfigError, match="give at least 1"):
        EncodingWork(batch_size=0)


def test_the_manifest_survives_its_file(whole: Path) -> None:
    assert to_json(read_manifest(whole)) == json.loads((whole / "latents.json").read_text())


def test_a_shard_of_nothing_but_unreadable_images_is_empty(images: Path, autoencoder: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(images, folder)
    work, settings = replace(WORK, skip_unreadable=True), replace(SETTINGS, shard_size=COUNT - 1)
    last = sorted(folder.rglob("*.png"))[-1]
    last.write_bytes(b"no image")
    with pytest.warns(FewstepWarning, match=rf"1 of {COUNT} images.*{last.name}"):
        manifest = encode_folder(folder, autoencoder, out, settings, work=work)
    assert [shard.count for shard in manifest.shards] == [COUNT - 1, 0]
    assert all(math.isfinite(value) for value in (*manifest.mean, *manifest.std, *manifest.posterior_std))
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match=rf"{COUNT} of {COUNT} images.*no image is left"):
        encode_folder(folder, autoencoder, tmp_path / "other", settings, work=work)
