"""Classifier-free guidance: in training targets (math.md §5.3) and when sampling a model trained without it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.ode import Denoiser
from fewstep.flow.paths import Path
from fewstep.networks.condition import Condition, Prompts
from fewstep.utils.errors import ConfigError, ShapeError
from fewstep.utils.random import Draws
from fewstep.utils.serialization import later
from fewstep.utils.tensors import expand, on_host, rows_where

_MOST = torch.finfo(torch.float32).max  # what is more is infinite to samples
_STREAM_OMEGA, _STREAM_LOW, _STREAM_HIGH, _STREAM_DROP = 40, 41, 42, 43


class TrainingGuidance(ABC):
    """How strongly the training target is guided. Subclasses are final frozen dataclasses.

    conditions_network: whether the strength and interval are inputs of the network.
    """

    conditions_network: ClassVar[bool] = False

    turned_off_by: ClassVar[str] = ""
    """The option that turns it off; empty where there is none."""
    null_rows: bool = False
    """Whether samples whose label was dropped are guided too."""

    @property
    def active(self) -> bool:
        """Whether any target differs from the unguided one (else no null evaluation is needed)."""
        return True

    @abstractmethod
    def draw(self, draws: Draws) -> Tensor:
        """(B, 3): log omega and the interval's ends as fractions of the path's unit clock."""

    def strength(self, path: Path, draws: Draws, t: Tensor, kept: Tensor) -> Tensor:
        """omega (B,) of targets at times t: 1 outside the interval and where no condition is `kept` (B,) bool."""
        return omega_at(path, self.draw(draws), t, torch.ones_like(kept) if self.null_rows else kept)

    def share(self, label_dropout: float) -> float:
        """Share of samples whose targets are guided, at most: those that keep their label, or all with `null_rows`."""
        return (1.0 if self.null_rows else 1 - label_dropout) if self.active else 0.0

    def fed(self, path: Path, draws: Draws, t: Tensor) -> Tensor:
        """What a network that takes guidance is given at times t: (B, 3), as `draw`."""
        return self.draw(draws)


@final
@dataclass(frozen=True)
class NoGuidance(TrainingGuidance):
    """omega = 1 everywhere: the target is the conditional velocity."""

    @property
    def active(self) -> bool:
        return False

    def draw(self, draws: Draws) -> Tensor:
        row = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
        return row.to(draws.indices.device, non_blocking=True).expand(len(draws.indices), 3)


@dataclass(frozen=True, kw_only=True)
class ActiveGuidance(TrainingGuidance):
    """Guidance that moves targets."""

    null_rows: bool = later(bool)
    """Guide samples whose label was dropped too, as the published code of iSD-T does."""


@final
@dataclass(frozen=True)
class FixedGuidance(ActiveGuidance):
    """One omega for the whole training, applied where low <= unit time <= high (2404.07724)."""

    turned_off_by: ClassVar[str] = "--objective.guidance.omega 1"
    omega: float = 1.5
    """Strength, above 0: 1 is no guidance, above it targets are pushed towards their class."""
    low: float = 0.0
    """Where guidance begins, as a fraction of the path's clock; 0 is the data end."""
    high: float = 1.0
    """Where it ends, from low to 1; 1 is the noise end."""

    def __post_init__(self) -> None:
        if not (0 < self.omega < math.inf and 0 <= self.low <= self.high <= 1):
            raise ConfigError(f"guidance needs a finite omega > 0 and 0 <= low <= high <= 1, got {self}")

    @property
    def active(self) -> bool:
        return self.omega != 1.0

    def draw(self, draws: Draws) -> Tensor:
        row = torch.tensor([math.log(self.omega), self.low, self.high], dtype=torch.float64)
        return row.to(draws.indices.device, non_blocking=True).expand(len(draws.indices), 3)


@final
@dataclass(frozen=True)
class DrawnGuidance(ActiveGuidance):
    """log omega uniform on [0, log omega_max]; the interval's ends uniform on [0, 1/2] and [1/2, 1] of the unit clock.

    All three numbers are inputs of the network, so the user chooses them when sampling.
    """

    conditions_network: ClassVar[bool] = True
    omega_max: float = 8.0
    """Largest strength drawn, above 1; 8 in iSD-T."""
    full: float = 0.5
    """Share in [0, 1] of samples whose interval is the whole range; 0 in the published code of iSD-T."""
    fed_inside: bool = later(bool)
    """Give the network its strength inside the interval alone and 1 outside, as the published code of iSD-T does."""

    def __post_init__(self) -> None:
        if not (1 < self.omega_max < math.inf and 0 <= self.full <= 1):
            raise ConfigError(f"drawn guidance needs a finite omega_max > 1 and full in [0, 1], got {self}")

    def draw(self, draws: Draws) -> Tensor:
        log_omega = draws.uniform(_STREAM_OMEGA) * math.log(self.omega_max)
        u, w = draws.uniform(_STREAM_LOW), draws.uniform(_STREAM_HIGH)
        partial = u >= self.full
        inner = (u - self.full) / max(1 - self.full, 1e-12)
        low = torch.where(partial, inner / 2, 0.0)
        high = torch.where(partial, (1 + w) / 2, 1.0)
        return torch.stack([log_omega, low, high], dim=1)

    def fed(self, path: Path, draws: Draws, t: Tensor) -> Tensor:
        drawn = self.draw(draws)
        if not self.fed_inside:
            return drawn
        omega = omega_at(path, drawn, t, torch.ones_like(t, dtype=torch.bool))
        return torch.cat([omega.log()[:, None], drawn[:, 1:]], dim=1)


def omega_at(path: Path, guidance: Tensor, t: Tensor, kept: Tensor) -> Tensor:
    """Strength at time t: omega inside the interval, 1 outside it and for samples without a condition; (B,) float64.

    kept: (B,) bool, which samples have a label or a prompt (Condition.kept).
    """
    t, low, high = path.clock(t), path.time_from_unit(guidance[:, 1]), path.time_from_unit(guidance[:, 2])
    inside = (t >= low) & (t <= high) & kept
    return torch.where(inside, guidance[:, 0].exp(), 1.0)


def dropped(probability: float, draws: Draws) -> Tensor:
    """Which samples lose their label and prompt, each with the given probability: (B,) bool."""
    return draws.uniform(_STREAM_DROP) < probability


def guide(null: Tensor, conditional: Tensor, omega: Tensor) -> Tensor:
    """v_null + omega (v_cond - v_null); omega (B,)."""
    return null + expand(omega, null).to(null.dtype) * (conditional - null)


def guided_denoiser(path: Path, denoise: Denoiser, waiting: bool = True) -> Denoiser:
    """D_null + omega (D - D_null), by the strength and interval of cond.guidance; D itself where there is none.

    denoise: D, which takes no guidance. Where a label or prompt is kept and t lies in the interval; D elsewhere. The
    others are not evaluated without their condition; on another device than the host only if it may be waited for.
    """

    def guided(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        own = replace(cond, guidance=None)
        denoised = denoise(x, t, own)
        if cond.guidance is None or cond.kept is None:
            return denoised
        omega = omega_at(path, cond.guidance, t, cond.kept)
        if not (waiting or on_host(omega)):
            guided = guide(denoise(x, t, own.unconditional()), denoised, omega)
            return torch.where(expand(omega != 1, denoised), guided, denoised)
        rows = rows_where((omega != 1).cpu(), omega.device)
        if len(rows) == 0:
            return denoised
        null = denoise(x[rows], t[rows], own[rows].unconditional())
        return denoised.index_copy(0, rows, guide(null, denoised[rows], omega[rows]))

    return guided


def sampling_condition(
    labels: Tensor | None,
    guided: bool,
    omega: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    prompts: Prompts | None = None,
) -> Condition:
    """The condition for sampling; omega and interval become inputs of a network trained with drawn guidance.

    Raises ShapeError unless omega > 0 is finite as float32 and 0 <= low <= high <= 1.
    """
    _check_strength(omega, interval)
    cond = Condition(labels, prompts=prompts)
    if not guided or cond.kept is None:
        return cond
    row = torch.tensor([math.log(omega), *interval], dtype=torch.float64, device=cond.kept.device)
    return replace(cond, guidance=row.expand(len(cond.kept), 3))


class ClassifierFreeGuidance:
    """A flow map's jumps and velocities pushed from those of no label and the empty prompt: (2207.12598)

    null + omega (conditional - null).

    For maps trained without training guidance; every call costs two network evaluations per sample. Applied where
    low <= unit time <= high (2404.07724), the plain conditional value elsewhere.
    """

    def __init__(self, flow_map: FlowMap, omega: float, interval: tuple[float, float] = (0.0, 1.0)) -> None:
        if not flow_map.conditional:
            raise ConfigError("guidance needs a model with class labels or prompts: leave guidance at 1 for this one")
        _check_strength(omega, interval)
        self.flow_map, self.path = flow_map, flow_map.path
        self.row = torch.tensor([[math.log(omega), *interval]], dtype=torch.float64)

    def jump(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """Guided X(x, t, s)."""
        return self._guided(self.flow_map.jump, cond, x, t, s)

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Guided v(x, t)."""
        return self._guided(self.flow_map.velocity, cond, x, t)

    def _guided(self, value: Callable[..., Tensor], cond: Condition, x: Tensor, t: Tensor, *end: Tensor) -> Tensor:
        """A value under its condition and without, evaluated as one batch of twice the size."""
        kept = torch.zeros_like(t, dtype=torch.bool) if cond.kept is None else cond.kept
        rows = torch.arange(len(t), device=t.device).repeat(2)
        without = torch.arange(2 * len(t), device=t.device) >= len(t)
        conditional, null = value(*(each[rows] for each in (x, t, *end)), cond[rows].drop(without)).chunk(2)
        return guide(null, conditional, omega_at(self.path, self.row.to(t.device).expand(len(t), 3), t, kept))


def _check_strength(omega: float, interval: tuple[float, float]) -> None:
    if not (0 < omega <= _MOST and 0 <= interval[0] <= interval[1] <= 1):
        raise ShapeError(f"guidance {omega} on {interval}: needs a finite omega > 0 and an interval in [0, 1]")
