"""Evaluation: features of images, distances between sets of them, and the figures of one run."""

from fewstep.evaluation.features import (
    ClassifierExtractor,
    Extractor,
    InceptionExtractor,
    RandomConvExtractor,
    default_extractor,
    train_extractor,
)
from fewstep.evaluation.fidelity import (
    KernelDistance,
    class_accuracy,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from fewstep.evaluation.measure import Measurement, ReferenceFeatures, measure, reference_features

__all__ = [
    "ClassifierExtractor",
    "Extractor",
    "InceptionExtractor",
    "KernelDistance",
    "Measurement",
    "RandomConvExtractor",
    "ReferenceFeatures",
    "class_accuracy",
    "default_extractor",
    "frechet_distance",
    "kernel_distance",
    "measure",
    "precision_recall",
    "reference_features",
    "train_extractor",
]
