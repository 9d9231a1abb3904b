"""Tensors in safetensors files, and into modules: strictly, with one line on what does not fit."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.utils.errors import CheckpointError
from fewstep.utils.serialization import differences


def save_weights(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors, from wherever they are, as one safetensors file."""
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, file)


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; raises CheckpointError when it is missing, truncated or not one."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({error})") from error


def fit_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights strictly; raises CheckpointError naming the first tensors that differ in name or shape."""
    check_shapes({key: value.shape for key, value in module.state_dict().items()}, weights, source)
    module.load_state_dict(weights)


def check_shapes(
    own: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor], source: str, of: str = "another architecture"
) -> None:
    """Raise CheckpointError naming the first tensors that differ in name or shape; of: what that means."""
    shapes = {key: list(value.shape) for key, value in given.items()}
    lines = differences({key: list(shape) for key, shape in own.items()}, shapes)  # type: ignore[arg-type]  # JSON values
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise CheckpointError(f"{source} is of {of}: {'; '.join(lines[:3])}{more} (shape in this model -> in the file)")
