"""One row of a results table: what was sampled, how, and every figure with the extractor and reference it needs."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fewstep.data.base import SampleSet
from fewstep.evaluation.metrics.features import Extractor
from fewstep.evaluation.metrics.fidelity import class_accuracy, frechet_distance, kernel_distance, precision_recall
from fewstep.utils.errors import DataError, ShapeError, UnsupportedError

_FETCH_SIZE = 1024


@dataclass(frozen=True)
class ReferenceFeatures:
    """Features of real samples, computed once and compared with many sets of generated ones.

    name: such as "digits held out". features: (n, d) float64. labels: (n,) int64 or None.
    extractor: the name of the extractor that computed them.
    """

    name: str
    features: Tensor
    labels: Tensor | None
    extractor: str


@dataclass(frozen=True)
class Provenance:
    """Where measured samples come from.

    method: the sampler or model, as the table shows it. nfe: network calls per sample. seed: of their noise. seconds:
    time to draw them all. latency_ms: time to draw one, None when not measured.
    """

    method: str
    nfe: int
    seed: int
    seconds: float
    latency_ms: float | None = None


@dataclass(frozen=True)
class Measurement:
    """The figures of one set of samples.

    method, nfe, seed, seconds, latency_ms: of their Provenance. frechet, kernel, kernel_error, precision, recall: as in
    `fidelity`. accuracy: share of samples that the extractor puts in the class asked for; None without labels or a
    classifier. extractor: the name of the features. samples: how many were measured. reference: what they were measured
    against, with its count.
    """

    method: str
    nfe: int
    frechet: float
    kernel: float
    kernel_error: float
    precision: float
    recall: float
    accuracy: float | None
    extractor: str
    samples: int
    reference: str
    seed: int
    seconds: float
    latency_ms: float | None

    def row(self) -> dict[str, str | int | float | None]:
        """The fields in order, ready for JSON."""
        return asdict(self)


def reference_features(samples: SampleSet, name: str, extractor: Extractor) -> ReferenceFeatures:
    """Features of every sample of a split. Raises DataError when it is empty."""
    if len(samples) == 0:
        raise DataError(f"{name} has no samples to measure against")
    features: list[Tensor] = []
    labels: list[Tensor] = []
    for indices in torch.split(torch.arange(len(samples)), _FETCH_SIZE):
        images, classes = samples.fetch(indices)
        features.append(extractor.features(images))
        if classes is not None:
            labels.append(classes)
    return ReferenceFeatures(name, torch.cat(features), torch.cat(labels) if labels else None, extractor.name)


def measure(
    images: Tensor,
    labels: Tensor | None,
    reference: ReferenceFeatures,
    extractor: Extractor,
    provenance: Provenance,
) -> Measurement:
    """Measure generated images (n, C, H, W), asked for as classes labels (n,), against the reference.

    Raises ShapeError when the reference comes from another extractor, or on images or labels that do not fit.
    """
    if reference.extractor != extractor.name:
        raise ShapeError(
            f"the reference {reference.name!r} holds features of {reference.extractor}, not of {extractor.name}: "
            f"compute it with the extractor that measures"
        )
    features = extractor.features(images)
    kernel = kernel_distance(features, reference.features)
    precision, recall = precision_recall(reference.features, features)
    return Measurement(
        **asdict(provenance),
        frechet=frechet_distance(features, reference.features),
        kernel=kernel.value,
        kernel_error=kernel.standard_error,
        precision=precision,
        recall=recall,
        accuracy=_accuracy(images, labels, extractor),
        extractor=extractor.name,
        samples=len(images),
        reference=f"{reference.name} ({len(reference.features)})",
    )


def _accuracy(images: Tensor, labels: Tensor | None, extractor: Extractor) -> float | None:
    if labels is None:
        return None
    try:
        predicted = extractor.classify(images)
    except UnsupportedError:
        return None
    return class_accuracy(predicted, labels.to(predicted.device))
