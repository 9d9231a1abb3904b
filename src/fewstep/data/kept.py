"""What is found out about data once and kept for the next start: listings, indexes, what was measured.

It lies in the user's cache (fewstep.utils.cache), never beside the data: tensors and a note in JSON, a file each. What
is damaged there is found out anew.
"""

import hashlib
import json
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fewstep.utils.cache import cache_folder
from fewstep.utils.errors import CheckpointError, FewstepWarning
from fewstep.utils.files import parse_json, write_atomically

_VERSION = 1  # raise with any change to what is kept, or to how it is found out
_HEADER = "fewstep_kept"
_SETTLED_SECONDS = 2.0  # what changed later than this may change again without a later time


@dataclass(frozen=True)
class Kept:
    """Tensors, and what JSON takes."""

    tensors: dict[str, Tensor]
    note: dict[str, Any]


def place(kind: str, *key: object) -> Path:
    """CACHE/data/KIND-DIGEST.safetensors; key: all that decides what is kept there."""
    digest = hashlib.blake2b(repr((_VERSION, kind, *key)).encode(errors="surrogateescape"), digest_size=8)
    return cache_folder() / "data" / f"{kind}-{digest.hexdigest()}.safetensors"


def read_kept(file: Path) -> Kept | None:
    """What is kept in a file; None where nothing is that can be read."""
    try:
        with safe_open(file, framework="pt") as stored:
            note = parse_json(stored.metadata()[_HEADER])
            return Kept({key: stored.get_tensor(key) for key in stored.keys()}, note)  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, LookupError, TypeError):
        return None


def keep(file: Path, kept: Kept) -> None:
    """Write it; one FewstepWarning where the cache cannot be written."""
    try:
        write_atomically(file, save(kept.tensors, {_HEADER: json.dumps(kept.note)}))
    except CheckpointError as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        _say(
            f"the cache '{cache_folder()}' cannot be written ({reason}): data are listed and measured anew at every "
            "start; name another place by the environment's FEWSTEP_CACHE"
        )


@cache
def _say(text: str) -> None:
    warnings.warn(text, FewstepWarning, stacklevel=4)


def times_of(paths: Sequence[Path]) -> Tensor:
    """When each was changed last, (N,) int64 in ns; -1 for what is not there."""
    return torch.tensor([_time(path) for path in paths], dtype=torch.int64)


def settled(times: Tensor, start: float) -> bool:
    """Whether nothing of these times was changed so shortly before `start`, in s, that a later change may not show."""
    return not len(times) or bool(times.max() < (start - _SETTLED_SECONDS) * 1e9)


def now() -> float:
    """In the units of `settled`."""
    return time.time()


def _time(path: Path) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1
