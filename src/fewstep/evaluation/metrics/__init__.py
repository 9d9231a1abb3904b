"""Evaluation: features of images, distances between sets of them, alignment with a teacher, figures of one run."""

from fewstep.evaluation.metrics.alignment import (
    Alignment,
    AlignmentSettings,
    TrajectoryAlignment,
    alignment,
    rmse,
    trajectory_alignment,
)
from fewstep.evaluation.metrics.curves import Speedup, common_target, speedup, targets_of, time_to
from fewstep.evaluation.metrics.decoded import DecodedExtractor
from fewstep.evaluation.metrics.features import (
    ClassifierExtractor,
    Extractor,
    IdentityExtractor,
    InceptionExtractor,
    RandomConvExtractor,
    default_extractor,
    train_extractor,
)
from fewstep.evaluation.metrics.fidelity import (
    KernelDistance,
    class_accuracy,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from fewstep.evaluation.metrics.measure import Measurement, Provenance, ReferenceFeatures, measure, reference_features

__all__ = [
    "Alignment",
    "AlignmentSettings",
    "ClassifierExtractor",
    "DecodedExtractor",
    "Extractor",
    "IdentityExtractor",
    "InceptionExtractor",
    "KernelDistance",
    "Measurement",
    "Provenance",
    "RandomConvExtractor",
    "ReferenceFeatures",
    "Speedup",
    "TrajectoryAlignment",
    "alignment",
    "class_accuracy",
    "common_target",
    "default_extractor",
    "frechet_distance",
    "kernel_distance",
    "measure",
    "precision_recall",
    "reference_features",
    "rmse",
    "speedup",
    "targets_of",
    "time_to",
    "train_extractor",
    "trajectory_alignment",
]
