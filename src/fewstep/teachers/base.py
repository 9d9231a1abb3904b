"""What a teacher is, and its denoiser on another path."""

from typing import Protocol

import torch
from torch import Tensor

from fewstep.flow.ode import Denoiser
from fewstep.flow.paths import Path
from fewstep.networks.condition import Condition
from fewstep.utils.tensors import constant, expand


class Teacher(Protocol):
    """A model of the denoiser on a path of its own: a flow map, or a foreign model wrapped."""

    @property
    def path(self) -> Path:
        """Whose clock its times are in."""

    def denoise(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """D(x, t) = E[x0 | x_t], (B, ...); x (B, ...), t (B,) in the clock of `path`."""


def denoiser_on(path: Path, teacher: Teacher) -> Denoiser:
    """The teacher's denoiser in the coordinates and clock of `path`.

    D(x, t) = D_teacher(c x, t'), tau'(t') = tau(t) and c = sqrt((alpha'^2 + sigma'^2) / (alpha^2 + sigma^2)); t' is
    held within the teacher's own range, so that beyond it the teacher sees the level next to the one asked for.
    """
    if teacher.path == path:
        return teacher.denoise

    def denoise(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        t = path.clock(t)
        ends = constant([teacher.path.t_min, teacher.path.t_max], t)
        own = teacher.path.time_from_tau(path.tau(t).clamp(*teacher.path.tau(ends))).clamp(*ends)
        here, there = path.values(t), teacher.path.values(own)
        scale = torch.hypot(there.alpha, there.sigma) / torch.hypot(here.alpha, here.sigma)
        return teacher.denoise(expand(scale, x).to(x.dtype) * x, own, cond)

    return denoise
