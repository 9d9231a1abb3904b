"""Moments of latents by channel, merged part by part."""

import pytest
import torch

from fewstep.data.latents.moments import ChannelMoments
from fewstep.utils.errors import DataError


def test_moments_are_merged_exactly_far_from_zero() -> None:
    parts = [1e6 + torch.randn(n, 2, 3, 3, dtype=torch.float64) for n in (1, 5, 0, 7)]
    moments = ChannelMoments()
    for part in parts:
        moments.add(part)
    mean, std = moments.result()
    joined = torch.cat(parts)
    assert mean == pytest.approx(joined.mean((0, 2, 3)).tolist(), rel=1e-14)
    assert std == pytest.approx(joined.std((0, 2, 3), correction=0).tolist(), rel=1e-9)


def test_channels_without_spread_take_no_part() -> None:
    """Constant, or two neighbours in float16; but for what is small and varies."""
    moments = ChannelMoments()
    with pytest.raises(DataError, match="no latents"):
        moments.result()
    latents = torch.randn(40, 4, 2, 2)
    latents[:, 1] = torch.where(latents[:, 1] > 0, 2.0, 2.0 - 2.0**-10)
    latents[:, 2] *= 1e-4
    latents[:, 3] = 0
    for part in latents.half().split(7):
        moments.add(part)
    mean, std = moments.result()
    assert (std[1], std[3]) == (0, 0)
    assert std[2] == pytest.approx(1e-4, rel=0.2)
    assert mean[1] == pytest.approx(2, abs=1e-3)
    moments = ChannelMoments()
    moments.add(torch.ones(4, 3, 2, 2))
    with pytest.raises(DataError, match="no channel of the latents varies"):
        moments.result()
