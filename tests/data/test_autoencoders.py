"""Autoencoders: loaded from a folder and nowhere else, told apart by what they are, and true to diffusers."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.data.latents.autoencoders import AutoencoderIdentity, Decoder, LatentSpec, load_autoencoder, load_decoder
from fewstep.utils.errors import CheckpointError, MissingExtraError, ShapeError
from tests.support.photographs import SIDE, make_autoencoder, save_autoencoder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
IDENTITY = AutoencoderIdentity("AutoencoderKL", "c", "w", "here")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, "AutoencoderKL"]:
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    return folder, save_autoencoder(folder)


@pytest.fixture
def folder(saved: tuple[Path, "AutoencoderKL"], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(saved[0], tmp_path / "vae")
    return tmp_path / "vae"


def test_it_encodes_and_decodes_as_diffusers_does(saved: tuple[Path, "AutoencoderKL"]) -> None:
    found, model = load_autoencoder(saved[0], CPU), saved[1]
    images = torch.rand(3, 3, SIDE, SIDE) * 2 - 1
    mean, std = found.encode(images)
    with torch.no_grad():
        posterior = model.encode(images).latent_dist
        decoded = model.decode(mean).sample
    assert mean.shape == std.shape == (3, 4, SIDE // 2, SIDE // 2)
    assert found.factor == 2
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, posterior.std)
    torch.testing.assert_close(found.decode(mean), decoded)


def of_pipeline(kind: str, model: Any, latents: Tensor) -> Tensor:
    """Latents as the kind's own pipeline gives them to its decoder."""
    if kind != "AutoencoderKLWan":
        return latents / model.config.scaling_factor
    mean, std = (
        torch.tensor(values).reshape(-1, 1, 1, 1) for values in (model.config.latents_mean, model.config.latents_std)
    )
    return latents * std + mean


@pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderTiny", "AutoencoderKLWan"])
def test_other_kinds_encode_and_decode_as_diffusers_does(kind: str, tmp_path: Path) -> None:
    """To 1e-5, and in the units that the kind's own pipeline gives its network; of an image and, of Wan, of a video."""
    model = make_autoencoder(kind)
    model.save_pretrained(tmp_path)
    found, video = load_autoencoder(tmp_path, CPU), kind == "AutoencoderKLWan"
    assert (found.factor, found.image_channels, found.identity.kind) == (2, 3, kind)
    units = found.units
    spec = LatentSpec(found.identity, units.shift, tuple(1 / each for each in units.factor), 1.0, (3, SIDE, SIDE))
    for shape in [(2, 3, SIDE, SIDE), *[(2, 3, 5, SIDE, SIDE)] * video]:
        images = torch.rand(shape) * 2 - 1
        frames = images[:, :, None] if video and images.ndim == 4 else images
        mean, std = found.encode(images)
        with torch.no_grad():
            encoded = model.encode(frames)
            expected = encoded.latent_dist.mean if video else encoded[0]
            decoded = model.decode(expected).sample.reshape(shape)
            drawn = model.decode(of_pipeline(kind, model, spec.samples(expected))).sample.reshape(shape)
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(std, encoded.latent_dist.std if video else torch.zeros_like(mean))
        torch.testing.assert_close(found.decode(mean), decoded, rtol=1e-5, atol=1e-5)
        images = Decoder(spec, found).images(spec.samples(mean))
        torch.testing.assert_close(images, drawn.clamp(-1, 1), rtol=1e-5, atol=1e-5)


def test_decoding_inverts_what_samples_are_brought_to() -> None:
    spec = LatentSpec(IDENTITY, (0.5, -2.0), (3.0, 0.1), 0.7, (3, 16, 16))
    latents = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    samples = spec.samples(latents)
    expected = torch.stack([(latents[:, 0] - 0.5) / 3.0 * 0.7, (latents[:, 1] + 2.0) / 0.1 * 0.7], 1)
    torch.testing.assert_close(samples, expected)
    torch.testing.assert_close(spec.latents(samples), latents)
    with pytest.raises(ShapeError, match=r"\(n, 2, h, w\), got \(5, 3, 3, 3\)"):
        spec.latents(torch.zeros(5, 3, 3, 3))


def test_images_are_decoded_from_their_own_units_and_cut_to_their_range(saved: tuple[Path, "AutoencoderKL"]) -> None:
    autoencoder = load_autoencoder(saved[0], CPU)
    spec = LatentSpec(autoencoder.identity, (0.1, 0.2, 0.3, 0.4), (5.0, 6.0, 7.0, 8.0), 0.5, (3, SIDE, SIDE))
    samples = 20 * torch.randn(19, 4, SIDE // 2, SIDE // 2)
    images = Decoder(spec, autoencoder).images(samples)
    whole = autoencoder.decode(spec.latents(samples))
    assert float(whole.abs().max()) > 1
    torch.testing.assert_close(images, whole.clamp(-1, 1), atol=1e-5, rtol=1e-5)


def test_a_moved_autoencoder_is_the_same_and_a_changed_one_is_not(
    saved: tuple[Path, "AutoencoderKL"], folder: Path, tmp_path: Path
) -> None:
    first, moved = (load_autoencoder(each, CPU).identity for each in (saved[0], folder))
    assert first.path != moved.path
    assert moved.same_as(first)
    weights = load_file(folder / WEIGHTS)
    key = min(weights)
    save_file(weights | {key: weights[key] + 1e-3}, folder / WEIGHTS)
    assert not load_autoencoder(folder, CPU).identity.same_as(first)
    shutil.copy(saved[0] / WEIGHTS, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"_diffusers_version": "0.1"}))
    assert load_autoencoder(folder, CPU).identity.same_as(first)
    (folder / "config.json").write_text(json.dumps(settings | {"scaling_factor": 0.5}))
    assert not load_autoencoder(folder, CPU).identity.same_as(first)


def test_a_decoder_takes_only_the_autoencoder_of_its_latents(
    saved: tuple[Path, "AutoencoderKL"], folder: Path, tmp_path: Path
) -> None:
    identity = load_autoencoder(saved[0], CPU).identity
    spec = LatentSpec(replace(identity, path=str(tmp_path / "gone")), (0.0,), (1.0,), 1.0, (3, SIDE, SIDE))
    with pytest.raises(CheckpointError, match=r"cannot be read: .*gone has no config\.json.* with --autoencoder$"):
        load_decoder(spec, None, CPU)
    assert load_decoder(spec, folder, CPU).autoencoder.identity.same_as(identity)
    save_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"other holds another autoencoder \(weights \w{16}\).*--autoencoder$"):
        load_decoder(spec, tmp_path / "other", CPU)


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def spoil_class(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"_class_name": "VQModel"}))


def spoil_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def spoil_width(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"latent_channels": 5}))


def truncate(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["decoder.conv_in.bias"]
    save_file(weights, folder / WEIGHTS)


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, r"vae has no config\.json: give the folder of an AutoencoderKL"),
        (spoil_config, r"config\.json is damaged"),
        (spoil_list, r"config\.json is damaged .*is no object"),
        (spoil_class, r"a model of class 'VQModel': give the folder of an AutoencoderKL"),
        (spoil_width, r"holds no AutoencoderKL that can be read from safetensors|lacks"),
        (truncate, r"holds no AutoencoderKL that can be read from safetensors"),
        (drop_a_weight, r"decoder\.conv_in\.bias"),
        (pickle_weights, r"holds no AutoencoderKL that can be read from safetensors"),
    ],
)
def test_what_is_no_autoencoder_is_refused(spoil: Callable[[Path], None], message: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_autoencoder(folder, CPU)


def test_without_diffusers_the_extra_is_named(
    saved: tuple[Path, "AutoencoderKL"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r"pip install diffusers transformers \(the extra \[diffusers\]\)"):
        load_autoencoder(saved[0], CPU)
