"""Data: sources, what is measured of them, the order of training, augmentation."""

from fewstep.data.augment import random_flips
from fewstep.data.base import Dataset, Samples, SampleSet
from fewstep.data.order import batch_indices
from fewstep.data.sources import DataConfig, DataSource, ImageSource, load_dataset

__all__ = [
    "DataConfig",
    "DataSource",
    "Dataset",
    "ImageSource",
    "SampleSet",
    "Samples",
    "batch_indices",
    "load_dataset",
    "random_flips",
]
