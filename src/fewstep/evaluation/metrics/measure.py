"""What samples are measured with, and the figures that they get: none is given without its extractor and reference."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.data.base import SampleSet
from fewstep.data.draws import DrawnPrompts, classes_like
from fewstep.evaluation.metrics.features import Extractor
from fewstep.evaluation.metrics.fidelity import class_accuracy, frechet_distance, kernel_distance, precision_recall
from fewstep.flow.flow_map import FlowMap
from fewstep.recipes.config import EvaluationConfig
from fewstep.sampling.generate import PromptSource
from fewstep.utils.errors import UnsupportedError
from fewstep.utils.random import permutation

ENOUGH = 5  # samples for each feature, below which a Frechet distance is mostly bias
_FETCH_SIZE = 1024
_PROMPTS = -4  # an epoch of its own, as in fewstep.data.draws


@dataclass(frozen=True)
class Asked:
    """What samples are asked for: classes (count,), and prompts in turn."""

    labels: Tensor | None = None
    prompts: PromptSource | None = None


ANYTHING = Asked()


@dataclass(frozen=True)
class Evaluator:
    """An extractor of features, and the real samples that others are compared with, as it sees them.

    name: of the real samples, such as "digits held out". features: theirs, (n, d) float64. labels: theirs, (n,) int64
    or None. prompts: theirs, where they have any.
    """

    name: str
    features: Tensor
    labels: Tensor | None
    extractor: Extractor
    prompts: PromptSource | None = None

    @staticmethod
    def of(samples: SampleSet, name: str, extractor: Extractor) -> "Evaluator":
        """For every sample of a part of the data."""
        parts = [samples.fetch(indices)[0] for indices in torch.split(torch.arange(len(samples)), _FETCH_SIZE)]
        features, rows = torch.cat([extractor.features(part) for part in parts]), torch.arange(len(samples))
        prompted = samples.context(rows[:1]).prompts is not None
        prompts = DrawnPrompts(samples, permutation(0, _PROMPTS, len(samples))) if prompted else None
        return Evaluator(name, features, samples.labels, extractor, prompts)

    def classes(self, flow_map: FlowMap, count: int, settings: EvaluationConfig) -> Tensor | None:
        """Classes (count,) to draw samples of, None where the model knows none.

        In the shares of the real samples, whose distance is else that of the shares, or in equal ones if asked for.
        """
        number = flow_map.num_classes
        labels = torch.arange(number) if self.labels is None or settings.classes == "uniform" else self.labels
        return classes_like(labels, count, settings.seed) if number else None

    def asked(self, flow_map: FlowMap, count: int, settings: EvaluationConfig) -> Asked:
        """What `count` samples are asked for: classes, and the real samples' own prompts in turn."""
        return Asked(self.classes(flow_map, count, settings), self.prompts if flow_map.conditional else None)

    def measure(self, images: Tensor, labels: Tensor | None) -> dict[str, Any]:
        """Figures of images (n, C, H, W) that were asked for as classes labels (n,), ready for JSON.

        frechet, kernel, kernel_error, precision, recall: as in `fidelity`. accuracy: share of the images that the
        extractor puts in the class asked for, None without labels or a classifier. extractor, features, samples,
        reference: whose features and how many, of how many images, against what. Raises ShapeError on images or labels
        that do not fit.
        """
        features = self.extractor.features(images)
        kernel = kernel_distance(features, self.features)
        precision, recall = precision_recall(self.features, features)
        return {
            "frechet": frechet_distance(features, self.features),
            "kernel": kernel.value,
            "kernel_error": kernel.standard_error,
            "precision": precision,
            "recall": recall,
            "accuracy": self._accuracy(images, labels),
            "extractor": self.extractor.name,
            "features": features.shape[1],
            "samples": len(images),
            "reference": f"{self.name} ({len(self.features)})",
        }

    def _accuracy(self, images: Tensor, labels: Tensor | None) -> float | None:
        if labels is None:
            return None
        try:
            return class_accuracy(self.extractor.classify(images), labels)
        except UnsupportedError:
            return None
