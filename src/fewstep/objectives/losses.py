"""How an error becomes a loss, per sample: norms, distances, adaptive weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor
from torch.nn.functional import relu

from fewstep.flow.paths import Path
from fewstep.objectives.base import Batch, Companions, DiscriminatorFunction, Objective
from fewstep.utils.serialization import later
from fewstep.utils.tensors import check_choice, check_least, check_positive, expand

LossNorm = Literal["l2", "pseudo-huber", "pseudo-huber-mean"]
TimeWeight = Literal["none", "cosine"]
DistanceKind = Literal["l2", "pseudo-huber", "features"]


@dataclass(frozen=True)
class Comparison:
    """An error (B, ...), prediction less target, with the sides that it compares.

    prediction: what the gradient moves: N, or what an objective compares in its place. derivative: the dN/dt or dN/ds
    that the target is made of, where there is one.
    """

    error: Tensor
    prediction: Tensor
    derivative: Tensor | None = None

    def sizes(self) -> dict[str, Tensor]:
        """Root mean square of a sample's numbers, (B,) each, detached: prediction, target and derivative."""
        prediction, error = self.prediction.detach(), self.error.detach()
        found = {} if self.derivative is None else {"derivative_rms": rms(self.derivative.detach())}
        return found | {"target_rms": rms(prediction - error), "prediction_rms": rms(prediction)}


def rms(values: Tensor) -> Tensor:
    """Root mean square of a sample's numbers: (B, ...) -> (B,)."""
    return values.flatten(1).square().mean(1).sqrt()


@final
@dataclass(frozen=True)
class Weighting:
    """How an error becomes a loss: its norm, weighted by w = sg (loss + weight_eps)^-weight_power per sample.

    The adaptive weight is of MeanFlow and iSD (2505.13447, 2601.22679).
    """

    norm: LossNorm = "l2"
    """How errors are measured: l2, their mean square, or pseudo-huber, which counts large ones less
    pseudo-huber-mean: sqrt(mean square + c^2) - c, whose c does not depend on the dimension; iSD's with c = 5
    """
    huber_c: float = 0.03
    """The c of pseudo-huber, above 0: an error much larger counts by its size, a smaller one by its square."""
    weight_power: float = 0.0
    """Power of the adaptive weight w, at least 0; 1 in iSD and MeanFlow, 0 is no weight."""
    weight_eps: float = 0.01
    """Added to the loss in the adaptive weight w, above 0; 0.01 in iSD, 0.001 in MeanFlow."""
    eps_of_sum: bool = later(bool)
    """Add weight_eps to the sum of a sample's numbers, as MeanFlow does: it is divided by how many they are."""
    time_weight: TimeWeight = later(lambda: "none")
    """cosine: also weigh by cos(pi t/2), t the share of the path's clock, as iSD's largest run does; or none."""

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, get_args(LossNorm))
        check_choice("time_weight", self.time_weight, get_args(TimeWeight))
        check_positive(huber_c=self.huber_c, weight_eps=self.weight_eps)
        check_least(0, weight_power=self.weight_power)

    def measure(self, error: Tensor) -> Tensor:
        """(B, ...) -> (B,), not weighted yet."""
        return error_norm(error, self.norm, self.huber_c)

    def weight(self, path: Path, loss: Tensor, t: Tensor, numbers: int) -> Tensor:
        """w (B,) of a loss (B,) at times t (B,) of samples of so many numbers, without gradient."""
        weight = (loss.detach() + self.weight_eps / (numbers if self.eps_of_sum else 1)) ** -self.weight_power
        if self.time_weight == "none":
            return weight
        share = (t - path.t_min) / (path.t_max - path.t_min)
        return weight * torch.cos(0.5 * math.pi * share).to(weight.dtype)


@final
@dataclass(frozen=True)
class Distance:
    """d(a, b) between jumps that should agree (math.md section 4)."""

    kind: DistanceKind = "l2"
    """l2 (squared), pseudo-huber, which counts large errors less, or features (squared, of a feature extractor)."""
    huber_c: float = 0.03
    """The c of pseudo-huber, above 0; iCT's is 0.00054 times the root of the numbers in a sample."""

    def __post_init__(self) -> None:
        check_choice("distance", self.kind, get_args(DistanceKind))
        check_positive(huber_c=self.huber_c)

    def __call__(self, batch: Batch, a: Tensor, b: Tensor, companions: Companions) -> Tensor:
        """(B, ...), (B, ...) -> (B,): between samples, or between their features."""
        if self.kind == "features":
            features = companions.perceptual_features
            return error_norm(features(a) - features(b), "l2", self.huber_c)
        return error_norm(batch.masked(a - b), self.kind, self.huber_c)


@dataclass(frozen=True, kw_only=True)
class DistanceObjective(Objective):
    """Compares two jumps by a distance."""

    distance: Distance = Distance()

    @property
    def measures_features(self) -> bool:
        return self.distance.kind == "features"


def error_norm(error: Tensor, norm: LossNorm, huber_c: float) -> Tensor:
    """(B, ...) -> (B,): mean square, or pseudo-Huber sqrt(sum of squares + c^2) - c (iCT, 2310.14189) over sqrt(dim).

    Dividing by sqrt(dim) keeps pseudo-Huber's size independent of the data's dimension, as the mean does for L2. Of the
    mean it is sqrt(mean square + c^2) - c (iSD, 2601.22679).
    """
    flat = error.flatten(1)
    if norm == "l2":
        return flat.square().mean(1)
    if norm == "pseudo-huber-mean":
        return torch.sqrt(flat.square().mean(1) + huber_c * huber_c) - huber_c
    distance = torch.sqrt(flat.square().sum(1) + huber_c * huber_c) - huber_c
    return distance / math.sqrt(flat.shape[1])


def normalised(tangent: Tensor, constant: float, masked: Tensor | None = None) -> Tensor:
    """g / (rms(g) + constant), per sample (B, ...): the root mean square of a sample's numbers (sCM, 2410.11081).

    masked: g as a loss counts it, whose rms is taken instead (Batch.masked).
    """
    return tangent / expand(rms(tangent if masked is None else masked) + constant, tangent)


def generator_loss(discriminator: DiscriminatorFunction, generated: Tensor, labels: Tensor | None) -> Tensor:
    """-D(x), (B,), of a hinge loss (1705.02894): falls as the discriminator D takes x for real."""
    return -discriminator(generated, labels)


def discriminator_loss(
    discriminator: DiscriminatorFunction, real: Tensor, generated: Tensor, labels: Tensor | None
) -> Tensor:
    """relu(1 - D(x0)) + relu(1 + D(x)), (B,), with D the discriminator; x without gradient (hinge loss, 1705.02894)."""
    return relu(1 - discriminator(real, labels)) + relu(1 + discriminator(generated.detach(), labels))


def gradient_balance(
    first: Tensor, second: Tensor, weight: Tensor, average: Callable[[Tensor], Tensor], largest: float = 1e4
) -> Tensor:
    """|grad of mean(first)| / |grad of mean(second)| on `weight`, a detached scalar of at most `largest`.

    Brings two losses (B,) to one influence on a layer (VQGAN, 2012.09841; CTM, 2310.02279). average: over processes.
    Both keep their graphs. Without gradients (under no_grad) it is 1.
    """
    if not (first.requires_grad and second.requires_grad):
        return first.new_ones(())
    first_norm, second_norm = (
        torch.linalg.vector_norm(average(torch.autograd.grad(loss.mean(), weight, retain_graph=True)[0]))
        for loss in (first, second)
    )
    ratio: Tensor = (first_norm / second_norm.clamp(min=1e-12)).clamp(max=largest)
    return ratio.to(first.dtype).detach()
