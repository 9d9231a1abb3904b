"""Step times found for a model by `fewstep tune-steps`: values that travel with it, and the file of its run."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from fewstep.utils.errors import ConfigError
from fewstep.utils.files import parse_json, reading, write_atomically
from fewstep.utils.old_names import translated
from fewstep.utils.serialization import from_json, to_json

SamplerName = Literal["map", "gamma", "euler", "heun"]
Purpose = tuple[SamplerName, float, float, int]
TIMES_FILE = "step_times.json"


@final
@dataclass(frozen=True)
class StepTimes:
    """The times (t_max, ..., t_min) that a model is sampled at in len(times) - 1 steps, in its path's clock.

    sampler, gamma, guidance_scale: what they were found for, and all that they hold for; gamma is 0 but for the gamma
    sampler, guidance_scale is the strength over the whole range. source: what they were found on.
    Raises ConfigError unless the times fall.
    """

    sampler: SamplerName
    gamma: float
    guidance_scale: float
    times: tuple[float, ...]
    source: str

    def __post_init__(self) -> None:
        if len(self.times) < 2 or any(later >= earlier for earlier, later in itertools.pairwise(self.times)):
            raise ConfigError(f"step times {self.times} must be at least two, and fall")

    @property
    def steps(self) -> int:
        """How many steps they make."""
        return len(self.times) - 1

    @property
    def purpose(self) -> Purpose:
        """Sampler, gamma, guidance strength, steps: a model has at most one placement for each."""
        return self.sampler, self.gamma, self.guidance_scale, self.steps


@dataclass(frozen=True)
class Tuned:
    """What a search found: the times, whether they are used, and the figures that decided it."""

    step_times: StepTimes
    kept: bool
    figures: dict[str, Any]


@dataclass(frozen=True)
class TunedSteps:
    """What step_times.json holds: the step of the checkpoint that was tuned, and what was found for each purpose."""

    step: int
    found: tuple[Tuned, ...] = ()

    @property
    def step_times(self) -> tuple[StepTimes, ...]:
        """Those that are used."""
        return tuple(each.step_times for each in self.found if each.kept)

    def adding(self, new: Tuned) -> "TunedSteps":
        """With one more, in place of an earlier one of its purpose."""
        kept = [each for each in self.found if each.step_times.purpose != new.step_times.purpose]
        return TunedSteps(self.step, (*kept, new))

    def write(self, run: Path) -> Path:
        """Store them in a run's folder; raises CheckpointError when the disk refuses."""
        file = run / TIMES_FILE
        found = [
            {"step_times": to_json(each.step_times), "kept": each.kept, "figures": each.figures} for each in self.found
        ]
        write_atomically(file, json.dumps({"step": self.step, "found": found}, indent=2) + "\n")
        return file


def read_tuned_steps(run: Path) -> TunedSteps | None:
    """What is stored in a run's folder, None where nothing is; raises CheckpointError when the file is damaged."""
    file = run / TIMES_FILE
    if not file.is_file():
        return None
    with reading(file, "delete it, and run fewstep tune-steps anew"):
        record = parse_json(file.read_bytes())
        found = [
            Tuned(from_json(StepTimes, translated(each["step_times"])), bool(each["kept"]), dict(each["figures"]))
            for each in record["found"]
        ]
        return TunedSteps(int(record["step"]), tuple(found))
