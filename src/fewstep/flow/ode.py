"""ODE solvers of a teacher and the reference solution (math.md §4), on any path, with times per sample.

With tau = sigma/alpha, y = x/alpha and lambda = -log tau the PF-ODE is dy/dtau = (y - D)/tau, and every step from t
down to s is the DDIM step with a denoiser D* of its own,

    x_s = (sigma_s/sigma_t) x + (alpha_s - alpha_t sigma_s/sigma_t) D*,

finite where tau is 0 or infinite. A denoiser is called as denoise(x (B, ...), t (B,), cond) -> (B, ...), in the path's
coordinates and clock. Times of any type are taken in float64 (Path.clock), and so are coefficients, which are applied
in the dtype of x; gradients are the caller's affair.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from fewstep.flow.paths import Path
from fewstep.flow.preconditioning.jumps import EulerPreconditioning
from fewstep.networks.condition import Condition
from fewstep.utils.errors import ShapeError
from fewstep.utils.runge_kutta import runge_kutta_step
from fewstep.utils.tensors import check_batch, check_choice, expand, holds_everywhere, rows_where

SolverName = Literal["euler", "heun", "dpm-solver++"]
Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]

PURE_NOISE = 1e6
"""The noise level tau above which a sample is noise alone: Heun's weight tau_t/tau_s loses its meaning there."""

_SMOOTH = (1e-4, 1e3)
_UNCONDITIONAL = Condition()


def ddim(path: Path, x: Tensor, denoised: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """(sigma_s/sigma_t) x + (alpha_s - alpha_t sigma_s/sigma_t) D (DDIM, 2010.02502); x, D (B, ...), t, s (B,)."""
    f, g = (expand(value, x).to(x.dtype) for value in EulerPreconditioning(path).coefficients(t, s))
    return f * x + g * denoised


def euler_step(
    denoise: Denoiser, path: Path, x: Tensor, t: Tensor, s: Tensor, cond: Condition = _UNCONDITIONAL
) -> Tensor:
    """Euler's method in lambda: D* = D(x, t). One evaluation, order 1; x (B, ...), t, s (B,)."""
    t, s = path.clock(t), path.clock(s)
    return ddim(path, x, denoise(x, t, cond), t, s)


def heun_step(
    denoise: Denoiser,
    path: Path,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Condition = _UNCONDITIONAL,
    rows: Tensor | None = None,
) -> Tensor:
    """Heun's method in tau on y = x/alpha (EDM, 2206.00364), of order 2; x (B, ...), t, s (B,).

    D* = D_t + (tau_t/tau_s) (D_s - D_t)/2, D_s the denoiser at Euler's guess: y_s is y + (tau_s - tau_t) times the mean
    of the slopes (y - D)/tau at both ends. Two evaluations; one for a sample whose step ends at tau_s = 0 or starts at
    tau_t > PURE_NOISE, which is Euler's. rows: (k,) int64 of the others, where they are known already.
    """
    t, s = path.clock(t), path.clock(s)
    at_t = denoise(x, t, cond)
    guess = ddim(path, x, at_t, t, s)
    tau_t, tau_s = path.tau(t), path.tau(s)
    if rows is None:
        rows = _corrected(path, t.cpu(), s.cpu()).to(x.device)
    if len(rows) == 0:
        return guess
    at_s = denoise(guess[rows], s[rows], cond[rows])
    weight = expand(tau_t[rows] / tau_s[rows] / 2, x).to(x.dtype)
    corrected = ddim(path, x[rows], at_t[rows] + weight * (at_s - at_t[rows]), t[rows], s[rows])
    return guess.index_copy(0, rows, corrected)


def _corrected(path: Path, t: Tensor, s: Tensor) -> Tensor:
    """Rows (k,) of the steps that are not Euler's; t, s (B,) on the host."""
    return rows_where((path.tau(s) > 0) & (path.tau(t) <= PURE_NOISE))


Memory = tuple[Tensor, Tensor]
"""(D, h) of each sample's last step, (B, ...) and (B,): h, its length in lambda, is infinite where none was taken."""


def dpm_solver_step(
    denoise: Denoiser, path: Path, x: Tensor, t: Tensor, s: Tensor, memory: Memory, cond: Condition = _UNCONDITIONAL
) -> tuple[Tensor, Memory]:
    """DPM-Solver++(2M) (2211.01095): (x_s, memory of this step); x (B, ...), t, s (B,).

    D* = D + (h / 2 h_before) (D - D_before), h = log(tau_t/tau_s). One evaluation, order 2; the first step and one that
    starts at infinite tau or ends at tau = 0 are Euler's.
    """
    t, s = path.clock(t), path.clock(s)
    denoised = denoise(x, t, cond)
    h = path.tau(t).log() - path.tau(s).log()
    before, h_before = memory
    weight = expand(torch.where(torch.isfinite(h), h, 0.0) / (2 * h_before), x).to(x.dtype)
    return ddim(path, x, denoised + weight * (denoised - before), t, s), (denoised, h)


def solve(
    denoise: Denoiser, path: Path, x: Tensor, times: Tensor, solver: SolverName, cond: Condition = _UNCONDITIONAL
) -> Tensor:
    """x at the last of `times`, from x (B, ...) at the first.

    times: (B, K + 1) per sample or (K + 1,) for all, falling weakly: where two in a row are equal the sample rests and
    is not evaluated. A sample that moves k times costs k evaluations by "euler" and "dpm-solver++", 2 k by "heun", less
    its steps that are Euler's (`heun_step`). Times on the host are read there, and x is not waited for: times on its
    device are fetched once. Raises ShapeError for times that rise or do not fit x, ConfigError for
    another solver.
    """
    check_choice("solver", solver, get_args(SolverName))
    times = _per_sample(path, x, times)
    before, lengths = x, torch.full(x.shape[:1], torch.inf, dtype=torch.float64, device=x.device)
    for t, s in zip(times.T[:-1], times.T[1:], strict=True):
        here = rows_where(s < t)
        if len(here) == 0:
            continue
        rows, times_here = here.to(x.device, non_blocking=True), (t[here], s[here])
        t, s = (time.to(x.device, non_blocking=True) for time in times_here)
        now, own = x[rows], cond[rows]
        if solver == "euler":
            moved = euler_step(denoise, path, now, t, s, own)
        elif solver == "heun":
            second = _corrected(path, *times_here).to(x.device, non_blocking=True)
            moved = heun_step(denoise, path, now, t, s, own, second)
        else:
            moved, (denoised, h) = dpm_solver_step(denoise, path, now, t, s, (before[rows], lengths[rows]), own)
            before = before.index_copy(0, rows, denoised.to(before.dtype))
            lengths = lengths.index_copy(0, rows, h)
        x = x.index_copy(0, rows, moved)
    return x


def trajectory(
    denoise: Denoiser, path: Path, x: Tensor, grid: Tensor, steps: int = 1, cond: Condition = _UNCONDITIONAL
) -> Tensor:
    """The states (K + 1, B, ...) at every time of `grid`, (K + 1,) or (B, K + 1) falling weakly, from x at the first.

    Between two times of the grid it is the `reference_solution` by `steps` steps.
    """
    times = _per_sample(path, x, grid)
    states = [x]
    for t, s in zip(times.to(x.device).T[:-1], times.to(x.device).T[1:], strict=True):
        states.append(reference_solution(denoise, path, states[-1], t, s, steps, cond))
    return torch.stack(states)


def reference_solution(
    denoise: Denoiser, path: Path, x: Tensor, t: Tensor, s: Tensor, steps: int = 32, cond: Condition = _UNCONDITIONAL
) -> Tensor:
    """The solution at s (B,) from x (B, ...) at t (B,), s <= t, by `steps` of the classical Runge-Kutta method.

    Of order 4 and evenly spaced in log tau, on z = x/sqrt(alpha^2 + sigma^2): dz/dlog tau = a (a z - D) with
    a = 1/sqrt(1 + tau^2), bounded everywhere. What lies beyond tau = 1e3 or below 1e-4 is one step of Euler's each,
    exact to about 1e-6. 4 * steps evaluations and up to two more; a sample with s = t costs none. Raises ShapeError for
    fewer than one step, or times that do not fit x.
    """
    if steps < 1:
        raise ShapeError(f"{steps} steps asked for: a solution needs at least 1")
    check_batch(x, t, s)
    t, s = path.clock(t), path.clock(s)
    low, high = (path.time_from_tau(t.new_tensor(end)) for end in _SMOOTH)
    first = torch.where(path.tau(t) > _SMOOTH[1], high, t).clamp(min=s)
    last = torch.minimum(torch.where(path.tau(s) < _SMOOTH[0], low, s), first)
    x = solve(denoise, path, x, torch.stack([t, first], 1), "euler", cond)
    rows = rows_where((last < first).cpu(), x.device)
    if len(rows):
        solved = _runge_kutta(denoise, path, x[rows], first[rows], last[rows], steps, cond[rows])
        x = x.index_copy(0, rows, solved)
    return solve(denoise, path, x, torch.stack([last, s], 1), "euler", cond)


def _runge_kutta(denoise: Denoiser, path: Path, x: Tensor, t: Tensor, s: Tensor, steps: int, cond: Condition) -> Tensor:
    def slope(log_tau: Tensor, z: Tensor) -> Tensor:
        time = path.time_from_tau(log_tau.exp()).clamp(min=s, max=t)
        p = path.values(time)
        norm = torch.hypot(p.alpha, p.sigma)
        size, a = (expand(value, z).to(z.dtype) for value in (norm, p.alpha / norm))
        return a * (a * z - denoise(size * z, time, cond))

    start, end = path.tau(t).log(), path.tau(s).log()
    h = (end - start) / steps
    ends = [torch.hypot(p.alpha, p.sigma) for p in (path.values(t), path.values(s))]
    z = x / expand(ends[0], x).to(x.dtype)
    for i in range(steps):
        z = runge_kutta_step(slope, z, start + i * h, h)
    return expand(ends[1], x).to(x.dtype) * z


def _per_sample(path: Path, x: Tensor, times: Tensor) -> Tensor:
    """Times as (B, K + 1), float64, on the host; raises ShapeError when they rise or do not fit."""
    times = path.clock(times.cpu())
    times = times.expand(len(x), -1) if times.ndim == 1 else times
    if times.ndim != 2 or times.shape[1] < 1:
        raise ShapeError(f"times of shape {tuple(times.shape)}: give (K + 1,) or one row per sample")
    check_batch(x, times[:, 0])
    if not holds_everywhere(times[:, 1:] <= times[:, :-1]):
        raise ShapeError("times rise somewhere: a solver goes from noise down to data")
    return times
