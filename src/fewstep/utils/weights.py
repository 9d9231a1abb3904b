"""Tensors in safetensors files, and into modules: strictly, with one line on what does not fit."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.utils.errors import CheckpointError
from fewstep.utils.serialization import differences

Shapes = Mapping[str, Collection[int]]


def digest_of_settings(settings: Mapping[str, Any]) -> str:
    """Sixteen hex digits of settings that JSON takes, but for keys with an underscore first: versions and places."""
    own = {key: value for key, value in settings.items() if not key.startswith("_")}
    return hashlib.blake2b(json.dumps(own, sort_keys=True).encode(), digest_size=8).hexdigest()


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hex digits of tensors, their names and shapes."""
    digest = hashlib.blake2b(digest_size=8)
    for key, value in sorted(tensors.items()):
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def save_weights(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors, from wherever they are, as one safetensors file."""
    file.touch()
    mode = file.stat().st_mode  # as of any new file; safetensors would make it readable for its owner alone
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, file)
    file.chmod(mode)


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; raises CheckpointError when it is missing, truncated or not one."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({error})") from error


def read_shapes(file: Path) -> dict[str, list[int]]:
    """Of the tensors in a safetensors file, by its header alone; raises as `read_weights` does."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        with safe_open(file, framework="pt") as stored:
            return {key: stored.get_slice(key).get_shape() for key in stored.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({error})") from error


def fit_weights(
    module: nn.Module, weights: Mapping[str, Tensor], source: str, state: Mapping[str, Tensor] | None = None
) -> None:
    """Load weights strictly; state: the part of the module's that they are, all when not given.

    Raises CheckpointError naming the first tensors that differ in name or shape, or a parameter that is not finite.
    """
    check_shapes(shapes(module.state_dict() if state is None else state), shapes(weights), source)
    check_finite({name: weights[name] for name, _ in module.named_parameters() if name in weights}, source)
    module.load_state_dict(weights, strict=state is None)


def shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    """Of tensors, by name."""
    return {key: value.shape for key, value in tensors.items()}


def check_shapes(own: Shapes, given: Shapes, source: str, of: str = "another architecture") -> None:
    """Raise CheckpointError naming the first tensors that differ in name or shape; of: what that means."""
    here, there = ({key: list(shape) for key, shape in each.items()} for each in (own, given))
    lines = differences(here, there)  # type: ignore[arg-type]  # lists of ints are JSON values
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise CheckpointError(f"{source} is of {of}: {'; '.join(lines[:3])}{more} (shape in this model -> in the file)")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hex digits that change with any name or value."""
    found = hashlib.blake2b(digest_size=8)
    for key, value in sorted(tensors.items()):
        found.update(key.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that is shared out over processes; itself where it is not."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError naming the first tensor with a value that is not finite; of a shared one, its part here."""
    own = {name: own_part(value) for name, value in tensors.items()}
    places: dict[torch.device, list[str]] = {}
    for name, value in own.items():
        places.setdefault(value.device, []).append(name)
    for names in places.values():  # one answer a device
        finite = torch.stack([own[name].isfinite().all() for name in names]).tolist()
        bad = next((name for name, fine in zip(names, finite, strict=True) if not fine), None)
        if bad is not None:
            raise CheckpointError(f"{source} is of no use: its tensor {bad} holds values that are not finite")
