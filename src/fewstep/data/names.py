"""Many strings as two tensors: a million take what their letters do, and processes share them."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import overload

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Names:
    """Strings as the file system has them. letters: uint8, of all; ends: (N,) int64, where each ends."""

    letters: Tensor
    ends: Tensor

    @staticmethod
    def of(names: Iterable[str]) -> "Names":
        """These, in their order."""
        parts = [os.fsencode(name) for name in names]
        letters = torch.frombuffer(bytearray(b"".join(parts) or b"\0"), dtype=torch.uint8)
        return Names(letters, torch.tensor(list(accumulate(map(len, parts))), dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> str:
        if not 0 <= number < len(self):
            raise IndexError(number)
        start = int(self.ends[number - 1]) if number else 0
        return os.fsdecode(self.letters[start : int(self.ends[number])].numpy().tobytes())

    def all(self) -> list[str]:
        """Each as a string of its own."""
        letters, ends = self.letters.numpy().tobytes(), self.ends.tolist()
        return [os.fsdecode(letters[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


class Files(Sequence[Path]):
    """Files below a folder; a path is made when it is asked for."""

    def __init__(self, root: Path, names: Names) -> None:
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    def paths(self) -> list[str]:
        """All of them, as strings."""
        return [os.path.join(self.root, name) for name in self.names.all()]

    @overload
    def __getitem__(self, number: int) -> Path: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[Path, ...]: ...
    def __getitem__(self, number: int | slice) -> Path | tuple[Path, ...]:
        if isinstance(number, slice):
            return tuple(self[each] for each in range(*number.indices(len(self))))
        return self.root / self.names[number]
