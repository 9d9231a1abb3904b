"""Run folders: what a run is, what it logged, and the models that it has come to.

RUN/config.json          the run's configuration and what the data measured
RUN/log.jsonl            one JSON object per line; where the training diverged, the last says why
RUN/step_times.json      step times tuned for one of the checkpoints (fewstep.evaluation.tune_steps)
RUN/checkpoints/step-N/  see fewstep.training.checkpoint
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.data.base import Dataset
from fewstep.data.generated import FOLDER
from fewstep.data.sources import DataConfig, load_dataset, placed_in
from fewstep.networks.base import fit_stored
from fewstep.recipes.config import RunConfig
from fewstep.sampling.card import Provenance
from fewstep.sampling.pipeline import WEIGHTS_FILE, Pipeline, from_hub
from fewstep.sampling.step_times import TIMES_FILE, TunedSteps, read_tuned_steps
from fewstep.training.checkpoint import (
    STATE_FILE,
    check_digests,
    is_sound,
    load_checkpoint_pipeline,
    read_state,
    remove_folder,
    step_of,
)
from fewstep.training.ema import ema_names
from fewstep.training.provenance import read_provenance
from fewstep.utils.errors import (
    BaseWeightsError,
    CheckpointError,
    ConfigError,
    DataError,
    FewstepError,
    FewstepWarning,
    LaterFormatError,
    NotImportedError,
    first_cause,
)
from fewstep.utils.files import (
    guarded,
    linked,
    read_lines,
    read_record,
    reading_line,
    write_atomically,
)
from fewstep.utils.hub import HUB
from fewstep.utils.parts import imported_file, kind_name, outside_files
from fewstep.utils.serialization import JSON, from_json, in_this_format
from fewstep.utils.text import import_words, listed, quoted
from fewstep.utils.weights import read_weights

_WRITTEN = ("checkpoints", "samples", "statistics", FOLDER, "tensorboard", "wandb")
_DATA: dict[str, type] = {"name": str, "fingerprint": str, "shape": list, "classes": int, "train": int}


@dataclass(frozen=True, init=False)
class RunFolder:
    """A run on disk; nothing in it may be a link, which could lead a reader or a writer elsewhere."""

    root: Path

    def __init__(self, root: Path | str) -> None:
        object.__setattr__(self, "root", Path(root))

    def __str__(self) -> str:
        return str(self.root)

    @property
    def config_file(self) -> Path:
        return self.root / "config.json"

    @property
    def log_file(self) -> Path:
        return self.root / "log.jsonl"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def going_on(self) -> str:
        """The command that goes on with it, and the files of the user's that it needs."""
        named = ""
        with suppress(FewstepError):
            config = self.config()
            named = import_words([*outside_files(config), imported_file(config.teacher)])
        return f"fewstep train --resume {quoted(self.root)}{named}"

    def way_on(self) -> str:
        """What is saved, and how to go on with it, in words."""
        saved = self.checkpoints()
        return f"{saved[-1]} is saved: {self.going_on} goes on" if saved else "there is no checkpoint yet"

    def refuse_links(self) -> None:
        """Raise CheckpointError for a link among the run's files, or in a folder of it that is written to.

        Weights & Biases links its newest run: what leads from RUN/wandb to places within it may stay.
        """
        wandb = self.root / "wandb"
        for path in linked(self.root, _WRITTEN):
            if path == wandb or not (path.is_relative_to(wandb) and path.resolve().is_relative_to(wandb.resolve())):
                raise CheckpointError(f"{path} is a link, which a run must not have: put what it leads to there")

    def record(self) -> dict[str, JSON]:
        """The stored configuration and data; raises CheckpointError when this is no run, or one of a later format."""
        if not self.config_file.is_file():
            raise CheckpointError(f"{self.root} is not a run: it has no config.json")
        self.refuse_links()
        record = read_record(self.config_file, "bring back a copy of it")
        record = in_this_format(record, str(self.config_file))
        if {"flow_map", "pipeline"} & set(record):
            raise CheckpointError(
                f"{self.root} is a saved model, which keeps no data, log or figures: fewstep sample draws from it; "
                "give the folder of the run that it was saved from"
            )
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

    def load_data(self, root: Path | None = None) -> tuple[DataConfig, Dataset]:
        """The run's data, from `root` where they have moved, and how they are read.

        Raises what `load_dataset` raises, and CheckpointError for other data than the run was trained on.
        """
        config = self.config().data
        config = placed_in(self.root, config if root is None else replace(config, root=str(root)))
        advice = "where the run's data lie now is said with --data.root"
        try:
            dataset = load_dataset(config)
        except DataError as error:
            raise DataError(f"{error}; {advice}") from error
        if dataset.fingerprint != self.data("fingerprint")["fingerprint"]:
            where = config.root or dataset.name
            numbers = self.renumbered({"fingerprint": dataset.fingerprint, "class_names": list(dataset.class_names)})
            raise CheckpointError(f"{where} holds other data than {self.root} was trained on{numbers}: {advice}")
        return config, dataset

    def renumbered(self, data: dict[str, JSON]) -> str:
        """What the run's classes were, where other data have others, or in another order.

        A run of images that does not say so had its classes in the order of their letters.
        """
        old, now = self.data(), data.get("class_names")
        letters = kind_name(type(self.config().data.source)) == "images"
        stored = old.get("class_names", sorted(map(str, now)) if letters and isinstance(now, list) else now)
        if stored == now or old.get("fingerprint") == data["fingerprint"]:
            return ""
        was, are = (listed(list(map(str, names))) if isinstance(names, list) else "unknown" for names in (stored, now))
        return f"; its classes 0, 1, ... were {was}, and are now {are}"

    def config(self) -> RunConfig:
        """The run's configuration."""
        return from_json(RunConfig, self.record()["run"], str(self.config_file))

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return [path for path in self._checkpoint_folders() if (path / STATE_FILE).is_file()]

    def _checkpoint_folders(self) -> list[Path]:
        found = (self.root / "checkpoints").glob("step-*")
        return sorted((path for path in found if re.fullmatch(r"step-\d+", path.name)), key=step_of)

    def last_checkpoint(self) -> Path:
        """The newest whole checkpoint, with a FewstepWarning for those beyond; raises CheckpointError for none."""
        if not (found := self.checkpoints()):
            raise CheckpointError(f"{self.root} has no checkpoint yet: train it first")
        self.warn_of_torn(f"{found[-1].name} is used")
        return found[-1]

    def warn_of_torn(self, instead: str) -> None:
        """A FewstepWarning where the newest checkpoint is not whole, with what is done instead."""
        newest = self._checkpoint_folders()[-1:]
        if newest and newest != self.checkpoints()[-1:]:
            warnings.warn(f"{newest[0]} is not whole (it lacks {STATE_FILE}): {instead}", FewstepWarning, stacklevel=1)

    def go_back(self, step: int) -> None:
        """Set newer checkpoints than that of a step aside, as step-N.aside; raises CheckpointError where it is none."""
        steps = [step_of(path) for path in self.checkpoints()]
        if step not in steps:
            raise CheckpointError(f"{self.root} has no checkpoint of step {step}: it has {', '.join(map(str, steps))}")
        for path in self._checkpoint_folders():
            if step_of(path) > step:
                with guarded(path):
                    shutil.rmtree(path.with_suffix(".aside"), ignore_errors=True)
                    path.rename(path.with_suffix(".aside"))

    @contextmanager
    def with_way_back(self, checkpoint: Path) -> Iterator[None]:
        """What cannot be read of a checkpoint is said with how to go on from the newest sound one before it."""
        try:
            yield
        except (LaterFormatError, BaseWeightsError):
            raise
        except (CheckpointError, ConfigError) as error:
            if isinstance(first_cause(error), NotImportedError):
                raise
            before = [path for path in self.checkpoints() if step_of(path) < step_of(checkpoint)]
            sound = next((path for path in reversed(before) if is_sound(path)), None)
            which = "the one before" if sound in before[-1:] else "the newest that can be used"
            way = (
                "train it anew" if sound is None else f"go on from {which} with {self.going_on} --from {step_of(sound)}"
            )
            raise CheckpointError(f"{error}; {way}") from error

    def state(self) -> dict[str, Any]:
        """`read_state` of the newest checkpoint."""
        newest = self.last_checkpoint()
        with self.with_way_back(newest):
            return read_state(newest)

    def model(self) -> Pipeline:
        """The newest checkpoint's model, without tuned times."""
        newest = self.last_checkpoint()
        with self.with_way_back(newest):
            return load_checkpoint_pipeline(newest)

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.root / "checkpoints" / f"step-{step:08d}"

    def keep_newest(self, count: int) -> None:
        """Remove the oldest checkpoints beyond so many."""
        for old in self.checkpoints()[:-count]:
            remove_folder(old)

    def pipeline(self, weights: str = "", base: str = "") -> Pipeline:
        """The newest checkpoint's model, ready to sample, with the step times tuned for it.

        weights: the name of an EMA of `averages`, or "last" for the weights as the last step left them; "" is the first
        EMA, which alone has tuned times. base: as of `load`. Raises CheckpointError for a name that the run does not
        have.
        """
        self.record()
        folder, files = self.last_checkpoint(), self.averages() if weights else {}
        if weights and weights not in files:
            raise CheckpointError(f"{self.root} has no weights {weights!r}: it has {', '.join(files)}")
        with self.with_way_back(folder):
            found = load_checkpoint_pipeline(folder, base).from_run(self.provenance)
            if weights and files[weights].name != WEIGHTS_FILE:
                fit_stored(found.flow_map.network, read_weights(files[weights]), str(files[weights]))
                check_digests(folder, files[weights].name)
                return found
        tuned = self.tuned_steps()
        return found.with_step_times(() if tuned is None else tuned.step_times)

    def provenance(self) -> Provenance:
        """Where the run's weights come from; raises CheckpointError when its record is damaged."""
        return read_provenance(self.root, self.config(), self.data())

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
        step = self.state()["step"]
        if tuned.step == step:
            return tuned
        if tuned.step_times:
            warnings.warn(
                f"{self.root / TIMES_FILE} was tuned at step {tuned.step}, but the model is now at step {step}: its "
                f"times are not used; run fewstep tune-steps {quoted(self.root)} anew",
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

    @property
    def divergence(self) -> str:
        """Why the training ended, where it diverged; empty otherwise. Raises CheckpointError as `read_log` does."""
        (last,) = read_lines(self.log_file, newest=1) or [{}]
        return str(last.get("diverged", ""))

    def append_log(self, record: dict[str, Any]) -> None:
        """Add one line."""
        with guarded(self.log_file), self.log_file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def truncate_log(self, step: int) -> None:
        """Drop lines after a checkpoint's step: they will be written again."""
        kept = "".join(json.dumps(record) + "\n" for record in self.read_log() if record["step"] <= step)
        if not self.log_file.exists() or self.log_file.read_bytes() != kept.encode():
            write_atomically(self.log_file, kept)


def load(run: str | Path, weights: str = "", base: str = "") -> Pipeline:
    """A pipeline, ready to sample, from a run folder, from a folder that `Pipeline.save` wrote, or from the Hub.

    run: a folder, or "hf://OWNER/NAME" for a repository of the Hugging Face Hub.

    weights: which of a run's: the name of an EMA, such as "power-0.1" or "constant-0.999", or "last" for those of the
    last step; the run's first EMA when not given. base: where the teacher beneath adapters lies now, if it was moved.

    Raises CheckpointError when the folder is neither, or damaged, or has no such weights, and when the Hub does not
    give it.
    """
    if str(run).startswith(HUB):
        return from_hub(str(run).removeprefix(HUB))
    root = Path(run)
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder")
    if (root / WEIGHTS_FILE).is_file():
        if weights:
            raise CheckpointError(f"{root} is a saved model, which has one set of weights: leave {weights!r} out")
        return load_checkpoint_pipeline(root, base)
    return RunFolder(root).pipeline(weights, base)
