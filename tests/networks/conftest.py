"""Settings of the tests of networks, some of which compile."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def fast_zero_tangents() -> None:
    """Torch's own shapes, which compilation asks for strides too."""
