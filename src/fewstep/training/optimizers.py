"""Optimisers with a state that goes to safetensors, and the learning-rate schedule as a function of images seen."""

import math
import re

import torch
from torch import Tensor, nn

from fewstep.recipes.config import OptimizerConfig
from fewstep.utils.errors import CheckpointError, ConfigError

State = dict[str, Tensor]

_NAME = re.compile(r"(?P<optimizer>[0-9]{1,9})\.(?P<parameter>[0-9]{1,9})\.(?P<key>\w+)")
_ADAMW, _MUON = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}
_ADVICE = "delete its checkpoint to go on from the one before"


class Optimizers:
    """AdamW on everything, or Muon on matrices of the trunk and AdamW on the rest, stepped as one."""

    def __init__(self, module: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        matrices, rest = split_parameters(module) if config.name == "muon" else ([], trainable(module))
        betas, decay = (config.beta1, config.beta2), config.weight_decay
        adamw = torch.optim.AdamW(rest, config.lr, betas=betas, weight_decay=decay, fused=True)
        self.optimizers: list[torch.optim.Optimizer] = [adamw]
        self.base_lrs = [config.lr]
        if matrices:
            self.optimizers.append(_muon(matrices, config))
            self.base_lrs.append(config.matrix_lr)

    def step(self, images: int, progress: float) -> float:
        """One update with the learning rate due after `images`, a share `progress` of the run; returns its factor."""
        factor = schedule(self.config, images, progress)
        for optimizer, lr in zip(self.optimizers, self.base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
        return factor

    def zero_grad(self) -> None:
        """Forget gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state as flat tensors 'optimizer.parameter.name'."""
        return {
            f"{i}.{index}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
            for i, optimizer in enumerate(self.optimizers)
            for index, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Take over what `tensors` gave; raises CheckpointError, naming `source`, when it is of other parameters."""
        states: list[dict[int, State]] = [{} for _ in self.optimizers]
        for name, value in tensors.items():
            match = _NAME.fullmatch(name)
            if match is None:
                raise CheckpointError(f"{source} is no optimizer's state: it holds {name!r}; {_ADVICE}")
            i, index = int(match["optimizer"]), int(match["parameter"])
            if i >= len(states):
                raise CheckpointError(f"{source}: the state {name} belongs to another optimizer setting; {_ADVICE}")
            states[i].setdefault(index, {})[match["key"]] = value
        for optimizer, state in zip(self.optimizers, states, strict=True):
            load_state(optimizer, state, source)


def load_state(optimizer: torch.optim.Optimizer, state: dict[int, State], source: str) -> None:
    """Take over a state by number of the parameter.

    Raises CheckpointError, naming `source`, unless there is a whole one of its shape for every parameter.
    """
    shapes = [list(p.shape) for group in optimizer.param_groups for p in group["params"]]
    if sorted(state) != list(range(len(shapes))):
        raise CheckpointError(
            f"{source}: optimizer state for {len(state)} parameters does not fit a model with {len(shapes)}; {_ADVICE}"
        )
    keys = _ADAMW if isinstance(optimizer, torch.optim.AdamW) else _MUON
    for index, values in state.items():
        if values.keys() != keys:
            raise CheckpointError(
                f"{source}: the state of parameter {index} has {', '.join(sorted(values))}, not "
                f"{', '.join(sorted(keys))}: it is of another optimizer, or damaged; {_ADVICE}"
            )
        for key, value in values.items():
            wanted: list[int] = [] if key == "step" else shapes[index]
            if list(value.shape) != wanted:
                raise CheckpointError(
                    f"{source}: optimizer state {key} of parameter {index} has shape {list(value.shape)}, not "
                    f"{wanted}: it is of another architecture; {_ADVICE}"
                )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


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


def schedule(config: OptimizerConfig, images: int, progress: float) -> float:
    """Factor on the learning rate for the batch that ends at `images`, a share `progress` in [0, 1] of the run."""
    factor = min(1.0, images / config.warmup_images) if config.warmup_images else 1.0
    if config.decay == "cosine":
        return factor * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if config.decay == "rsqrt":
        return factor / math.sqrt(max(1.0, images / config.decay_images))
    return factor
