"""Exponential moving averages of weights: constant decay, and EDM2's power function (2312.02696)."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from fewstep.networks.base import stored_state
from fewstep.utils.errors import ConfigError
from fewstep.utils.weights import check_finite, check_shapes, own_part, shapes


def power_exponent(sigma_rel: float) -> float:
    """EDM2's gamma for a relative width sigma_rel: the positive root of

    (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = sigma_rel^2; sigma_rel in (0, 0.28]. Raises ConfigError outside.
    """
    if not 0 < sigma_rel <= 0.28:
        raise ConfigError(f"power EMA: relative width {sigma_rel} must lie in (0, 0.28]")
    low, high = 0.0, 1e6
    for _ in range(200):
        gamma = (low + high) / 2
        wider = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) > sigma_rel**2
        low, high = (gamma, high) if wider else (low, gamma)
    return (low + high) / 2


class EMA:
    """One average of a module's parameters and buffers that files hold, updated after every step.

    Constant: beta; with `ramp` no more than (1 + step)/(10 + step), so that short runs forget the first weights.
    Power function: beta = (1 - 1/step)^(gamma + 1), a window that grows with training. in_place: the average is kept in
    the module's own tensors.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        decay: float | None,
        gamma: float | None,
        ramp: bool = True,
        in_place: bool = False,
    ) -> None:
        self.name, self.decay, self.gamma, self.ramp = name, decay, gamma, ramp
        state, parameters = stored_state(module), dict(module.named_parameters())
        self.trained = [key for key in parameters if key in state]
        self.elsewhere = module.state_dict().keys() - state.keys()
        frozen = {key for key, value in parameters.items() if not value.requires_grad}
        shared = state.keys() if in_place else frozen  # what never moves needs no copy
        self._kept = {key: value if key in shared else value.detach().clone() for key, value in state.items()}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The average, by the names of the module's tensors."""
        return self._kept

    def before_step(self) -> None:
        """What an average has to do before weights change."""

    def beta(self, step: int) -> float:
        """Share of the old average that is kept at step 1, 2, ..."""
        if self.gamma is not None:
            return float((1 - 1 / step) ** (self.gamma + 1))
        assert self.decay is not None
        return min(self.decay, (1 + step) / (10 + step)) if self.ramp else self.decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Fold in the module's weights after `step` steps; integer buffers are copied."""
        current = stored_state(module)
        floating = [key for key, value in current.items() if value.is_floating_point()]
        averages, latest = ([own_part(state[key]) for key in floating] for state in (self.weights, current))
        torch._foreach_lerp_(averages, latest, 1 - self.beta(step))
        for key in current.keys() - set(floating):
            self.weights[key].copy_(current[key])

    def load(self, weights: dict[str, Tensor], source: str) -> None:
        """Take over stored averages; raises CheckpointError, naming `source`, unless they fit and are finite."""
        weights = {key: value for key, value in weights.items() if key not in self.elsewhere}
        check_shapes(shapes(self.weights), shapes(weights), source)
        check_finite({name: weights[name] for name in self.trained}, source)
        for key, value in self.weights.items():
            value.copy_(weights[key])


class HostEMA(EMA):
    """The same kept on the host, where a thread of its own folds in what a device has left while the device goes on."""

    def __init__(
        self, name: str, module: nn.Module, decay: float | None, gamma: float | None, ramp: bool = True
    ) -> None:
        super().__init__(name, module, decay, gamma, ramp)
        state = stored_state(module)
        moving = {key: value for key, value in state.items() if value is not self._kept[key]}
        self._kept |= {key: self._kept[key].cpu() for key in moving}
        cuda = any(value.is_cuda for value in moving.values())
        self._staged = {key: torch.empty_like(value, device="cpu", pin_memory=cuda) for key, value in moving.items()}
        self._copies = torch.cuda.Stream() if cuda else None
        self._copied: torch.cuda.Event | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fewstep-average")
        self._folding: Future[None] | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        self._settle()
        return self._kept

    def _settle(self) -> None:
        if self._folding is not None:
            folding, self._folding = self._folding, None
            folding.result()

    def before_step(self) -> None:
        """Weights change only after they were copied."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        self._settle()
        current = stored_state(module)
        latest = [current[key] for key in self._staged]
        if self._copies is None:
            torch._foreach_copy_(list(self._staged.values()), latest)
        else:
            self._copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._copies):
                torch._foreach_copy_(list(self._staged.values()), latest, non_blocking=True)
            self._copied = self._copies.record_event()
        self._folding = self._thread.submit(self._fold, 1 - self.beta(step), self._copied)

    @torch.no_grad()
    def _fold(self, share: float, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        floating = [key for key, value in self._staged.items() if value.is_floating_point()]
        averages, latest = ([state[key] for key in floating] for state in (self._kept, self._staged))
        torch._foreach_lerp_(averages, latest, share)
        for key in self._staged.keys() - set(floating):
            self._kept[key].copy_(self._staged[key])


def ema_names(powers: tuple[float, ...], decays: tuple[float, ...]) -> list[str]:
    """Names of a recipe's averages, in the order of `make_emas`: "power-0.1", "constant-0.999"."""
    return [*(f"power-{width!r}" for width in powers), *(f"constant-{decay!r}" for decay in decays)]


def make_emas(
    module: nn.Module, powers: tuple[float, ...], decays: tuple[float, ...], ramp: bool = True, on_host: bool = False
) -> list[EMA]:
    """The averages of a recipe, power functions first; raises ConfigError when there is none."""
    for decay in decays:
        if not 0 <= decay < 1:
            raise ConfigError(f"EMA decay {decay} must lie in [0, 1)")
    names = ema_names(powers, decays)
    if len(set(names)) < len(names):
        raise ConfigError(f"an EMA is asked for twice: ema_power {powers}, ema_decay {decays}")
    if not names:
        raise ConfigError("a recipe needs at least one EMA: give ema_power or ema_decay")
    kinds = [*((None, power_exponent(width)) for width in powers), *((decay, None) for decay in decays)]
    make = HostEMA if on_host else EMA
    return [make(name, module, *kind, ramp) for name, kind in zip(names, kinds, strict=True)]
