"""Locks on folders: one holder, no leak, and no lock where the system has none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fewstep import files
from fewstep.errors import CheckpointError
from fewstep.files import Lock

fcntl = pytest.importorskip("fcntl")


def test_one_holds_a_folder_until_it_is_released(tmp_path: Path) -> None:
    first = Lock(tmp_path / "new", "held")
    with pytest.raises(CheckpointError, match=r"^held$"):
        Lock(tmp_path / "new", "held")
    Lock(tmp_path / "another", "held").release()
    first.release()
    first.release()
    Lock(tmp_path / "new", "held").release()


def test_a_copy_of_the_handle_does_not_keep_a_released_lock(tmp_path: Path) -> None:
    lock = Lock(tmp_path, "held")
    assert lock._handle is not None
    copy = os.dup(lock._handle.fileno())  # as a forked child has
    lock.release()
    Lock(tmp_path, "held").release()
    os.close(copy)


@pytest.mark.parametrize(
    ("number", "refused"),
    [(errno.ENOLCK, None), (errno.EACCES, r"^held$"), (errno.EIO, r"cannot write .*\.lock: Input/output error")],
)
def test_what_a_file_system_may_answer(
    number: int, refused: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    if refused is None:
        Lock(tmp_path, "held").release()
    else:
        with pytest.raises(CheckpointError, match=refused):
            Lock(tmp_path, "held")


def test_a_system_without_locks_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    Lock(tmp_path, "held")
    Lock(tmp_path, "held").release()
    assert list(tmp_path.iterdir()) == []
