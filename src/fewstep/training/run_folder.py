"""Run folders: what a run is, what it logged, and the models that it has come to.

RUN/config.json          the run's configuration and what the data measured
RUN/log.jsonl            one JSON object per line
RUN/step_times.json      step times tuned for one of the checkpoints (fewstep.evaluation.tune_steps)
RUN/checkpoints/step-N/  see fewstep.training.checkpoint
"""

import json
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.recipes.config import RunConfig
from fewstep.sampling.pipeline import WEIGHTS_FILE, Pipeline, from_hub, load_pipeline
from fewstep.sampling.step_times import TIMES_FILE, TunedSteps, read_tuned_steps
from fewstep.training.checkpoint import STATE_FILE, read_state, remove_folder
from fewstep.training.ema import ema_names
from fewstep.utils.errors import CheckpointError, FewstepWarning
from fewstep.utils.files import LOCK_FILE, Lock, guarded, read_lines, read_record, reading_line, write_atomically
from fewstep.utils.serialization import FORMAT, JSON, differences, from_json, in_this_format, to_json
from fewstep.utils.weights import fit_weights, read_weights

HUB = "hf://"
_DATA: dict[str, type] = {"name": str, "fingerprint": str, "shape": list, "classes": int, "train": int}


@dataclass(frozen=True)
class RunFolder:
    """A run on disk."""

    root: Path

    @property
    def config_file(self) -> Path:
        return self.root / "config.json"

    @property
    def log_file(self) -> Path:
        return self.root / "log.jsonl"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    def hold(self, config: RunConfig, data: dict[str, JSON], teacher: str | None = None) -> Lock:
        """Keep other processes from training here until the lock is released; of the run nothing is written yet.

        teacher: the fingerprint of its weights; where they lie may change between starts. Raises CheckpointError as
        `check` does, when another process trains here, or when the folder cannot be written.
        """
        self.check(config, data, teacher)  # before anything is written
        lock = Lock(
            self.root,
            f"{self.root} is being trained in by another process, or by a run of this one that was not released: wait "
            "for it, or give another folder with --out",
        )
        try:
            self.check(config, data, teacher)  # once more: another process may have begun meanwhile
        except BaseException:
            lock.release()
            raise
        return lock

    def begin(self, config: RunConfig, data: dict[str, JSON], teacher: str | None = None) -> None:
        """Remove what a killed process left half written, and write config.json unless it says just this.

        What is only logged, kept or measured may differ from what it said: the last command counts.
        """
        self.remove_leftovers()
        if not self.config_file.exists() or self.config() != config:
            write_atomically(self.config_file, json.dumps(_record(config, data, teacher), indent=2) + "\n")

    def check(self, config: RunConfig, data: dict[str, JSON], teacher: str | None = None) -> None:
        """Raise CheckpointError, showing every difference, when the folder holds anything else; nothing is written."""
        if self.root.exists() and not self.root.is_dir():
            raise CheckpointError(f"{self.root} is a file, not a folder: give another folder with --out")
        if not self.config_file.exists():
            if self.root.exists() and any(not _ours(path.name) for path in self.root.iterdir()):
                raise CheckpointError(f"{self.root} is not empty and holds no run: give another folder with --out")
            return
        today = {"run": to_json(self.config())}  # with what keys that came later mean to an older file
        lines = differences(_identity(self.record() | today), _identity(_record(config, data, teacher)))
        if lines:
            shown = "; ".join(lines[:8]) + (f" and {len(lines) - 8} more" if len(lines) > 8 else "")
            raise CheckpointError(
                f"{self.root} holds a run with other settings ({shown}): "
                "restart with the settings it has, or give another folder with --out"
            )

    def remove_leftovers(self) -> None:
        """Delete what a killed process was still writing."""
        for pattern in (".config.json.*", ".log.jsonl.*", "samples/.step-*", "checkpoints/.step-*"):
            for path in self.root.glob(pattern):
                with guarded(path):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def record(self) -> dict[str, JSON]:
        """The stored configuration and data; raises CheckpointError when this is no run, or one of a later format."""
        if not self.config_file.is_file():
            raise CheckpointError(f"{self.root} is not a run: it has no config.json")
        record = read_record(self.config_file, "bring back a copy of it")
        record = in_this_format(record, str(self.config_file))
        if not {"run", "data"} <= set(record) <= {"format", "run", "data", "teacher"}:
            raise CheckpointError(f"{self.config_file} is not a run's configuration: bring back a copy of it")
        return record

    def data(self, *keys: str) -> dict[str, Any]:
        """What is stored of the run's data; raises CheckpointError where one of these keys of _DATA is missing."""
        data: Any = self.record()["data"]
        missing = [key for key in keys if not isinstance(data, dict) or type(data.get(key)) is not _DATA[key]]
        if missing:
            raise CheckpointError(
                f"{self.config_file} is damaged: it does not say what the run's data are ({', '.join(missing)}); "
                "bring back a copy of it"
            )
        found: dict[str, Any] = data
        return found

    def config(self) -> RunConfig:
        """The run's configuration."""
        return from_json(RunConfig, self.record()["run"], str(self.config_file))

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [p for p in (self.root / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
        return sorted((p for p in found if (p / STATE_FILE).is_file()), key=lambda p: int(p.name[5:]))

    def last_checkpoint(self) -> Path:
        """The newest checkpoint; raises CheckpointError when there is none."""
        found = self.checkpoints()
        if not found:
            raise CheckpointError(f"{self.root} has no checkpoint yet: train it first")
        return found[-1]

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.root / "checkpoints" / f"step-{step:08d}"

    def keep_newest(self, count: int) -> None:
        """Remove the oldest checkpoints beyond so many."""
        for old in self.checkpoints()[:-count]:
            remove_folder(old)

    def pipeline(self, weights: str = "") -> Pipeline:
        """The newest checkpoint's model, ready to sample, with the step times tuned for it.

        weights: the name of an EMA of `averages`, or "last" for the weights as the last step left them; "" is the first
        EMA, which alone has tuned times. Raises CheckpointError for a name that the run does not have.
        """
        self.record()
        found = load_pipeline(self.last_checkpoint())
        if weights:
            files = self.averages()
            if weights not in files:
                raise CheckpointError(f"{self.root} has no weights {weights!r}: it has {', '.join(files)}")
            fit_weights(found.flow_map.network, read_weights(files[weights]), str(files[weights]))
            if files[weights].name != WEIGHTS_FILE:
                return found
        tuned = self.tuned_steps()
        return found.with_step_times(() if tuned is None else tuned.step_times)

    def averages(self) -> dict[str, Path]:
        """Names and files of the newest checkpoint's weights: the EMAs, the sampled one first, and "last".

        Not among them: the slow average that some objectives take targets from.
        """
        settings, folder = self.config().training, self.last_checkpoint()
        names = ema_names(settings.ema_power, settings.ema_decay)
        files = {name: folder / (f"ema-{name}.safetensors" if i else WEIGHTS_FILE) for i, name in enumerate(names)}
        return files | {"last": folder / "weights.safetensors"}

    def tuned_steps(self) -> TunedSteps | None:
        """What was tuned for the newest checkpoint; None, with a FewstepWarning, for what was tuned for another.

        None where nothing was. Raises CheckpointError when the file is damaged.
        """
        tuned = read_tuned_steps(self.root)
        if tuned is None:
            return None
        step = read_state(self.last_checkpoint())["step"]
        if tuned.step == step:
            return tuned
        if tuned.step_times:
            warnings.warn(
                f"{self.root / TIMES_FILE} was tuned at step {tuned.step}, but the model is now at step {step}: its "
                f"times are not used; run fewstep tune-steps {self.root} anew",
                FewstepWarning,
                stacklevel=3,
            )
        return None

    def read_log(self) -> list[dict[str, Any]]:
        """The log's records, each of a step; a torn last line is left out.

        Raises CheckpointError naming a line that is damaged.
        """
        records = read_lines(self.log_file)
        for number, record in enumerate(records, start=1):
            with reading_line(self.log_file, number):
                if type(record["step"]) is not int or record["step"] < 1:
                    raise ValueError(f"{record['step']!r} is no step")
        return records

    def append_log(self, record: dict[str, Any]) -> None:
        """Add one line."""
        with guarded(self.log_file), self.log_file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def truncate_log(self, step: int) -> None:
        """Drop lines after a checkpoint's step: they will be written again."""
        kept = "".join(json.dumps(record) + "\n" for record in self.read_log() if record["step"] <= step)
        if not self.log_file.exists() or self.log_file.read_bytes() != kept.encode():
            write_atomically(self.log_file, kept)


def _ours(name: str) -> bool:
    """Whether a file is what a run leaves that was killed before it had its configuration."""
    return name == LOCK_FILE or name.startswith(".config.json.")


def _record(config: RunConfig, data: dict[str, JSON], teacher: str | None) -> dict[str, JSON]:
    return {"format": FORMAT, "run": to_json(config), "data": data, "teacher": teacher}


def _identity(record: dict[str, Any]) -> JSON:
    """What decides the weights: the record without what is only logged, kept or measured."""
    run = {key: value for key, value in record["run"].items() if key not in ("evaluation", "teacher")}
    passive = ("log_images", "sample_images", "checkpoint_images", "keep")
    run["training"] = {key: value for key, value in run["training"].items() if key not in passive}
    return {"run": run, "data": record["data"], "teacher": record.get("teacher")}


def load(run: str | Path, weights: str = "") -> Pipeline:
    """A pipeline, ready to sample, from a run folder, from a folder that `Pipeline.save` wrote, or from the Hub.

    run: a folder, or "hf://OWNER/NAME" for a repository of the Hugging Face Hub.

    weights: which of a run's: the name of an EMA, such as "power-0.1" or "constant-0.999", or "last" for those of the
    last step; the run's first EMA when not given. Raises CheckpointError when the folder is neither, or damaged, or has
    no such weights, and when the Hub does not give it.
    """
    if str(run).startswith(HUB):
        return from_hub(str(run).removeprefix(HUB))
    root = Path(run)
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder")
    if (root / WEIGHTS_FILE).is_file():
        if weights:
            raise CheckpointError(f"{root} is a saved model, which has one set of weights: leave {weights!r} out")
        return load_pipeline(root)
    return RunFolder(root).pipeline(weights)
