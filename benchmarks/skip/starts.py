"""What students' jumps give early on: Euler's, Analytic-Precond's and the skip's, from the same noise."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import fewstep as fs
from benchmarks.harness import figure, train_to, trainer_of
from benchmarks.skip.methods import methods
from fewstep.flow.flow_map import at
from fewstep.flow.ode import trajectory
from fewstep.sampling.images import image_grid, to_uint8, visible_scale
from fewstep.utils.random import Draws

SHOWN = ("euler", "analytic", "regressed, jump end", "covariance, jump end")
"""Methods, in the order of the rows' blocks: three rows each, then the teacher's ODE."""
SEED = 91_000
COUNT = 12


@torch.no_grad()
def one_call(model: fs.FlowMap, noise: Tensor) -> Tensor:
    """X(noise, t_max, t_min)."""
    path = model.path
    return model.jump(noise, at(path.t_max, noise), at(path.t_min, noise))


def draw_starts(dataset: str, teacher: Path, data: fs.Dataset, steps: int, file: Path) -> None:
    """A row of samples in one call after 0 steps, 1 % and 10 % of `steps`, of each method; below, the teacher's."""
    flow_map = fs.load(teacher).flow_map
    noise = flow_map.path.prior(Draws(SEED, 0, torch.arange(COUNT)).normal(0, data.shape))
    rows: dict[str, Tensor] = {}
    for name in SHOWN:
        config = replace(methods(dataset)[name], teacher=str(teacher))
        with trainer_of(config, data) as trainer:
            for moment in (0, max(1, steps // 100), steps // 10):
                train_to(trainer, moment)
                rows[f"{name}\n{moment} steps"] = one_call(trainer.learner.flow_map, noise)
    times = torch.tensor([flow_map.path.t_max, flow_map.path.t_min], dtype=torch.float64)
    with torch.no_grad():
        rows["the teacher's ODE"] = [*trajectory(flow_map.denoise, flow_map.path, noise, times, steps=40)][-1]
    with figure(file, len(rows), 1, 0.4) as axes:
        for axis, (name, images) in zip(axes, rows.items(), strict=True):
            pixels = to_uint8(images.clamp(-1, 1), (-1.0, 1.0))
            axis.imshow(image_grid(pixels, COUNT, scale=visible_scale(pixels)))
            axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            for spine in axis.spines.values():
                spine.set_visible(False)
    print(file)
