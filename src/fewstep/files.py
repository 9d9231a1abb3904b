"""Writing files aside and renaming them, so that a reader never meets half a file; one clear error when it fails."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fewstep.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
_PATIENCE = 100  # attempts to make a file in a folder that others remove
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


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
    """A file `.lock` in a folder, held by one holder at a time until `release`, or until its process ends.

    A child that was forked meanwhile holds it on if the process is killed. Raises CheckpointError with `message` when
    another holds it, or when the folder cannot be written. Does nothing where the system or the file system knows no
    such locks.
    """

    def __init__(self, folder: Path, message: str) -> None:
        self.folder = folder
        self._handle: BinaryIO | None = None
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        while fcntl is not None and self._handle is None:
            handle = self._open()
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                handle.close()
                if error.errno in _NO_LOCKS:
                    return
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise CheckpointError(message) from error
                with guarded(folder / LOCK_FILE):
                    raise
            if self._is_current(handle):
                self._handle = handle
            else:  # its holder has discarded it meanwhile: another may hold the new one
                handle.close()

    def _open(self) -> BinaryIO:
        file = self.folder / LOCK_FILE
        with guarded(file):
            for _ in range(_PATIENCE):
                with suppress(FileNotFoundError, FileExistsError):  # another may discard its own just now
                    return self._create(file)
            return self._create(file)

    def _create(self, file: Path) -> BinaryIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        return file.open("ab")  # for writing: NFS locks nothing that is open for reading alone

    def _is_current(self, handle: BinaryIO) -> bool:
        try:
            return os.path.samestat(os.fstat(handle.fileno()), (self.folder / LOCK_FILE).stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let others have it; again does nothing. The file stays."""
        if self._handle is not None:
            fcntl.flock(self._handle, fcntl.LOCK_UN)  # a forked child's copy of the handle would keep it
            self._handle.close()
            self._handle = None

    def discard(self) -> None:
        """`release`, and leave no trace: the file goes, and the folders that were made for it, where they are empty."""
        if self._handle is not None:
            with suppress(OSError):
                (self.folder / LOCK_FILE).unlink()
                for folder in self._made:
                    folder.rmdir()
        self.release()
