"""The toy mixture: its samples have the moments of its parameters, and its oracle denoises them."""

import pytest
import torch

from fewstep.data.sources import DataConfig, load_dataset
from fewstep.flow.closed_form import toy_mixture
from fewstep.flow.paths import EDM
from fewstep.utils.random import permutation
from tests.support.sources import load, refused


def test_samples_have_the_moments_of_the_mixture() -> None:
    """To within five standard errors of 50,000 samples."""
    dataset, parameters = load("mixture"), toy_mixture()
    assert (dataset.name, dataset.shape, dataset.num_classes) == ("mixture", (1, 4, 4), 0)
    assert (len(dataset.train), len(dataset.heldout)) == (50_000, 10_000)
    x, weights = dataset.train.values.flatten(1).double(), parameters.weights
    mean = weights @ parameters.means
    centred = parameters.means - mean
    covariance = (weights[:, None] * centred).T @ centred + (weights @ parameters.sds.square()) * torch.eye(16)
    torch.testing.assert_close(x.mean(0), mean, atol=5 * (float(covariance.diag().max()) / 50_000) ** 0.5, rtol=0)
    torch.testing.assert_close(x.T.cov(), covariance, atol=5 * 1.5 / 50_000**0.5, rtol=0)
    assert dataset.sigma_data == pytest.approx(float(x.std()), rel=1e-5)
    assert dataset.data_range is None


def test_the_mixture_is_off_centre_wide_and_uneven() -> None:
    """What makes it a test of preconditionings: a mean to subtract, and directions of different spread."""
    parameters = toy_mixture()
    assert float(parameters.weights.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float((parameters.weights @ parameters.means).norm()) > 1.5
    spread = parameters.means.std(0)
    assert float(spread.max() / spread.min()) > 3
    assert 0.1 <= float(parameters.sds.min()) < float(parameters.sds.max()) <= 0.3


def test_the_seed_moves_the_samples_and_not_the_mixture() -> None:
    first, again, other = load("mixture"), load("mixture"), load("mixture", seed=1)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    assert not torch.equal(first.train.values[:10_000], first.heldout.values)
    torch.testing.assert_close(first.train.values.mean(0), other.train.values.mean(0), atol=0.05, rtol=0)
    refused("mixture", "", "'mixture'", "4x4", "image_size", image_size=8)


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_the_oracle_denoises_samples_of_their_own_shape(sigma: float) -> None:
    """E[x0 - D | x_t] = 0, so the error is uncorrelated with D, and smaller than that of any scaling of x_t."""
    x0 = load("mixture").train.values[:4000].double()
    eps = torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, t = x0 + sigma * eps, torch.full((len(x0),), sigma, dtype=torch.float64)
    oracle = toy_mixture()
    denoised = oracle.denoise(EDM(), x, t)
    assert denoised.shape == x0.shape
    torch.testing.assert_close(denoised.flatten(1), oracle.denoise(EDM(), x.flatten(1), t), atol=0, rtol=0)
    error = x0 - denoised
    assert abs(float((error * denoised).mean())) < 0.02 * float(denoised.square().mean())
    mean = x0.mean(0)
    gain = float(x0.var() / (x0.var() + sigma**2))
    assert float(error.square().mean()) < 0.8 * float((x0 - mean - gain * (x - mean)).square().mean())
    assert oracle.velocity(EDM(), x, t).shape == x0.shape


def test_the_order_of_an_epoch_says_nothing_of_the_components() -> None:
    """Data and order may share a seed: they must not share random numbers."""
    train = load_dataset(DataConfig(source="mixture", seed=0)).train
    first = train.fetch(permutation(0, 0, len(train))[:2000])[0]
    everything = train.fetch(torch.arange(len(train)))[0]
    assert abs(float(first.std() / everything.std()) - 1) < 0.05
    assert float((first.mean(0) - everything.mean(0)).abs().max()) < 0.15
