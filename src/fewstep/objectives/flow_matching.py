"""Regression on the diagonal: flow matching and denoising score matching (math.md §1; 2210.02747, 2206.00364)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap, at
from fewstep.flow.guidance import drop_labels
from fewstep.flow.times import LogitNormalTimes, TimeDistribution
from fewstep.networks.condition import Condition
from fewstep.objectives.base import ALONE, STREAM_T, Acting, Batch, Companions, Losses, Objective
from fewstep.utils.errors import ConfigError
from fewstep.utils.tensors import expand, nonzero, per_sample_mean


def conditioned(batch: Batch, dropout: float) -> Condition:
    """The batch's labels with dropout, and its observations, as a condition."""
    labels = None if batch.labels is None else drop_labels(batch.labels, dropout, batch.draws)
    return Condition(labels, observation=batch.observation)


@final
@dataclass(frozen=True)
class DiagonalMatching(Objective):
    """E w(t) |v(x_t, t) - v*|^2 with v* = alpha' x0 + sigma' eps, or the same error as a denoiser's.

    measure "velocity": w = 1. "denoiser": |D - x0|^2 with EDM's weight (alpha^2 sd^2 + sigma^2)/(sigma sd)^2, for
    networks with EDM's inner scaling; sd = sigma_data.
    """

    times: TimeDistribution = field(default_factory=LogitNormalTimes)
    measure: Literal["velocity", "denoiser"] = "velocity"
    """What the error is of: the velocity (flow matching) or the denoiser (EDM)."""
    sigma_data: float | None = None
    """The data's standard deviation in EDM's weight; None takes what the flow map's configuration says."""
    dropout: float = 0.1
    """Probability in [0, 1] of hiding a sample's label; guidance needs a model without labels too."""

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        if self.sigma_data is not None and not 0 < self.sigma_data < math.inf:
            raise ConfigError(f"sigma_data is {self.sigma_data}; it must be positive and finite")

    @property
    def label_dropout(self) -> float:
        return self.dropout

    @property
    def on_diagonal(self) -> bool:
        return True

    def deviation(self, flow_map: FlowMap) -> float:
        """The data's standard deviation; raises ConfigError when nothing states it."""
        return deviation_of(flow_map) if self.sigma_data is None else self.sigma_data

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        path, x0 = flow_map.path, batch.x0
        cond = conditioned(batch, self.dropout)
        t = self.times.quantile(path, batch.draws.uniform(STREAM_T))
        eps = batch.noise()
        if self.measure == "velocity":
            velocity = flow_map.velocity(path.interpolate(x0, eps, t), t, cond)
            loss = per_sample_mean(batch.count(velocity - path.conditional_velocity(x0, eps, t)).square())
        else:
            loss = denoising_loss(flow_map, batch, eps, t, cond, self.deviation(flow_map))
        return Losses(loss, t, t, {"matching": loss.detach()})


@final
@dataclass(frozen=True)
class Regression(Objective):
    """|X(0, t_max, t_min) - x0|^2: one jump from no noise at all, which learns E[x0 | condition].

    What a policy cloned by least squares does, with the network and the loop of the others: the baseline that has no
    answer where demonstrations differ. A policy of it starts from zero in place of noise.
    """

    dropout: float = 0.0
    """Probability in [0, 1] of hiding a sample's label."""

    def __post_init__(self) -> None:
        check_dropout(self.dropout)

    @property
    def acting(self) -> Acting:
        return "mean"

    @property
    def label_dropout(self) -> float:
        return self.dropout

    @property
    def to_data_end(self) -> bool:
        return True

    def __call__(self, flow_map: FlowMap, batch: Batch, companions: Companions = ALONE) -> Losses:
        x0, path = batch.x0, flow_map.path
        t, s = at(path.t_max, x0), at(path.t_min, x0)
        mean = flow_map.jump(torch.zeros_like(x0), t, s, conditioned(batch, self.dropout))
        loss = per_sample_mean(batch.count(mean - x0).square())
        return Losses(loss, t, s, {"regression": loss.detach()})


def deviation_of(flow_map: FlowMap) -> float:
    """The data's standard deviation as the flow map's configuration says; raises ConfigError when it has none."""
    if flow_map.config is None:
        raise ConfigError("denoising errors are measured in units of sigma_data: build the map from a FlowMapConfig")
    return flow_map.config.sigma_data


def denoising_loss(
    flow_map: FlowMap, batch: Batch, eps: Tensor, t: Tensor, cond: Condition, sigma_data: float
) -> Tensor:
    """EDM's weighted denoising loss (2206.00364), (B,): (alpha^2 sd^2 + sigma^2)/(sigma sd)^2 |D(x_t, t) - x0|^2.

    0 at sigma = 0, where D = x0.
    """
    p, x = flow_map.path.values(t), flow_map.path.interpolate(batch.x0, eps, t)
    weight = (p.alpha**2 * sigma_data**2 + p.sigma**2).sqrt() / nonzero(p.sigma * sigma_data)
    error = expand(weight, x).to(x.dtype) * (flow_map.denoise(x, t, cond) - batch.x0)
    return per_sample_mean(batch.count(error).square())


def check_dropout(probability: float) -> None:
    """Raise ConfigError unless the label dropout is a probability."""
    if not 0 <= probability <= 1:
        raise ConfigError(f"label dropout is {probability}; it must lie in [0, 1]")
