"""Functions that the tests of data sources share."""

from pathlib import Path

import numpy as np
import pytest

from fewstep.data.base import Dataset
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.utils.errors import DataError


def load(source: str, root: Path | str = "", **settings: object) -> Dataset:
    return load_dataset(DataConfig(source=source, root=str(root), **settings))


def refused(source: str, root: Path | str, *parts: str, **settings: object) -> None:
    """Loading raises a DataError of one line that contains every part."""
    with pytest.raises(DataError) as caught:
        load(source, root, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def bytes_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
