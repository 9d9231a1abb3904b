"""Samples as they are looked at: as they are where they are images, decoded and small where they are latents."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.data.latents.autoencoders import AutoencoderIdentity, Decoder, LatentSpec, load_autoencoder
from fewstep.networks.mlp import MLPConfig
from fewstep.recipes.config import RunConfig, flow_map_config
from fewstep.sampling.decode import Viewer, save_latents
from fewstep.sampling.pipeline import Pipeline, PipelineConfig
from fewstep.utils.errors import ConfigError, FewstepWarning
from tests.support.photographs import save_autoencoder


@pytest.fixture
def pipeline() -> Pipeline:
    """Of images in [-1, 1]."""
    config = RunConfig("mine", network=MLPConfig(width=8, depth=1))
    return Pipeline(flow_map_config(config, (3, 4, 4), 1.0).build(), PipelineConfig(data_range=(-1.0, 1.0)))


@pytest.mark.parametrize(("side", "small"), [(64, 128), (128, 128), (96, 192)])
def test_large_decoded_images_are_shrunk_by_a_whole_factor(side: int, small: int, tmp_path: Path) -> None:
    save_autoencoder(tmp_path)
    autoencoder = load_autoencoder(tmp_path, torch.device("cpu"))
    spec = LatentSpec(autoencoder.identity, (0.0,) * 4, (1.0,) * 4, 1.0, (3, 2 * side, 2 * side))
    view, samples = Viewer(Decoder(spec, autoencoder), (-1.0, 1.0)), torch.randn(2, 4, side, side)
    images, thumbnails = view.images(samples), view.thumbnails(samples)
    assert images.shape == (2, 3, 2 * side, 2 * side)
    assert thumbnails.shape == (2, 3, small, small)
    torch.testing.assert_close(thumbnails.mean(), images.mean(), atol=1e-5, rtol=1e-5)


def test_images_are_shown_as_they_are(pipeline: Pipeline, tmp_path: Path) -> None:
    view = pipeline.viewer()
    samples: Tensor = torch.randn(2, 3, 4, 4)
    assert view.data_range == (-1.0, 1.0)
    assert view.images(samples) is samples
    assert view.thumbnails(samples) is samples
    with pytest.raises(ConfigError, match="no latents: leave out --autoencoder"):
        pipeline.viewer(tmp_path)
    with pytest.raises(ConfigError, match="no latents: leave out --latents"):
        save_latents(pipeline.config.latents, samples, None, tmp_path / "x.npz")


def test_a_preview_without_its_autoencoder_shows_the_latents(pipeline: Pipeline, tmp_path: Path) -> None:
    identity = AutoencoderIdentity("AutoencoderKL", "c", "w", str(tmp_path / "gone"))
    latents = LatentSpec(identity, (0.0,) * 3, (1.0,) * 3, 1.0, (3, 8, 8))
    with pytest.warns(FewstepWarning, match="samples are shown as latents: .*gone has no config.json"):
        view = Pipeline(pipeline.flow_map, PipelineConfig(latents=latents)).preview()
    assert view == Viewer(None, None)
