"""Sums over a teacher's trajectories, fed in any portions, and the regression that they give (math.md §3.8).

Of states y_a at levels a = -log tau on the EDM path, about the mean, and the denoiser there, along the directions i of
a group, with G_i and d_i the Gaussian's factors:
  R/G = sum G_i y_ai y_bi / sum G_i^2 y_ai^2             least squares of y_b on G y_a, one number for the group
  q(a, a) = sum (D_i - d_i y_i) y_i / sum y_i^2          least squares of D on d y, one number added to all d
  g = <y_b, r>/|r|^2,  r = D - d y                       least squares of y_b on y_a and D_a, the part of D_a
"""

from typing import get_args

import torch
from torch import Tensor

from fewstep.flow.preconditioning.covariance import Covariance
from fewstep.flow.preconditioning.regression import Family, Regression, RegressionSettings
from fewstep.utils.errors import ConfigError
from fewstep.utils.tensors import check_choice

GROUPS = 24


def pooled(lam: Tensor, most: int = GROUPS) -> Tensor:
    """Groups (n,) int64 of directions of variances lam (n,): the largest alone, then ever more of falling variance."""
    edges = torch.logspace(0, 1, most + 1, base=max(len(lam), 1), dtype=torch.float64).round().long().unique()
    order = torch.argsort(lam, descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(lam))
    return torch.bucketize(ranks, edges, right=True)


class TrajectoryMoments:
    """sums: by name, (groups, K, K) for pairs of levels and (groups, K) for single ones; they may be added up.

    lam (K,): the levels -log tau. covariance: whose directions are regressed along, of classes' own where it has them.
    """

    def __init__(self, lam: Tensor, covariance: Covariance) -> None:
        self.lam, self.covariance = lam, covariance
        self.groups = pooled(covariance.lam)
        self.count = int(self.groups.max()) + 1
        pairs, single = (self.count, len(lam), len(lam)), (self.count, len(lam))
        names = {"num": pairs, "den": pairs, "xx": pairs, "xe": pairs, "square": single, "ex": single, "ee": single}
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in names.items()}

    def update(self, states: Tensor, denoised: Tensor, labels: Tensor | None = None) -> None:
        """Feed trajectories: states and the denoiser at them, (K, B, ...), on the EDM path at the levels."""
        covariance = self.covariance.of(None if labels is None else labels.cpu())
        directions = covariance.directions
        own = self.groups[directions]
        y, d = (torch.stack([covariance.coordinates(x.double().cpu() - covariance.mean) for x in part])
                for part in (states, denoised))  # fmt: skip
        if len(covariance.lam) == 1 == covariance.lam.ndim:  # numbers of one variance are so many samples of one number
            directions, own, y, d = directions[:1], own[:1], y.reshape(len(y), -1, 1), d.reshape(len(d), -1, 1)
        lam, tau2 = covariance.lam[..., directions], torch.exp(-2 * self.lam)
        rows = lam[None] if lam.ndim == 1 else lam
        xx = torch.einsum("abc,kbc->akc", y, y)
        for a in range(len(self.lam)):
            spread = rows + tau2[a]
            rest = d[a] - rows / spread * y[a]
            gain = torch.sqrt((rows + tau2[:, None, None]) / spread)  # (K, 1 or B, c)
            found = {
                "num": gain[:, 0] * xx[a] if lam.ndim == 1 else (gain * y[a] * y).sum(1),
                "den": gain[:, 0].square() * xx[a, a] if lam.ndim == 1 else (gain * y[a]).square().sum(1),
                "xx": xx[a],
                "xe": torch.einsum("bc,kbc->kc", rest, y),
            }
            for name, value in found.items():
                self.sums[name][:, a].index_add_(0, own, value.T)
            for name, one in {"square": y[a].square(), "ex": rest * y[a], "ee": rest.square()}.items():
                self.sums[name][:, a].index_add_(0, own, one.sum(0))

    def regression(self, settings: RegressionSettings, seconds: float = 0.0) -> Regression:
        """What the sums give.

        regressed-length multiplies all R by one number of (t, s) that makes sum R_i^2 y_ai^2 what the Gaussian's is.
        Raises ConfigError where the denoiser is not finite.
        """
        check_choice("family", settings.family, get_args(Family)[1:])
        sums, steps = self.sums, self.lam[None, :] - self.lam[:, None]
        if not all(bool(value.isfinite().all()) for value in sums.values()):
            raise ConfigError("the teacher's trajectories or its denoiser are not finite: no skip is regressed on them")
        there = sums["square"] > 0  # no coordinate may belong to a group
        shift = sums["ex"] / torch.where(there, sums["square"], 1.0)
        ratio = torch.where(there[:, :, None], sums["num"] / torch.where(sums["den"] > 0, sums["den"], 1.0), 1.0)
        if settings.family == "regressed-length":
            ratio = ratio * torch.sqrt(sums["den"].sum(0) / (ratio.square() * sums["den"]).sum(0))
        table = torch.where(steps == 0, shift[:, :, None], (ratio - 1) / torch.where(steps == 0, 1.0, steps))
        weights = self._weight(shift, steps) if settings.regress_g else torch.zeros(0, 0, dtype=torch.float64)
        return Regression(self.lam, table, self.groups.double(), weights, settings.trajectories, settings.seed, seconds)

    def _weight(self, shift: Tensor, steps: Tensor) -> Tensor:
        """(g/g_E - 1)/(b - a), (K, K); on the diagonal, where it has no value, the mean of its neighbours'."""
        rest = (self.sums["xe"] - shift[:, :, None] * self.sums["xx"]).sum(0)
        size = (self.sums["ee"] - shift * self.sums["ex"]).sum(0)[:, None]
        same = steps == 0
        g = rest / torch.where(size > 0, size, torch.inf)
        found = torch.where(same, 0.0, (g / torch.where(same, 1.0, -torch.expm1(-steps)) - 1) / steps.where(~same, 1.0))
        near = torch.diagonal(found, 1)
        ends = torch.cat([near[:1], (near[1:] + near[:-1]) / 2, near[-1:]])
        return torch.where(same, ends[:, None], found)
