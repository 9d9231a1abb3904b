"""Where the time of a step goes: ten steps under PyTorch's profiler, as a trace and the five largest items."""

import sys
from pathlib import Path
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from fewstep.utils.errors import Stopped, TrainingDivergedError
from fewstep.utils.files import guarded
from fewstep.utils.text import counted

WARM, STEPS, ITEMS = 5, 10, 5
PROFILE = "profile.json"


class StepProfile:
    """Watches steps WARM + 1 to WARM + STEPS of a start; of a run that ends before, the steps that it took.

    Within `with`; a run that is stopped or diverges is watched too.
    file: where the trace goes, for chrome://tracing or Perfetto. wanted: whether anything is watched.
    """

    def __init__(self, file: Path, device: torch.device, wanted: bool) -> None:
        self.file, self.device, self.wanted, self.taken = file, device, wanted, 0
        self._profile: profile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, Stopped | TrainingDivergedError):
            self.end()

    def step(self) -> None:
        """After a step of the run; prints what took longest after the last one that is watched."""
        self.taken += self.wanted
        if self.taken == WARM and self._profile is None:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self._profile = profile(activities=kinds)
            self._profile.start()
        elif self.taken == WARM + STEPS:
            self.end()

    def end(self) -> None:
        """Write the trace of what was watched, and print its largest items, once; or that nothing was."""
        if not self.wanted:
            return
        watched, self._profile, self.wanted = self._profile, None, False
        if watched is not None:
            watched.stop()
        steps = self.taken - WARM
        if watched is None or steps < 1:
            took = f"this start ended after {counted(self.taken, 'step')}"
            needs = f"the first {WARM} warm up, the next {STEPS} are watched"
            tqdm.write(f"no step was watched, as {took}: {needs}", file=sys.stdout)
            return
        with guarded(self.file):
            watched.export_chrome_trace(str(self.file))
        kind = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        spent = {each.key: float(getattr(each, kind)) for each in watched.key_averages()}
        total = sum(spent.values()) or 1.0
        largest = sorted(spent.items(), key=lambda item: -item[1])[:ITEMS]
        lines = [f"  {own / total:4.0%}  {own / steps / 1000:9.3f} ms a step  {name}" for name, own in largest]
        what = f"{counted(steps, 'step')} watched, their trace in {self.file}; the largest items:"
        tqdm.write("\n".join([what, *lines]), file=sys.stdout)
