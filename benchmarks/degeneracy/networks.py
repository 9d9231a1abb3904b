"""Small networks on a mixture of Gaussians in the plane, trained by the library's objectives with and without anchor.

The seeds of a run are one module, whose weights have the seed as their first axis: batches hold the samples seed by
seed.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import fewstep as fs
from benchmarks.harness import Row
from fewstep.flow.flow_map import at
from fewstep.flow.ode import reference_solution
from fewstep.flow.times import UniformTimes
from fewstep.objectives import Pairs, Weighting
from fewstep.utils.random import Draws
from tests.support.gaussian_updates import F64, OFFSET

SEEDS, ROWS, STEPS, HELDOUT = 3, 192, 800, 400
LEARNING_RATE = 5e-3
DAMPING = 1e-2
"""Adam's epsilon: large, so that updates vanish where gradients do and a fixed point is one for the optimizer too."""
START = 1_000_000
TOWARDS, STRENGTH = (-1.0, 1.5), 4.0
PATH = fs.Linear()
STREAM_COMPONENT, STREAM_DATA, STREAM_PRIOR = 60, 61, 62
_SETTINGS: dict[str, Any] = {"pairs": Pairs(UniformTimes(), 0.5), "label_dropout": 0.0, "weighting": Weighting()}
OBJECTIVES: dict[str, fs.Objective] = {
    **{name: kind(**_SETTINGS) for name, kind in (("iSD", fs.ISD), ("ESD", fs.ESD), ("LSD", fs.LSD), ("PSD", fs.PSD))},
    "shortcut": fs.Shortcut(steps=32, bootstrap=0.5, target_decay=None, label_dropout=0.0),
    "MeanFlow": fs.MeanFlow(**_SETTINGS),
}


def mixture() -> fs.MixtureData:
    """Three components about (1, 0.5)."""
    angles = math.pi * (0.25 + 2 * torch.arange(3, dtype=F64) / 3)
    means = torch.tensor([1.0, 0.5], dtype=F64) + 1.2 * torch.stack([angles.cos(), angles.sin()], 1)
    weights, sds = torch.tensor([[0.4, 0.35, 0.25], [0.25, 0.35, 0.3]], dtype=F64)
    return fs.MixtureData(weights, means, sds)


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


def batch_of(step: int, rows: int = ROWS) -> fs.Batch:
    """Fresh data for every seed."""
    draws = Draws(7, step, torch.arange(SEEDS * rows))
    x0 = mixture().sample(draws.uniform(STREAM_COMPONENT), draws.normal(STREAM_DATA, (2,), F64))
    return fs.Batch(x0, None, draws)


def apart(anchor: Tensor, distill: Tensor, size: Callable[[Tensor], Tensor] = lambda loss: loss) -> Tensor:
    """Each term over its own size, a function of its losses, and the offset."""
    return anchor / (size(anchor.detach()) + OFFSET) + distill / (size(distill.detach()) + OFFSET)


def per_seed(values: Tensor) -> Tensor:
    """The mean over a seed's samples, broadcast over them: (SEEDS * B,) -> (SEEDS * B,)."""
    return by_seed(values).mean(1).repeat_interleave(len(values) // SEEDS)


Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "both terms": lambda anchor, distill: anchor + distill,
    "no anchor": lambda anchor, distill: distill,
    "apart, by sample": apart,
    "apart, by batch": lambda anchor, distill: apart(anchor, distill, per_seed),
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


class Truth:
    """Held-out points with their exact jumps, and noise with the samples that the ODE makes of it."""

    def __init__(self) -> None:
        batch = batch_of(START - 1, HELDOUT)
        self.t, self.s = Pairs(UniformTimes(), 0.0).draw(PATH, batch)
        self.x = PATH.interpolate(batch.x0, batch.noise(), self.t)
        self.noise = noise = batch.draws.normal(STREAM_PRIOR, (2,), F64)
        self.jumped = exact_jump(self.x, self.t, self.s)
        self.samples = exact_jump(noise, at(1.0, noise), at(0.0, noise))

    def measure(self, flow_map: fs.FlowMap) -> dict[str, list[float]]:
        """A value a seed, root mean squares over samples in units of x.

        inconsistency: X(x, t, s) - X(X(x, t, u), u, s), u in the middle. error: X - the data's flow map. variance: of
        one-step samples over that of the exact ones.
        """
        u = (self.t + self.s) / 2
        with torch.no_grad():
            jumped = flow_map.jump(self.x, self.t, self.s)
            twice = flow_map.jump(flow_map.jump(self.x, self.t, u), u, self.s)
            samples = flow_map.jump(self.noise, at(1.0, self.noise), at(0.0, self.noise))
        inconsistency, error = (
            by_seed(off).square().mean((1, 2)).sqrt() for off in (jumped - twice, jumped - self.jumped)
        )
        variance, exact = (by_seed(own).var(1).sum(1) for own in (samples, self.samples))
        found = {"inconsistency": inconsistency, "error": error, "variance": variance / exact}
        return {key: value.tolist() for key, value in found.items()}


def by_seed(values: Tensor) -> Tensor:
    """(SEEDS * B, ...) -> (SEEDS, B, ...)."""
    return values.unflatten(0, (SEEDS, -1))


def exact_jump(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The mixture's flow map by its ODE."""
    return reference_solution(lambda x, t, cond: mixture().denoise(PATH, x, t), PATH, x, t, s)


def collapse(flow_map: fs.FlowMap) -> None:
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


def train(name: str, loss: str, start: str, truth: Truth) -> tuple[fs.FlowMap, list[Row]]:
    """The trained networks, and a row a seed of what they measure, before too."""
    flow_map = fs.FlowMap(PATH, fs.LinearPreconditioning(), Networks())
    if start == "collapsed":
        collapse(flow_map)
    before = {f"{key}_before": values for key, values in truth.measure(flow_map).items()}
    optimizer = torch.optim.Adam(flow_map.parameters(), LEARNING_RATE, eps=DAMPING)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        terms = OBJECTIVES[name](flow_map, batch_of(step)).terms
        descend(optimizer, LOSSES[loss](terms["anchor"], terms["distill"]).mean())
    cell, found = {"kind": "network", "objective": name, "loss": loss, "start": start}, truth.measure(flow_map) | before
    own = [{key: values[seed] for key, values in found.items()} for seed in range(SEEDS)]
    return flow_map, [cell | {"seed": seed} | row for seed, row in enumerate(own)]


def on_digits(loss: str, lr: float, steps: int = 400, rows: int = 256) -> Row:
    """iSD on scikit-learn's digits with their classes by an MLP, one seed: its losses, and what one call samples.

    anchor, distill: means over the last 50 steps. variance, classes: of samples, and of the means by class, over the
    data's. mean: root mean square of the samples' mean less the data's. For x + m, m the data's mean, `variance` would
    be noise_variance, `classes` by chance noise_classes, and the loss of the anchor translation.
    """
    dataset = fs.load_dataset(fs.DataConfig(source="digits"))
    x0, labels = dataset.train.fetch(torch.arange(len(dataset.train)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = fs.MLPConfig(width=256, depth=3, embedding_width=64, max_frequency=16.0).build((1, 8, 8), 10, False)
    flow_map, losses = fs.FlowMap(PATH, fs.LinearPreconditioning(), network), []
    optimizer, objective = torch.optim.Adam(flow_map.parameters(), lr), fs.ISD(weighting=Weighting())
    for step in range(steps):
        draws = Draws(0, step, torch.arange(rows))
        chosen = draws.integers(STREAM_DATA, len(x0))
        terms = objective(flow_map, fs.Batch(x0[chosen], labels[chosen], draws)).terms
        optimizer.zero_grad()
        LOSSES[loss](terms["anchor"], terms["distill"]).mean().backward()
        torch.nn.utils.clip_grad_norm_(flow_map.parameters(), 1.0)
        optimizer.step()
        losses.append([float(terms[key].detach().mean()) for key in ("anchor", "distill")])
    noise, asked = Draws(9, 0, torch.arange(1000)).normal(STREAM_PRIOR, (1, 8, 8)), torch.arange(1000) % 10
    with torch.no_grad():
        samples = flow_map.jump(noise, at(1.0, noise), at(0.0, noise), fs.Condition(asked))
    means, own = (torch.stack([v[k == c].mean(0) for c in range(10)]) for v, k in ((samples, asked), (x0, labels)))
    anchor, distill = torch.tensor(losses[-50:]).mean(0).tolist()
    figures = {
        "variance": samples.var(0).sum() / x0.var(0).sum(),
        "mean": (samples.mean(0) - x0.mean(0)).square().mean().sqrt(),
        "noise_variance": x0[0].numel() / x0.var(0).sum(),
        "noise_classes": x0[0].numel() / 100 / own.var(0).sum(),
        "translation": 1 + x0.var(0).mean(),
        "classes": means.var(0).sum() / own.var(0).sum(),
    }
    row = {"kind": "digits", "loss": loss, "lr": lr, "anchor": anchor, "distill": distill}
    return row | {key: float(value) for key, value in figures.items()}
