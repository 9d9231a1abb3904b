"""Latents as a data source: normalised as measured, split as encoded, read shard by shard, and refused when damaged."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.data.base import Dataset
from fewstep.data.labels import held_out
from fewstep.data.latents.autoencoders import load_autoencoder
from fewstep.data.latents.encode import EncodingWork, encode_folder
from fewstep.data.latents.shards import EncodingSettings
from fewstep.utils.errors import ConfigError, DataError
from tests.support.photographs import SIDE, save_autoencoder, save_pictures
from tests.support.sources import load, refused

SETTINGS = EncodingSettings(image_size=SIDE, shard_size=8, heldout=0.25)
SCALE = 0.5
COUNT = 21


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of latents of two classes."""
    root = tmp_path_factory.mktemp("source")
    save_autoencoder(root / "vae")
    save_pictures(root / "images", {"cold": 12, "warm": 9})
    work = EncodingWork(batch_size=8, cpu=True, quiet=True)
    encode_folder(root / "images", root / "vae", root / "latents", SETTINGS, SCALE, work)
    return root / "latents"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(folder, tmp_path / "latents")
    return tmp_path / "latents"


def stored(folder: Path, key: str) -> Tensor:
    return torch.cat([load_file(file)[key] for file in sorted(folder.glob("*.safetensors"))])


def normalised(folder: Path, key: str) -> Tensor:
    """All latents brought to mean 0 and the scale by the training part's statistics, in float64."""
    raw, training = stored(folder, key).double(), stored(folder, "latents").double()
    training = training[~held_out(COUNT, stored(folder, "labels"), SETTINGS.heldout, SETTINGS.seed)]
    mean, std = training.mean((0, 2, 3)), training.std((0, 2, 3), correction=0)
    return (raw - mean[:, None, None]) / std[:, None, None] * SCALE


def parts(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """All samples, training part first, with their labels."""
    fetched = [part.fetch(torch.arange(len(part))) for part in (dataset.train, dataset.heldout)]
    labels = [each for _, each in fetched if each is not None]
    return torch.cat([values for values, _ in fetched]), torch.cat(labels) if labels else torch.empty(0)


def test_samples_are_the_normalised_latents_split_as_encoded(folder: Path) -> None:
    dataset = load("latents", folder)
    labels = stored(folder, "labels")
    held = held_out(COUNT, labels, SETTINGS.heldout, SETTINGS.seed)
    assert (len(dataset.train), len(dataset.heldout)) == (COUNT - 5, 5)
    order = torch.cat([(~held).nonzero().flatten(), held.nonzero().flatten()])
    values, classes = parts(dataset)
    torch.testing.assert_close(values.double(), normalised(folder, "latents")[order], atol=1e-5, rtol=1e-5)
    assert torch.equal(classes, labels[order])
    assert dataset.class_names == ("cold", "warm")
    assert dataset.data_range is None
    assert dataset.shape == (4, SIDE // 2, SIDE // 2)
    assert load("latents", folder, labels=False).num_classes == 0


def test_the_measured_standard_deviation_is_that_of_all_training_values(folder: Path) -> None:
    dataset = load("latents", folder)
    values = dataset.train.fetch(torch.arange(len(dataset.train)))[0].double()
    assert dataset.sigma_data == pytest.approx(float(values.std(correction=0)), rel=1e-6)
    assert dataset.mean == pytest.approx(float(values.mean()), abs=1e-6)
    torch.testing.assert_close(values.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)
    expected = torch.full((4,), SCALE, dtype=torch.float64)
    torch.testing.assert_close(values.std((0, 2, 3), correction=0), expected, atol=1e-6, rtol=0)


def test_a_flip_fetches_the_latent_of_the_mirrored_image(folder: Path) -> None:
    train = load("latents", folder).train
    plain, mirrored = (normalised(folder, key) for key in ("latents", "mirrored"))
    rows = (~held_out(COUNT, stored(folder, "labels"), SETTINGS.heldout, SETTINGS.seed)).nonzero().flatten()
    indices = torch.tensor([15, 0, 7, 7, 3, 12])
    mirror = torch.tensor([True, False, True, False, True, False])
    values, labels = train.fetch(indices, mirror)
    expected = torch.where(mirror[:, None, None, None], mirrored[rows[indices]], plain[rows[indices]])
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(labels, stored(folder, "labels")[rows[indices]])
    assert float((mirrored - plain.flip(-1)).abs().max()) > 0.1  # a latent's mirror image is another thing


def test_samples_decode_to_the_latents_own_images(folder: Path) -> None:
    dataset = load("latents", folder)
    spec = dataset.latents
    assert spec is not None
    values, _ = dataset.heldout.fetch(torch.arange(len(dataset.heldout)))
    rows = held_out(COUNT, stored(folder, "labels"), SETTINGS.heldout, SETTINGS.seed)
    torch.testing.assert_close(spec.latents(values), stored(folder, "latents")[rows].float(), atol=1e-5, rtol=1e-5)
    autoencoder = load_autoencoder(Path(spec.autoencoder.path), torch.device("cpu"))
    assert autoencoder.identity == spec.autoencoder


def test_only_the_shards_that_are_asked_for_are_read(copy: Path) -> None:
    file = copy / "latents-00002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    train = load("latents", copy).train
    train.fetch(torch.arange(4))
    with pytest.raises(DataError, match=r"latents-00002\.safetensors' is damaged: delete it"):
        train.fetch(torch.arange(len(train)))


def test_the_fingerprint_tells_other_latents(folder: Path, copy: Path) -> None:
    first = load("latents", folder).fingerprint
    assert load("latents", copy).fingerprint == first
    manifest = json.loads((copy / "latents.json").read_text())
    changes: list[tuple[dict[str, Any], bool]] = [
        ({"autoencoder": manifest["autoencoder"] | {"path": "elsewhere"}}, True),
        ({"scale": 2.0}, False),
        ({"settings": manifest["settings"] | {"heldout": 0.5}}, False),
        ({"shards": [manifest["shards"][0] | {"fingerprint": "0"}, *manifest["shards"][1:]]}, False),
    ]
    for change, same in changes:
        (copy / "latents.json").write_text(json.dumps(manifest | change))
        assert (load("latents", copy).fingerprint == first) is same
    assert load("latents", folder, labels=False).fingerprint != first


def test_folders_without_latents_are_refused(folder: Path, copy: Path, tmp_path: Path) -> None:
    refused("latents", "", "source 'latents' needs root, a folder that fewstep encode wrote: '' is no folder")
    refused("latents", tmp_path / "nowhere", "is no folder")
    (tmp_path / "empty").mkdir()
    refused("latents", tmp_path / "empty", "has no latents.json: make it by fewstep encode")
    (copy / "latents.json").unlink()
    refused("latents", copy, "has no latents.json: its encoding was stopped, run the same fewstep encode again")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "latents.json' is damaged"),
        ("[]", "latents.json' is damaged"),
        ('{"version": 2}', "is of version 2, not 1"),
        ('{"version": 1}', "latents.json: missing key"),
    ],
)
def test_damaged_manifests_are_refused(text: str, message: str, copy: Path) -> None:
    (copy / "latents.json").write_text(text)
    refused("latents", copy, message, "encode")


def test_missing_and_truncated_shards_are_refused(copy: Path) -> None:
    file = copy / "latents-00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    refused("latents", copy, f"latents-00001.safetensors' has {len(content) - 10} bytes instead of {len(content)}")
    file.unlink()
    refused("latents", copy, "latents-00001.safetensors' is missing", "run the same fewstep encode again")
    file.write_bytes(bytes(len(content)))
    refused("latents", copy, "latents-00001.safetensors' is damaged", "delete it")


def test_latents_are_not_resized_or_recoloured(folder: Path) -> None:
    for settings in ({"image_size": 256}, {"channels": 1}):
        with pytest.raises(ConfigError, match="leave image_size and channels at 0"):
            load("latents", folder, **settings)


def test_mirror_images_that_were_not_encoded_cannot_be_fetched(folder: Path, tmp_path: Path) -> None:
    source = folder.parent
    work = EncodingWork(batch_size=8, cpu=True, quiet=True)
    encode_folder(source / "images", source / "vae", tmp_path / "out", replace(SETTINGS, flip=False), work=work)
    dataset = load("latents", tmp_path / "out")
    assert not dataset.train.has_mirrors
    with pytest.raises(DataError, match="holds no latents of mirrored images: encode with --flip"):
        dataset.train.fetch(torch.arange(2), torch.tensor([True, False]))
