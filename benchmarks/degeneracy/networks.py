"""Small networks on a mixture of Gaussians in the plane, trained by the library's objectives with and without anchor.

The seeds of a run are one module, whose weights have the seed as their first axis: batches hold the samples seed by
seed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.degeneracy.gaussian import F64, OFFSET
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.flow.closed_form import MixtureData
from fewstep.flow.flow_map import FlowMap, at
from fewstep.flow.ode import reference_solution
from fewstep.flow.paths import Linear
from fewstep.flow.preconditioning.jumps import LinearPreconditioning
from fewstep.flow.times import UniformTimes
from fewstep.networks.condition import Condition
from fewstep.networks.mlp import MLPConfig
from fewstep.objectives import ESD, ISD, LSD, PSD, Batch, MeanFlow, Objective, Pairs, Shortcut, Weighting
from fewstep.utils.random import Draws

SEEDS = 3
ROWS = 192
STEPS = 800
HELDOUT = 400
LEARNING_RATE = 5e-3
DAMPING = 1e-2
"""Adam's epsilon: large, so that updates vanish where gradients do and a fixed point is one for the optimizer too."""
START = 1_000_000
TOWARDS = (-1.0, 1.5)
STRENGTH = 4.0
PATH = Linear()
STREAM_COMPONENT, STREAM_DATA, STREAM_PRIOR = 60, 61, 62
_SETTINGS: dict[str, Any] = {"pairs": Pairs(UniformTimes(), 0.5), "label_dropout": 0.0, "weighting": Weighting()}
OBJECTIVES: dict[str, Objective] = {
    "iSD": ISD(**_SETTINGS),
    "ESD": ESD(**_SETTINGS),
    "LSD": LSD(**_SETTINGS),
    "PSD": PSD(**_SETTINGS),
    "shortcut": Shortcut(steps=32, bootstrap=0.5, target_decay=None, label_dropout=0.0),
    "MeanFlow": MeanFlow(**_SETTINGS),
}


def mixture() -> MixtureData:
    """Three components about (1, 0.5)."""
    angles = math.pi * (0.25 + 2 * torch.arange(3, dtype=F64) / 3)
    means = torch.tensor([1.0, 0.5], dtype=F64) + 1.2 * torch.stack([angles.cos(), angles.sin()], 1)
    weights, sds = ([0.4, 0.35, 0.25], [0.25, 0.35, 0.3])
    return MixtureData(torch.tensor(weights, dtype=F64), means, torch.tensor(sds, dtype=F64))


class Networks(nn.Module):
    """N(x, t, s) of SEEDS networks with two hidden layers, (SEEDS * B, 2) -> (SEEDS * B, 2), seed by seed."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        draws, sizes = Draws(5, 0, torch.arange(SEEDS)), (4, width, width, 2)
        shapes = list(pairwise(sizes))
        self.weights = nn.ParameterList(draws.normal(i, s, F64) / math.sqrt(s[0]) for i, s in enumerate(shapes))
        self.biases = nn.ParameterList(0.5 * draws.normal(10 + i, (1, s[1]), F64) for i, s in enumerate(shapes))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: object = None) -> Tensor:
        h = torch.cat([x, t[:, None], s[:, None]], 1).unflatten(0, (SEEDS, -1))
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, torch.tanh(h) if i else h, weight)
        return h.flatten(0, 1)


def batch_of(step: int, rows: int = ROWS) -> Batch:
    """Fresh data for every seed."""
    draws = Draws(7, step, torch.arange(SEEDS * rows))
    x0 = mixture().sample(draws.uniform(STREAM_COMPONENT), draws.normal(STREAM_DATA, (2,), F64))
    return Batch(x0, None, draws)


def per_seed(values: Tensor) -> Tensor:
    """The mean over a seed's samples, broadcast over them: (SEEDS * B,) -> (SEEDS * B,)."""
    groups = values.unflatten(0, (SEEDS, -1))
    return groups.mean(1, keepdim=True).expand_as(groups).flatten()


Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "both terms": lambda anchor, distill: anchor + distill,
    "no anchor": lambda anchor, distill: distill,
    "apart, by sample": lambda anchor, distill: (
        anchor / (anchor.detach() + OFFSET) + distill / (distill.detach() + OFFSET)
    ),
    "apart, by batch": lambda anchor, distill: (
        anchor / (per_seed(anchor.detach()) + OFFSET) + distill / (per_seed(distill.detach()) + OFFSET)
    ),
    "together, by sample": lambda anchor, distill: (anchor + distill) / ((anchor + distill).detach() + OFFSET),
}
"""Per sample, of the anchor and the distillation, each zero where the objective does not take it."""
EVERY = ("both terms", "no anchor")
DIGITS = (("both terms", 1e-3), ("together, by sample", 1e-3), ("apart, by sample", 1e-4), ("apart, by sample", 1e-3))
PLAN = (
    *((name, loss, "random") for name in OBJECTIVES for loss in EVERY),
    *((name, loss, "collapsed") for name in ("iSD", "PSD") for loss in EVERY),
    *(("iSD", loss, "random") for loss in list(LOSSES)[2:]),
)


@dataclass(frozen=True)
class Truth:
    """Held-out points with their exact jumps, and noise with the samples that the ODE makes of it."""

    x: Tensor
    t: Tensor
    s: Tensor
    jumped: Tensor
    noise: Tensor
    samples: Tensor

    @staticmethod
    def draw() -> "Truth":
        """By the Runge-Kutta method on the mixture's denoiser."""
        batch, data = batch_of(START - 1, HELDOUT), mixture()
        t, s = Pairs(UniformTimes(), 0.0).draw(PATH, batch)
        x, noise = PATH.interpolate(batch.x0, batch.noise(), t), batch.draws.normal(STREAM_PRIOR, (2,), F64)
        jumped = exact_jump(data, x, t, s)
        return Truth(x, t, s, jumped, noise, exact_jump(data, noise, at(1.0, noise), at(0.0, noise)))

    def measure(self, flow_map: FlowMap) -> dict[str, list[float]]:
        """A value a seed, root mean squares over samples in units of x.

        inconsistency: X(x, t, s) - X(X(x, t, u), u, s), u in the middle. error: X - the data's flow map. variance: of
        one-step samples over that of the exact ones.
        """
        u = (self.t + self.s) / 2
        with torch.no_grad():
            jumped = flow_map.jump(self.x, self.t, self.s)
            twice = flow_map.jump(flow_map.jump(self.x, self.t, u), u, self.s)
            samples = flow_map.jump(self.noise, at(1.0, self.noise), at(0.0, self.noise))
        found = {
            "inconsistency": rms(jumped - twice),
            "error": rms(jumped - self.jumped),
            "variance": variance(samples) / variance(self.samples),
        }
        return {key: value.tolist() for key, value in found.items()}


def exact_jump(data: MixtureData, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The mixture's flow map by its ODE."""

    def denoise(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return data.denoise(PATH, x, t)

    return reference_solution(denoise, PATH, x, t, s)


def rms(error: Tensor) -> Tensor:
    """Of each seed's samples, per element: (SEEDS * B, 2) -> (SEEDS,)."""
    return error.unflatten(0, (SEEDS, -1)).square().mean((1, 2)).sqrt()


def variance(samples: Tensor) -> Tensor:
    """Total variance of each seed's samples: (SEEDS * B, 2) -> (SEEDS,)."""
    return samples.unflatten(0, (SEEDS, -1)).var(1).sum(1)


def collapse(flow_map: FlowMap) -> None:
    """Regress the networks on N = k (x - c)/(1 + k t), the flow map that contracts to c (why-an-anchor.md)."""
    optimizer, towards = torch.optim.Adam(flow_map.parameters(), 1e-2), torch.tensor(TOWARDS, dtype=F64)
    for step in range(300):
        batch = batch_of(START + step)
        t, s = Pairs(UniformTimes(), 0.0).draw(PATH, batch)
        x = PATH.interpolate(batch.x0, batch.noise(), t)
        target = STRENGTH * (x - towards) / (1 + STRENGTH * t[:, None])
        descend(optimizer, (flow_map.output(x, t, s) - target).square().mean())


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step; `loss` is the mean over seeds, whose gradients are apart."""
    optimizer.zero_grad()
    (SEEDS * loss).backward()
    optimizer.step()


def train(objective: Objective, loss: Loss, start: str, truth: Truth) -> tuple[FlowMap, dict[str, list[float]]]:
    """The trained networks, and what they measured at the start."""
    flow_map = FlowMap(PATH, LinearPreconditioning(), Networks())
    if start == "collapsed":
        collapse(flow_map)
    before = truth.measure(flow_map)
    optimizer = torch.optim.Adam(flow_map.parameters(), LEARNING_RATE, eps=DAMPING)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        terms = objective(flow_map, batch_of(step)).terms
        descend(optimizer, loss(terms["anchor"], terms["distill"]).mean())
    return flow_map, before


def on_digits(loss: str, lr: float, steps: int = 400, rows: int = 256) -> dict[str, float]:
    """iSD on scikit-learn's digits with their classes by an MLP, one seed: its losses, and what one call samples.

    anchor, distill: means over the last 50 steps. variance: total, of samples over that of the data. mean: root mean
    square of the samples' mean less the data's. classes: variance of the means by class over that of the data's.
    For x + m, m the data's mean, `variance` would be noise_variance, `classes` by chance noise_classes, and the loss of
    the anchor translation.
    """
    dataset = load_dataset(DataConfig(source="digits"))
    x0, labels = dataset.train.fetch(torch.arange(len(dataset.train)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MLPConfig(width=256, depth=3, embedding_width=64, max_frequency=16.0).build((1, 8, 8), 10, False)
    flow_map, losses = FlowMap(PATH, LinearPreconditioning(), network), []
    optimizer, objective = torch.optim.Adam(flow_map.parameters(), lr), ISD(weighting=Weighting())
    for step in range(steps):
        draws = Draws(0, step, torch.arange(rows))
        chosen = draws.integers(STREAM_DATA, len(x0))
        terms = objective(flow_map, Batch(x0[chosen], labels[chosen], draws)).terms
        optimizer.zero_grad()
        LOSSES[loss](terms["anchor"], terms["distill"]).mean().backward()
        torch.nn.utils.clip_grad_norm_(flow_map.parameters(), 1.0)
        optimizer.step()
        losses.append([float(terms[key].detach().mean()) for key in ("anchor", "distill")])
    noise, asked = Draws(9, 0, torch.arange(1000)).normal(STREAM_PRIOR, (1, 8, 8)), torch.arange(1000) % 10
    with torch.no_grad():
        samples = flow_map.jump(noise, at(1.0, noise), at(0.0, noise), Condition(asked))
    means, own = (torch.stack([v[k == c].mean(0) for c in range(10)]) for v, k in ((samples, asked), (x0, labels)))
    last = torch.tensor(losses[-50:]).mean(0)
    return {
        "anchor": float(last[0]),
        "distill": float(last[1]),
        "variance": float(samples.var(0).sum() / x0.var(0).sum()),
        "mean": float((samples.mean(0) - x0.mean(0)).square().mean().sqrt()),
        "noise_variance": float(x0[0].numel() / x0.var(0).sum()),
        "noise_classes": float(x0[0].numel() / 100 / own.var(0).sum()),
        "translation": float(1 + x0.var(0).mean()),
        "classes": float(means.var(0).sum() / own.var(0).sum()),
    }
