"""Writing files aside and renaming them, so that a reader never meets half a file; one clear error when it fails."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.errors import CheckpointError


class guarded:
    """`with guarded(file):` turns an OSError (disk full, no permission) into a CheckpointError that names the file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise CheckpointError(
                f"cannot write {self.target}: {reason}; free some space or give another folder with --out"
            ) from error


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to, renamed to `file` at the end of the block and removed when the block fails.

    Raises CheckpointError when the disk refuses.
    """
    with guarded(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
        try:
            yield aside
            os.replace(aside, file)
        finally:
            aside.unlink(missing_ok=True)


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes aside and rename them into place; raises CheckpointError when the disk refuses."""
    with replacing(file) as aside, aside.open("wb") as file_aside:
        file_aside.write(content.encode() if isinstance(content, str) else content)
        file_aside.flush()
        os.fsync(file_aside.fileno())
