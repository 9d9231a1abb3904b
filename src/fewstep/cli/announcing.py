"""What `fewstep train` says of a run as it begins, and of its pace once it is known."""

import math
import sys

from tqdm import tqdm

from fewstep.training.callbacks import Callback, Moment, Start
from fewstep.utils.text import counted

_STEPS, _SECONDS, _SHORT = 5, 2.0, 10.0


class Announcer(Callback):
    """Prints the network, the device and the length; after a few steps the measured speed and the time to the end."""

    def __init__(self) -> None:
        self._begun: Moment | None = None
        self._said = False
        self._unit = "image"

    def start(self, start: Start) -> None:
        self._unit = start.unit
        adapted = "" if start.trained == start.parameters else f", {start.trained:,} of them trained"
        steps = math.ceil(start.images / start.batch_size)
        length = f"{counted(start.images, start.unit)} in {counted(steps, 'step')} of {start.batch_size}"
        length += f", at most {duration(start.seconds)}" if start.seconds else ""
        threads = f", {counted(start.threads, 'thread')}" if start.device == "CPU" else ""
        processes = f", {start.processes} processes" if start.processes > 1 else ""
        adapted += ", compiled" if start.compiled else ""
        network = f"{start.network} with {counted(start.parameters, 'parameter')}{adapted}"
        print(f"{network}; {start.device}{threads}{processes}")
        done = "all of them are done" if start.step >= steps else f"goes on from step {start.step:,}"
        print(f"{length}; {done}" if start.step else length, flush=True)

    def step(self, moment: Moment) -> None:
        """The first step warms up: it does not count."""
        if self._begun is None:
            self._begun = moment
        steps, seconds = moment.step - self._begun.step, moment.seconds - self._begun.seconds
        if self._said or steps < _STEPS or seconds < _SECONDS:
            return
        self._said = True
        rate, pace = (moment.images - self._begun.images) / seconds, (moment.progress - self._begun.progress) / seconds
        left = (1 - moment.progress) / pace
        if left > _SHORT:
            tqdm.write(f"Measured: {rate:,.0f} {self._unit}s/s, about {duration(left)} to the end", file=sys.stdout)
            sys.stdout.flush()


def duration(seconds: float) -> str:
    """A time in words: 45 s, 12 min, 3.5 h, 2.1 days."""
    for unit, size, least in (("days", 86_400, 2), ("h", 3_600, 2), ("min", 60, 2)):
        if seconds >= least * size:
            amount = seconds / size
            return f"{amount:.1f} {unit}" if unit != "min" else f"{amount:.0f} {unit}"
    return f"{seconds:.0f} s"
