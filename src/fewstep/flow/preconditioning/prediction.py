"""Inner scaling of networks that predict noise, data or a velocity on a path of their own (math.md §2)."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, final, get_args

import torch
from torch import Tensor

from fewstep.flow.paths import Path
from fewstep.flow.preconditioning.network_scaling import Scaling, ScalingValues
from fewstep.utils.tensors import check_choice, check_positive, constant

Prediction = Literal["epsilon", "sample", "v", "flow", "score"]
Meaning = Literal["denoiser", "velocity"]


class _Place(NamedTuple):
    """A time of the flow map, held where the network's levels reach, and the network's own time of that level."""

    time: Tensor
    own: Tensor


@final
@dataclass(frozen=True)
class PredictionScaling(Scaling):
    """N = c_skip x + c_out F is the denoiser, or the velocity on `path`, of a network F trained on the path `own`.

    F predicts a x0 + b eps: epsilon (0, 1), sample (1, 0), v (-sigma, alpha) (2202.00512), flow (-1, 1),
    score (0, -1), which is sigma times the score (1907.05600). With x = alpha x0 + sigma eps, and p x0 + q eps what is
    wanted, at the network's own time
      c_skip = (p b - q a)/d, c_out = (alpha q - sigma p)/d, d = alpha b - sigma a.
    The network reads c_in x with c_in = sqrt((alpha_own^2 + sigma_own^2)/(alpha^2 + sigma^2)), and the time
    time_factor t_own, t_own the time of equal sigma/alpha within the network's range.
    """

    prediction: Prediction
    own: Path
    path: Path
    output: Meaning = "denoiser"
    time_factor: float = 1.0

    def __post_init__(self) -> None:
        check_choice("prediction", self.prediction, get_args(Prediction))
        check_choice("output", self.output, get_args(Meaning))
        check_positive(time_factor=self.time_factor)

    def _place(self, t: Tensor) -> _Place:
        t = self.path.clock(t)
        if self.own == self.path:
            return _Place(t, t)
        ends = constant([self.own.t_min, self.own.t_max], t)
        low, high = self.own.tau(ends)
        tau = self.path.tau(t)
        own = self.own.time_from_tau(tau.clamp(low, high)).clamp(*ends)
        near, far = self.path.time_from_tau(torch.stack([low, high]))
        return _Place(t.clamp(near, far), own)

    def values(self, t: Tensor) -> ScalingValues:
        time, own_time = self._place(t)
        own, here = self.own.values(own_time), self.path.values(time)
        a, b = {
            "epsilon": (torch.zeros_like(own.alpha), torch.ones_like(own.alpha)),
            "sample": (torch.ones_like(own.alpha), torch.zeros_like(own.alpha)),
            "v": (-own.sigma, own.alpha),
            "flow": (-torch.ones_like(own.alpha), torch.ones_like(own.alpha)),
            "score": (torch.zeros_like(own.alpha), -torch.ones_like(own.alpha)),
        }[self.prediction]
        p, q = (here.d_alpha, here.d_sigma) if self.output == "velocity" else (torch.ones_like(a), torch.zeros_like(a))
        d = own.alpha * b - own.sigma * a
        at = self.path.values(t)
        c_in = torch.sqrt((own.alpha**2 + own.sigma**2) / (at.alpha**2 + at.sigma**2))
        return ScalingValues(c_in * (p * b - q * a) / d, (own.alpha * q - own.sigma * p) / d, c_in)

    def on(self, path: Path, denoises: bool) -> Scaling:
        return replace(self, path=path, output="denoiser" if denoises else "velocity")

    def c_noise(self, t: Tensor) -> Tensor:
        """The network's own time."""
        return self.time_factor * self._place(t).own

    def time_scale(self, t: Tensor) -> Tensor:
        """A hundred units of the network's time: embeddings of time turn by up to a radian in one.

        One unit of log sigma where that time is sigma itself, whose logarithm networks embed.
        """
        time, own_time = self._place(t)
        log_noise = self.own.noise_clock
        span = self.own.time_scale(own_time) if log_noise else 100.0 / self.time_factor * torch.ones_like(time)
        return span if self.own == self.path else span * _rate(self.own, own_time) / _rate(self.path, time)


def _rate(path: Path, t: Tensor) -> Tensor:
    """d log tau / dt, at least 1e-6."""
    p = path.values(t)
    return ((p.d_sigma * p.alpha - p.sigma * p.d_alpha) / (p.alpha * p.sigma).clamp(min=1e-12)).clamp(min=1e-6)
