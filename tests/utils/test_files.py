"""Locks on folders: one holder, no leak, no stale one. Stored records: one kind of error."""

import errno
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fewstep.utils.errors import CheckpointError, DataError, FewstepWarning
from fewstep.utils.files import Lock, read_lines, read_record, read_rows, updating

fcntl = pytest.importorskip("fcntl")


def test_one_holds_a_folder_until_it_is_released(tmp_path: Path) -> None:
    first = Lock(tmp_path / "new", "held")
    with pytest.raises(CheckpointError, match=r"^held$"):
        Lock(tmp_path / "new", "held")
    Lock(tmp_path / "another", "held").release()
    first.release()
    first.release()
    Lock(tmp_path / "new", "held").release()


def test_a_killed_holder_leaves_no_stale_lock(tmp_path: Path) -> None:
    take = f"from fewstep.utils.files import *; lock = Lock(Path({str(tmp_path)!r}), 'held')"
    words = [sys.executable, "-c", f"{take}; print(1, flush=True); input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(CheckpointError, match=r"^held$"):
            Lock(tmp_path, "held")
        holder.kill()
        holder.wait()
    Lock(tmp_path, "held").release()


@pytest.mark.parametrize(
    ("number", "refused"), [(errno.EACCES, r"^held$"), (errno.EIO, r"cannot write .*\.lock: Input/output error")]
)
def test_what_a_file_system_may_answer(
    number: int, refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    with pytest.raises(CheckpointError, match=refused):
        Lock(tmp_path, "held")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_said_and_holds_up_nobody(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    for _ in range(2):
        with pytest.warns(FewstepWarning, match="has no locks") as said:
            lock = Lock(tmp_path, "held")
        assert len(said) == 1
    lock.discard()


def refusing(number: int) -> Callable[[int, int], None]:
    """A flock that always fails with this errno."""

    def flock(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    return flock


def test_a_discarded_lock_leaves_no_trace(tmp_path: Path) -> None:
    Lock(tmp_path / "new", "held").discard()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "letter.txt").write_text("dear")
    lock = Lock(tmp_path / "kept", "held")
    lock.discard()
    lock.discard()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["letter.txt"]


def test_a_discarded_lock_leaves_the_folders_that_were_there(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    Lock(tmp_path / "mine", "held").discard()
    Lock(tmp_path / "mine" / "a" / "b", "held").discard()
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_refused_lock_leaves_no_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*File name too long"):
        Lock(tmp_path / "made" / "deep" / ("x" * 300), "held")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*File name too long"):
        Lock(tmp_path / "mine" / "deep" / ("x" * 300), "held")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\x80\xff", b"[" * 100_000, b"[1" + b"0" * 400 + b"]", b"[1" + b"0" * 5000 + b"]", b"[1]", b"null"],
)
def test_what_is_no_record_is_refused_in_one_kind(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"record\.json is damaged \(.+\): mend it"):
        read_record(file, "mend it")
    with pytest.raises(DataError, match=r"record\.json is damaged \(.+\): mend it"):
        read_record(file, "mend it", DataError)
    with pytest.raises(CheckpointError, match=r"record\.json is damaged \(.+\): mend it"):
        read_rows(file, {}, "mend it")


def test_several_update_a_file_one_after_the_other(tmp_path: Path) -> None:
    """Each reads what the one before has written."""

    def add(_: int) -> None:
        with updating(tmp_path):
            file = tmp_path / "count"
            count = int(file.read_text()) if file.exists() else 0
            file.write_text(str(count + 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    assert (tmp_path / "count").read_text() == "40"
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"), updating(tmp_path / "file"):
        pytest.fail("held")


def test_records_are_read_with_what_json_says(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert (read_rows(file, {"a": int}, ""), read_lines(file)) == ([], [])
    with pytest.raises(CheckpointError, match="No such file"):
        read_record(file, "mend it")
    file.write_text('[{"a": 1}, {"b": 2, "a": "\u00fc"}]', encoding="utf-8")
    assert read_rows(file, {"a": int | str}, "") == [{"a": 1}, {"b": 2, "a": "\u00fc"}]
    with pytest.raises(CheckpointError, match=r"file is damaged \(it lacks 'b'\): mend it"):
        read_rows(file, {"b": int}, "mend it")
    with pytest.raises(CheckpointError, match=r"file is damaged \(a is 'ü'\): mend it"):
        read_rows(file, {"a": int}, "mend it")
    for number in ("1e31", "-1e308", "NaN", "Infinity"):
        file.write_text('[{"a": 1, "b": {"c": [' + number + "]}}]")
        with pytest.raises(CheckpointError, match=r"file is damaged \(.* is no measured number\): mend it"):
            read_rows(file, {"a": int}, "mend it")
    file.write_text('{"a": Infinity}\n{"a": 2}\n{"a": 3}')
    assert read_lines(file) == [{"a": math.inf}, {"a": 2}]
    file.write_text('{"a": 1}\n\n{"a": 3}\n')
    with pytest.raises(CheckpointError, match=r"file, line 2 is damaged .*: delete that line"):
        read_lines(file)


def test_a_folder_that_another_removes_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Path.mkdir
    removed = []

    def mkdir(self: Path, *words: bool, **more: bool) -> None:
        made(self, *words, **more)
        if not removed:
            removed.append(self)
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    lock = Lock(tmp_path / "run", "held")
    with pytest.raises(CheckpointError, match=r"^held$"):
        Lock(tmp_path / "run", "held")
    lock.release()


def test_a_lock_on_a_discarded_file_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another opens the file, its holder discards it, a third takes the new one: the other must not hold as well."""
    first = Lock(tmp_path / "run", "held")
    flock, held = fcntl.flock, []

    def late(handle: int, operation: int) -> None:
        if not held:
            held.append(first)
            first.discard()
            held.append(Lock(tmp_path / "run", "held"))
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(CheckpointError, match=r"^held$"):
        Lock(tmp_path / "run", "held")
