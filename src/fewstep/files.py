"""Writing files aside and renaming them, so that a reader never meets half a file; one clear error when it fails."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fewstep.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]


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


class Lock:
    """An existing file held by one holder at a time, until `release`, or until the process ends in whatever way.

    Raises CheckpointError with `message` when another holds it. Does nothing where the system knows no such locks.
    """

    def __init__(self, file: Path, message: str) -> None:
        self._handle: BinaryIO | None = None
        if fcntl is None:
            return
        with guarded(file):
            handle = file.open("rb")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.close()
            raise CheckpointError(message) from error
        except OSError:  # a file system without locks
            handle.close()
        else:
            self._handle = handle

    def release(self) -> None:
        """Let others have it; again does nothing."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None
