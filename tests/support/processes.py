"""Real processes of Python, each forked from one that has imported fewstep: imports take longer than their work."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.commands import ENVIRONMENT, Finished

LONGEST = 240
"""Seconds that a test waits for a process."""


class Forked:
    """One of them."""

    def __init__(self, parent: "Forking", number: int, files: list[Path]) -> None:
        self.parent, self.number, self.files = parent, number, files

    def kill(self) -> None:
        os.kill(self.number, signal.SIGKILL)

    def wait(self) -> Finished:
        """What it left. A signal's number, negative, in place of the exit code where one ended it."""
        return Finished(self.parent.ask(self.number), *(file.read_text() for file in self.files))


class Forking:
    """The process whose children they are."""

    def __init__(self, server: "subprocess.Popen[str]", folder: Path) -> None:
        self.server, self.folder, self.count = server, folder, 0

    def ask(self, request: object) -> int:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        assert select.select([self.server.stdout], [], [], LONGEST)[0], f"no end after {LONGEST} s"
        return int(self.server.stdout.readline())

    def start(self, *words: object, **environment: object) -> Forked:
        """`python *words`, with this added to its environment."""
        self.count += 1
        files = [self.folder / f"{self.count}-{stream}.txt" for stream in ("out", "err")]
        request = {
            "words": [str(word) for word in words],
            "environment": {name: str(value) for name, value in environment.items()},
            "files": [str(file) for file in files],
        }
        return Forked(self, self.ask(request), files)


@contextmanager
def forking(folder: Path) -> Iterator[Forking]:
    """What starts processes whose output is kept in a folder."""
    script = Path(__file__).with_name("forking.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-P", str(script)],
        env=ENVIRONMENT,
        text=True,
        start_new_session=True,
        **pipes,  # type: ignore[call-overload]
    ) as server:
        yield Forking(server, folder)
        os.killpg(server.pid, signal.SIGKILL)  # with what a failed test has left
