"""iSD (2601.22679): the tangent of the Eulerian identity is driven by the model's own velocity, without gradient."""

from dataclasses import dataclass
from typing import Literal, final, get_args

from torch import Tensor
from torch.nn.functional import cosine_similarity

from fewstep.flow.derivatives import Derivative
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.times import BetaTimes
from fewstep.networks.condition import Condition
from fewstep.objectives.eulerian import eulerian_error
from fewstep.objectives.losses import Comparison, Weighting, error_norm
from fewstep.objectives.pairs import JointObjective, Pairs
from fewstep.utils.serialization import later
from fewstep.utils.tensors import check_choice, check_positive

AnchorKind = Literal["weighting", "mean-cosine"]


@final
@dataclass(frozen=True, kw_only=True)
class ISD(JointObjective):
    """loss = w (|v(x_t, t) - v*|^2 + distill |N - sg N_target|^2), N_target = N + R along sg v(x_t, t).

    The second term is of samples with s < t. v* = alpha' x0 + sigma' eps; with guidance, which is iSD-T,
    v* = v_null + omega (alpha' x0 + sigma' eps - v_null), v_null the model's own without a label and without gradient.

    Source: 2601.22679; math.md sections 5.1 to 5.3.
    Deviations: the paper has `distill` 1, no share of samples with s = t and no endpoint_share. What its published
    runs set besides is in the recipes imagenet256-dit-b4 and -xl1. On too large a `distill`:
    docs/explanation/why-an-anchor.md.
    """

    pairs: Pairs = Pairs(times=BetaTimes(), flow_matching_ratio=0.0)
    weighting: Weighting = Weighting(weight_power=1.0)
    derivative: Derivative = Derivative()
    anchor: AnchorKind = later(lambda: "weighting")
    """How |v - v*|^2 is measured: as `weighting` says, or mean-cosine, mean square plus 1 - cos(v, v*)."""
    distill: float = later(lambda: 1.0)
    """Weight of the second term, above 0; 1 in the paper. Too much, and the anchor holds no longer."""

    def method(self, preconditioning: str, labelled: bool) -> str:
        return "iSD-T" if self.guidance.active and labelled else "iSD"

    def forward_passes(self, bf16: bool = False) -> tuple[float, float]:
        """Guidance evaluates without a label where one is kept; samples with s = t are spared the second term.

        A finite difference takes two points more; under bf16 all three, in float32 (flow/derivatives.py).
        """
        null, off = self.guidance.share(self.label_dropout), 1 - self.pairs.flow_matching_ratio
        added, wide = self.derivative.evaluations(bf16)
        return null + 3 * (1 - off) + (6 + added) * off, wide * off

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(distill=self.distill)
        check_choice("anchor", self.anchor, get_args(AnchorKind))

    @property
    def share(self) -> float:
        return self.distill

    def anchor_loss(self, error: Tensor, v: Tensor, target: Tensor) -> Tensor:
        if self.anchor == "weighting":
            return self.weighting.measure(error)
        return error_norm(error, "l2", 0.0) + 1 - cosine_similarity(v.flatten(1), target.flatten(1))

    def off_diagonal(
        self, flow_map: FlowMap, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: Condition
    ) -> Comparison:
        v = v.detach()
        output, d_output = self.derivative.along(flow_map, x, v, t, s, cond)
        return eulerian_error(flow_map, x, v, output, d_output, t, s, cond)
