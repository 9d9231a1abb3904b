"""Signals that end a run: after the first it finishes its step and saves, a second ends it at once."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

from fewstep.utils.errors import Stopped

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_ECHO = 1.0  # seconds: a launcher passes on what the terminal has sent to all


class StopSignals:
    """`with StopSignals(...) as stops:` keeps the first signal in `received`. silent: say nothing of it."""

    def __init__(self, silent: bool) -> None:
        self.silent = silent
        self.received: signal.Signals | None = None
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handler
            for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as under nohup
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ending(self, step: int, going_on: str) -> Stopped:
        """What ends the run after a signal, with the exit code of one that it had ended."""
        number = self.received or signal.SIGTERM  # it may have reached another process alone
        return Stopped(f"stopped by {number.name}; step {step} is saved: {going_on} goes on", 128 + number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = signal.Signals(number), time.monotonic()
            if not self.silent:
                line = f"\nfewstep: {self.received.name}: the step is finished and saved; once more ends it at once\n"
                os.write(2, line.encode())
        elif time.monotonic() - self._at > _ECHO:
            before = self._before[number]
            signal.signal(number, before)
            if callable(before):
                before(number, frame)
            else:
                os.kill(os.getpid(), number)
