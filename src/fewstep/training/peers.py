"""The other processes of a command: where one is lost, all end within a minute, with a line that names it.

Each process holds a connection to the first, which tells the others. The connection closes with the process at its
other end, whatever killed it; where a whole machine is gone it falls silent.
"""

import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from accelerate import Accelerator

from fewstep.training.parallel import Agreement, abandon_processes
from fewstep.utils.errors import FewstepError, ProcessLostError

BEAT, SILENT = 2.0, 30.0
"""Seconds between signs of life, and after which a process without them is lost."""
PATIENCE, GRACE = 5.0, 15.0
"""Seconds in which an error is brought together with a lost process; and after which a process that waits for the lost
one, and cannot be told, is ended."""
_MEETING, _LOOK = 10.0, 0.2


class Peers:
    """What a process knows of the others, from a thread of its own; of one process alone nothing, without a thread.

    way_on: how to go on, in words. lost: the process that was lost, -1 for none. left: those that ended otherwise.
    """

    def __init__(self, way_on: Callable[[], str], index: int, count: int, agreement: Agreement) -> None:
        self.way_on, self.index, self.count = way_on, index, count
        self.lost, self.left = -1, set[int]()
        self._lines = dict[socket.socket, "_Line"]()
        self._gone, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fewstep-peers", daemon=True)
        if count > 1:
            self._selector = selectors.DefaultSelector()
            self._meet(agreement)
            self._thread.start()

    def _meet(self, agreement: Agreement) -> None:
        """Connect with the first process, or as the first with all; without a way to it this one goes unwatched."""
        with socket.create_server(("", 0)) as server:
            port, secret = agreement.first(server.getsockname()[1]), agreement.first(secrets.randbits(48))
            if self.index:
                found = _reached(os.environ["MASTER_ADDR"], int(port))
                if found is not None:
                    found.sendall(b"%d %d\n" % (secret, self.index))
                    self._add(found, 0)
                return
            until = time.monotonic() + _MEETING
            while len(self._lines) < self.count - 1 and (left := until - time.monotonic()) > 0:
                server.settimeout(left)
                try:
                    found = server.accept()[0]
                    found.settimeout(_MEETING)
                    said, index = found.makefile("rb").readline(64).split()
                except (OSError, ValueError):
                    continue
                if int(said) == int(secret):
                    self._add(found, int(index))

    def _add(self, connection: socket.socket, index: int) -> None:
        connection.settimeout(_MEETING)
        self._lines[connection] = _Line(index)
        self._selector.register(connection, selectors.EVENT_READ)

    def _watch(self) -> None:
        beat = 0.0
        while not self._closing.is_set() and self.lost < 0:
            if time.monotonic() - beat > BEAT:
                beat = time.monotonic()
                self._say(b".\n")
            for key, _ in self._selector.select(_LOOK) if self._lines else ():
                self._hear(cast(socket.socket, key.fileobj))
            for line in self._lines.values():
                if time.monotonic() - line.heard > SILENT:
                    self.lost = line.index
            if not self._lines:
                self._closing.wait(_LOOK)
        if self.lost >= 0:
            self._say(b"lost %d\n" % self.lost)
            self._gone.set()
            if not self._closing.wait(GRACE):
                os.write(2, f"fewstep: {self.message}\n".encode())
                os._exit(2)

    def _hear(self, connection: socket.socket) -> None:
        line = self._lines[connection]
        try:
            found = connection.recv(4096)
        except OSError:
            found = b""
        if not found:
            self.lost = line.index
        for words in line.take(found):
            if words.startswith(b"lost "):
                self.lost = int(words[5:])
            elif words == b"bye":
                self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self.left.add(self._lines.pop(connection).index)
        connection.close()
        self._gone.set()

    def _say(self, words: bytes) -> None:
        for connection in self._lines:
            try:
                connection.sendall(words)
            except OSError:
                continue  # what it is will be heard

    @property
    def message(self) -> str:
        """What has happened, and how to go on."""
        if self.lost < 0 and self.left:
            return f"process {min(self.left)} of {self.count} has ended: its own message says why"
        return f"process {self.lost} of {self.count} is lost; {self.way_on()}"

    def explanation(self, error: BaseException | None) -> ProcessLostError | None:
        """The lost process, where an error comes of it; the group is then given up."""
        if self.count == 1 or not isinstance(error, RuntimeError) or isinstance(error, FewstepError):
            return None
        if not self._gone.wait(PATIENCE):
            return None
        abandon_processes()
        return ProcessLostError(self.message)

    def close(self, error: BaseException | None = None) -> None:
        """Look no more; the others are told that this process ends, unless an error ends it that they do not share."""
        if not self._thread.is_alive() or self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        if error is None or isinstance(error, (FewstepError, KeyboardInterrupt)):
            self._say(b"bye\n")
        for connection in self._lines:
            connection.close()
        self._selector.close()


@contextmanager
def watching(accelerator: Accelerator, way_on: Callable[[], str]) -> Iterator[None]:
    """Inside, all processes end where one is lost; raises ProcessLostError, which says how to go on."""
    count = int(accelerator.num_processes)
    peers = Peers(way_on, int(accelerator.process_index), count, Agreement(count))
    try:
        yield
    except BaseException as error:
        lost = peers.explanation(error)
        peers.close(error)
        if lost is not None:
            raise lost from error
        raise
    peers.close()


class _Line:
    """What has come in of a connection: from which process, when last, and the words that are not whole."""

    def __init__(self, index: int) -> None:
        self.index, self.heard, self.rest = index, time.monotonic(), b""

    def take(self, found: bytes) -> list[bytes]:
        """The lines that are whole with it."""
        self.heard = time.monotonic()
        *whole, self.rest = (self.rest + found).split(b"\n")
        return whole


def _reached(host: str, port: int) -> socket.socket | None:
    try:
        return socket.create_connection((host, port), timeout=_MEETING)
    except OSError:
        return None
