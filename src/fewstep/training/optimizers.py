"""Optimisers with a state that goes to safetensors, and the learning-rate schedule as a function of images seen."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.recipes.config import OptimizerConfig
from fewstep.utils.errors import ConfigError, MissingExtraError
from fewstep.utils.extras import installing
from fewstep.utils.weights import check_finite, check_shapes, shapes

_ADAMW, _MUON = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)


@dataclass(frozen=True)
class FlatOptimizer:
    """An optimizer whose state is flat tensors, 'PARAMETER.KEY' for each parameter's number and each of the keys."""

    optimizer: torch.optim.Optimizer
    lr: float
    keys: tuple[str, ...] = _ADAMW

    def tensors(self) -> dict[str, Tensor]:
        """The state; empty before the first step, and zeros of a parameter that no gradient has reached."""
        state = self.optimizer.state_dict()["state"]
        found = {f"{i}.{key}": torch.as_tensor(value) for i, each in state.items() for key, value in each.items()}
        if not found:
            return {}
        for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            if i not in state:
                found |= {f"{i}.{k}": torch.zeros(()) if k == "step" else torch.zeros_like(p) for k in self.keys}
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the state's tensors, after the first step."""
        parameters = enumerate(p for group in self.optimizer.param_groups for p in group["params"])
        return {f"{i}.{key}": () if key == "step" else p.shape for i, p in parameters for key in self.keys}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state with the names and shapes of `shapes`."""
        state: dict[int, dict[str, Tensor]] = {}
        for name in self.shapes():
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensors[name]
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


class EightBitOptimizer(FlatOptimizer):
    """One of bitsandbytes, whose state is there before the first step; of small parameters it has 32 bits."""

    def _state(self) -> list[dict[str, Any]]:
        """Of each parameter, without the tables of what 8 bits stand for."""
        states = (self.optimizer.state[p] for group in self.optimizer.param_groups for p in group["params"])
        return [{key: value for key, value in state.items() if not key.startswith("qmap")} for state in states]

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{k}": torch.as_tensor(value) for i, own in enumerate(self._state()) for k, value in own.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(value.shape) for key, value in self.tensors().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, (parameter, own) in enumerate(zip(parameters, self._state(), strict=True)):
            for key, value in own.items():
                found = tensors[f"{i}.{key}"]
                self.optimizer.state[parameter][key] = found.to(value) if isinstance(value, Tensor) else int(found)


def eight_bit_adamw(parameters: list[nn.Parameter], config: OptimizerConfig) -> EightBitOptimizer:
    """AdamW with its moments in 8 bits, by blocks (2110.02861); raises MissingExtraError without bitsandbytes."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise MissingExtraError(
            f"--optimizer.name adamw8bit needs bitsandbytes: {installing('bnb')} ({error})"
        ) from error
    betas = (config.beta1, config.beta2)
    optimizer: Any = AdamW8bit(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, 0, place)
    return EightBitOptimizer(optimizer, config.lr, ())


class Optimizers:
    """AdamW on everything, or Muon on matrices of the trunk and AdamW on the rest, stepped as one."""

    def __init__(self, module: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        matrices, rest = split_parameters(module) if config.name == "muon" else ([], trainable(module))
        betas, decay = (config.beta1, config.beta2), config.weight_decay
        if config.name == "adamw8bit":
            self.parts: list[FlatOptimizer] = [eight_bit_adamw(rest, config)]
        else:
            adamw = torch.optim.AdamW(rest, config.lr, betas=betas, weight_decay=decay, fused=True)
            self.parts = [FlatOptimizer(adamw, config.lr)]
        if matrices:
            self.parts.append(FlatOptimizer(_muon(matrices, config), config.matrix_lr, _MUON))

    def step(self, images: int, progress: float) -> float:
        """One update with the learning rate due after `images`, a share `progress` of the run; returns its factor."""
        factor = schedule(self.config, images, progress)
        for part in self.parts:
            for group in part.optimizer.param_groups:
                group["lr"] = part.lr * factor
            part.optimizer.step()
        return factor

    def zero_grad(self) -> None:
        """Forget gradients."""
        for part in self.parts:
            part.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state as flat tensors 'OPTIMIZER.PARAMETER.KEY'."""
        return {f"{i}.{key}": value for i, part in enumerate(self.parts) for key, value in part.tensors().items()}

    def parameters(self) -> dict[str, Tensor]:
        """What each tensor of the state belongs to, by its name."""
        named = {f"{i}.{key}": key for i, part in enumerate(self.parts) for key in part.shapes()}
        own = [[p for group in part.optimizer.param_groups for p in group["params"]] for part in self.parts]
        return {name: own[int(name.split(".")[0])][int(key.split(".")[0])] for name, key in named.items()}

    def load(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Take over what `tensors` gave.

        Raises CheckpointError, naming `source`, when it is of other parameters or not finite.
        """
        own = {f"{i}.{key}": shape for i, part in enumerate(self.parts) for key, shape in part.shapes().items()}
        check_shapes(own, shapes(tensors), source, "another architecture or optimizer")
        check_finite(tensors, source)
        for i, part in enumerate(self.parts):
            part.load({key: tensors[f"{i}.{key}"] for key in part.shapes()})


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that are not frozen."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of linear layers inside the trunk, everything else).

    Embeddings, convolutions, and the first and last layers stay with AdamW, as usual for Muon.
    """
    trunk = [
        parameter
        for name, parameter in module.named_parameters()
        if ".blocks." in f".{name}" and name.endswith(".weight") and parameter.ndim == 2 and parameter.requires_grad
    ]
    chosen = {id(weight) for weight in trunk}
    return trunk, [p for p in trainable(module) if id(p) not in chosen]


def _muon(matrices: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    try:
        from torch.optim import Muon
    except ImportError as error:
        raise ConfigError(
            f"torch {torch.__version__} has no Muon: install torch>=2.9 or take --optimizer.name adamw"
        ) from error
    return Muon(matrices, lr=config.matrix_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")


def risen(config: OptimizerConfig, images: int, progress: float) -> float:
    """Share of the warm-up that is done, in [0, 1]: by images, or by the run's progress where that limits it."""
    if not config.warmup_images:
        return 1.0
    by_share = progress / config.warmup_share if config.warmup_share else 0.0
    return min(1.0, max(images / config.warmup_images, by_share))


def never_risen(share: float, config: OptimizerConfig) -> str:
    """What to know of a run that ended when so much of its warm-up was done."""
    return (
        f"the run ended before its learning rate had risen: it had come to {share:.0%} of {config.lr:g}; train longer, "
        "or lower --optimizer.warmup-images"
    )


def schedule(config: OptimizerConfig, images: int, progress: float) -> float:
    """Factor on the learning rate for the batch that ends at `images`, a share `progress` in [0, 1] of the run."""
    factor = risen(config, images, progress)
    if config.decay == "cosine":
        return factor * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if config.decay == "rsqrt":
        return factor / math.sqrt(max(1.0, images / config.decay_images))
    return factor
