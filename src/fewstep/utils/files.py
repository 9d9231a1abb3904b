"""Files written aside and renamed, so that a reader never meets half a one; one clear error when it fails.

Reading stored JSON: whatever is wrong with a file ends in one line that names it and says what to do.
"""

import errno
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fewstep.utils.errors import CheckpointError, ConfigError, FewstepError, FewstepWarning, WriteError

LOCK_FILE, UPDATE_FILE = ".lock", ".figures.lock"
LARGEST = 1e30  # in size, of what is measured or drawn
_SECONDS = 0.1  # until a lock counts as held: its holder may be discarding it
_WAIT = 60.0  # until another process has written its rows
_PATIENCE = 100  # attempts to make a file in a folder that others remove
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
_WITHOUT_LOCKS = "the file system of {folder} has no locks: keep other processes from writing there yourself"
# What code that takes a stored file apart raises when the file is not what it should be.
_SPOILT = (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, ConfigError)


@contextmanager
def guarded(target: Path) -> Iterator[None]:
    """`with guarded(file):` turns an OSError into a CheckpointError that names the file, and what to do about it."""
    try:
        yield
    except OSError as error:
        locked = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        advice = "make its folder writable, or work on a copy of it" if locked else "free some space, or work elsewhere"
        raise WriteError(f"cannot write {target}: {error.strerror or error}; {advice}") from error


@contextmanager
def reading(file: Path | str, advice: str, kind: type[FewstepError] = CheckpointError) -> Iterator[None]:
    """`with reading(file, advice):` turns what a damaged file does to its reader into one line of the given kind.

    It names the file, the reason, and what to do about it.
    """
    try:
        yield
    except _SPOILT as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise kind(f"{file} is damaged ({reason}): {advice}") from error


def parse_json(text: bytes | str) -> Any:
    """What JSON says, with a byte order mark or without.

    Raises ValueError alone, for bytes that are not UTF-8 and numbers that are no float too.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"), parse_int=_whole_number)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _whole_number(digits: str) -> int:
    try:
        float(number := int(digits))
    except OverflowError as error:
        raise ValueError(f"the number {digits[:20]}... is too large") from error
    return number


def read_record(file: Path, advice: str, kind: type[FewstepError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in a file; raises `kind`, with the advice, when it cannot be read or is none."""
    with reading(file, advice, kind):
        return _object(parse_json(file.read_bytes()))


def read_rows(file: Path, kinds: Mapping[str, Any], advice: str) -> list[dict[str, Any]]:
    """The JSON list of objects in a file, none where there is no file. kinds: key -> its type, or a union of types.

    Raises CheckpointError, with the advice, when it cannot be read, is none, or one of the objects lacks a key, or has
    a value of another type under it or a number anywhere that is none (`check_numbers`).
    """
    with reading(file, advice):
        rows = parse_json(file.read_bytes()) if file.is_file() else []
        if not isinstance(rows, list):
            raise ValueError("it is no list")
        for row in map(_object, rows):
            for key, kind in kinds.items():
                if not isinstance(row[key], kind):
                    raise ValueError(f"{key} is {repr(row[key])[:40]}")
            check_numbers(row)
    return rows


def check_numbers(found: Any) -> None:
    """Raise ValueError for a number in a stored value that is NaN, infinite or beyond 1e30: nothing is measured so."""
    if isinstance(found, (int, float)) and not abs(found) <= LARGEST:
        raise ValueError(f"{found:.3g} is no measured number")
    for inner in found.values() if isinstance(found, dict) else found if isinstance(found, list) else ():
        check_numbers(inner)


def readable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that `read_rows` will take; a FewstepWarning names the method of one with a number that is none."""
    kept = []
    for row in rows:
        try:
            check_numbers(row)
            kept.append(row)
        except ValueError as error:
            warnings.warn(f"{row.get('method')} is not stored: {error}", FewstepWarning, stacklevel=3)
    return kept


def read_lines(file: Path, newest: int = 0) -> list[dict[str, Any]]:
    """The JSON objects in a file of one a line, none where there is no file; a line without its end is left out.

    newest: how many, from the end; 0 for all. Raises CheckpointError for a line that cannot be read.
    """
    with reading(file, "delete it"):
        lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    found = []
    for number, line in list(enumerate(lines, start=1))[-newest:]:
        with reading_line(file, number):
            found.append(_object(parse_json(line)))
    return found


def reading_line(file: Path, number: int) -> AbstractContextManager[None]:
    """`reading` for a line, counted from 1, of a file that can do without it."""
    return reading(f"{file}, line {number}", "delete that line")


def _object(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"{repr(found)[:40]} is no object")
    return found


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


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write to, renamed to it at the end of the block and removed when the block fails.

    Raises ConfigError where `folder` has something in it, CheckpointError when the disk refuses.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"{folder} has something in it: give an empty folder, or one that is not there")
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    with guarded(folder):
        aside.mkdir(parents=True)
        try:
            yield aside
            os.replace(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes aside and rename them into place; raises CheckpointError when the disk refuses."""
    with replacing(file) as aside, aside.open("wb") as file_aside:
        file_aside.write(content.encode() if isinstance(content, str) else content)
        file_aside.flush()
        os.fsync(file_aside.fileno())


@contextmanager
def updating(folder: Path) -> Iterator[None]:
    """Inside, no other process updates what is measured of a run: for reading a file of its folder and replacing it.

    Waits for the others, where the file system has locks. Raises CheckpointError when the folder cannot be written, or
    another process keeps it too long.
    """
    file = folder / UPDATE_FILE
    lock = FileLock(file, timeout=_WAIT, fallback_to_soft=False)
    with guarded(file):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise CheckpointError(f"another process holds {file}: end it, or remove the file") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(_WITHOUT_LOCKS.format(folder=folder), FewstepWarning, stacklevel=2)
    try:
        yield
    finally:
        lock.release()


def linked(root: Path, folders: Collection[str]) -> Iterator[Path]:
    """Links in a folder, and anywhere below those of its folders; none of them is followed."""
    places = [root, *(root / name for name in folders if not (root / name).is_symlink())]
    for place in places:
        for parent, within, files in os.walk(place):
            yield from (path for name in (*within, *files) if (path := Path(parent, name)).is_symlink())
            if place == root:
                break


def refuse_links(root: Path, folder: str) -> None:
    """Raise CheckpointError where a folder of `root`, or anything below it, is a link: nothing is written to those."""
    for link in linked(root, (folder,)):
        if link.is_relative_to(root / folder):
            raise CheckpointError(f"{link} is a link, to which nothing is written: put what it leads to there")


class Lock:
    """A file `.lock` in a folder, held by one holder at a time until `release`, or until its process ends.

    Raises CheckpointError with `message` when another holds it, or when the folder cannot be written. Where the file
    system has no locks, a FewstepWarning says so and nothing is held.
    """

    def __init__(self, folder: Path, message: str) -> None:
        self.file = folder / LOCK_FILE
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._lock = FileLock(
            self.file, timeout=_SECONDS, poll_interval=_SECONDS / 5, thread_local=False, fallback_to_soft=False
        )
        with guarded(self.file):
            try:
                self._acquire()
            except Timeout as error:
                raise CheckpointError(message) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    self._remove_made()
                    raise
                warnings.warn(_WITHOUT_LOCKS.format(folder=folder), FewstepWarning, stacklevel=2)

    def _acquire(self) -> None:
        for _ in range(_PATIENCE):
            with suppress(FileNotFoundError, FileExistsError):  # another may discard its own folder just now
                self._lock.acquire()
                return
        self._lock.acquire()

    def release(self) -> None:
        """Let others have it; again does nothing. The file stays."""
        self._lock.release()

    def discard(self) -> None:
        """`release`, and leave no trace: the file goes, and the folders that were made for it, where they are empty."""
        if self._lock.is_locked:
            with suppress(OSError):
                self.file.unlink()
            self._remove_made()
        self.release()

    def _remove_made(self) -> None:
        """Remove the folders that were made for it, where they are empty."""
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()
