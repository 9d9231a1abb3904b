"""Regression on the diagonal: flow matching and denoising score matching (math.md section 1)."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.times import LogitNormalTimes, TimeDistribution
from fewstep.networks.condition import Condition
from fewstep.objectives.base import ALONE, STREAM_T, Batch, Companions, Losses, Objective
from fewstep.utils.errors import ConfigError
from fewstep.utils.tensors import check_positive, expand, nonzero, per_sample_mean


@final
@dataclass(frozen=True, kw_only=True)
class DiagonalMatching(Objective):
    """E |v(x_t, t) - v*|^2 with v* = alpha' x0 + sigma' eps, or the same error as a denoiser's.

    measure "velocity": as it stands. "denoiser": |D - x0|^2 with EDM's weight (alpha^2 sd^2 + sigma^2)/(sigma sd)^2,
    for networks with EDM's inner scaling; sd = sigma_data.

    Source: 2210.02747 (flow matching), 2206.00364 (EDM).
    Deviations: none; `times` are logit-normal (2403.03206) where nothing is said.
    """

    label_dropout: float = 0.1
    times: TimeDistribution = LogitNormalTimes()
    measure: Literal["velocity", "denoiser"] = "velocity"
    """What the error is of: the velocity (flow matching) or the denoiser (EDM)."""
    sigma_data: float | None = None
    """The data's standard deviation in EDM's weight; None takes what the flow map's configuration says."""

    def method(self, preconditioning: str, labelled: bool) -> str:
        return "flow matching" if self.measure == "velocity" else "denoising"

    def forward_passes(self, bf16: bool = False) -> tuple[float, float]:
        return 3.0, 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_data is not None:
            check_positive(sigma_data=self.sigma_data)

    on_diagonal: ClassVar[bool] = True

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        path, x0 = flow_map.path, batch.x0
        t = self.times.quantile(path, batch.draws.uniform(STREAM_T))
        cond = self.condition(flow_map, batch, t)
        eps = batch.noise()
        if self.measure == "velocity":
            velocity = flow_map.velocity(path.interpolate(x0, eps, t), t, cond)
            loss = per_sample_mean(batch.masked(velocity - path.conditional_velocity(x0, eps, t)).square())
        else:
            loss = denoising_loss(flow_map, batch, eps, t, cond, deviation_of(flow_map, self.sigma_data))
        return Losses(loss, t, t, {"matching": loss.detach()})


def deviation_of(flow_map: FlowMap, stated: float | None) -> float:
    """The data's standard deviation, as stated or as the flow map's configuration says.

    Raises ConfigError when nothing says it.
    """
    if stated is not None:
        return stated
    if flow_map.config is None:
        raise ConfigError("denoising errors are measured in units of sigma_data: build the map from a FlowMapConfig")
    return flow_map.config.sigma_data


def denoising_loss(
    flow_map: FlowMap,
    batch: Batch,
    eps: Tensor,
    t: Tensor,
    cond: Condition,
    sigma_data: float,
    target: Tensor | None = None,
) -> Tensor:
    """EDM's weighted denoising loss (2206.00364), (B,): (alpha^2 sd^2 + sigma^2)/(sigma sd)^2 |D(x_t, t) - x0|^2.

    0 at sigma = 0, where D = x0. target: what D is compared with in place of x0.
    """
    p, x = flow_map.path.values(t), flow_map.path.interpolate(batch.x0, eps, t)
    weight = (p.alpha**2 * sigma_data**2 + p.sigma**2).sqrt() / nonzero(p.sigma * sigma_data)
    error = expand(weight, x).to(x.dtype) * (flow_map.denoise(x, t, cond) - (batch.x0 if target is None else target))
    return per_sample_mean(batch.masked(error).square())
