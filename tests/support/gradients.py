"""Gradients of an objective: those of a map's weights, and the expected one at an oracle."""

import math
from typing import Any

import torch
from torch import Tensor

from fewstep.flow.closed_form import GaussianData, GaussianOutput
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.paths import Path
from fewstep.networks.condition import Condition
from fewstep.objectives import Batch, Objective
from tests.support.batches import ExactDraws, draws, whitened
from tests.support.cases import F64, SD, Callback, gaussian, noise, pair

COUNT = 100_000
"""Samples of an expectation."""


def gradients(loss: Tensor, flow_map: FlowMap) -> Tensor:
    """Of a scalar in all weights that it depends on, in one vector."""
    found = torch.autograd.grad(loss, list(flow_map.parameters()), allow_unused=True)
    return torch.cat([grad.flatten() for grad in found if grad is not None])


def z_scores(objective: Objective, path: Path, preconditioning: Any, exact: Any, batch: Batch) -> Tensor:
    """Mean over standard error of the gradient in theta of N + theta0 + theta1 x, at theta = 0; one theta a sample.

    Where there are labels the perturbation is of class 1 alone: averaged over classes, guidance cancels.
    """
    count = len(batch.x0)
    theta = torch.zeros(2, count, 1, dtype=F64, requires_grad=True)

    def output(x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        whole = len(x) == count and torch.is_grad_enabled()
        seen = 1 if cond.labels is None else (cond.labels == 1)[:, None]
        return exact(x, t, s, cond) + (seen * (theta[0] + theta[1] * x) if whole else 0)

    losses = objective(FlowMap(path, preconditioning, Callback(output)), batch)
    (grads,) = torch.autograd.grad(losses.loss.sum(), theta)
    grads = grads.squeeze(-1)
    return grads.mean(1) / (grads.std(1) / math.sqrt(count))


def assert_anchored(objective: Objective, path_name: str, name: str, moved: float) -> None:
    """The expected gradient is zero at the oracle, and is not when the data move."""
    path, preconditioning = pair(path_name, name)
    data = GaussianData(torch.tensor([0.4, -0.3], dtype=F64), SD)
    exact, x0 = GaussianOutput(data, path, preconditioning), data.mean + SD * noise(COUNT, 2, seed=5)
    right = z_scores(objective, path, preconditioning, exact, Batch(x0, None, draws(COUNT)))
    assert float(right.abs().max()) < 4
    wrong = z_scores(objective, path, preconditioning, exact, Batch(x0 + moved, None, draws(COUNT)))
    assert float(wrong.abs().max()) > 8


def expected_gradient(objective: Objective, path: Path, preconditioning: Any, images: int, shift: float = 0.0) -> float:
    """Norm of the mean gradient in theta of N + theta0 + theta1 x at the oracle, for data that lie `shift` off."""
    own = ExactDraws(0, 3, torch.arange(2000))
    z = whitened(noise(2000, 1, seed=5), own.normal(10, (1,), F64))
    batch = Batch(0.4 + SD * z + shift, None, own, images)
    exact = GaussianOutput(gaussian(), path, preconditioning)
    theta = torch.zeros(2, dtype=F64, requires_grad=True)

    def output(x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        return exact(x, t, s, cond) + (theta[0] + theta[1] * x if torch.is_grad_enabled() else 0)

    losses = objective(FlowMap(path, preconditioning, Callback(output)), batch)
    return float(torch.autograd.grad(losses.mean(), theta)[0].norm())
