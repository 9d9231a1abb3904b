"""A run from Python: a recipe and data in; out comes a run to sample, to measure and to report on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt

from fewstep.data.base import Dataset
from fewstep.data.sources import DataConfig, ImagesSource, load_dataset
from fewstep.evaluation.actions import measure_actions, write_actions
from fewstep.evaluation.align import perceptual_features, with_labels
from fewstep.evaluation.curve import curve_watcher
from fewstep.evaluation.evaluate import build_evaluator, measure_real, measure_run
from fewstep.evaluation.figures import Row, write_figures
from fewstep.evaluation.report.run import report, watcher
from fewstep.recipes import RECIPES, fitted, recipe
from fewstep.recipes.config import RunConfig
from fewstep.sampling.pipeline import Pipeline
from fewstep.training import Callback, Callbacks, RunFolder, TrainingResult, train_run
from fewstep.training.settings import Runtime
from fewstep.training.teacher_samples import run_data
from fewstep.utils.cache import cache_folder
from fewstep.utils.device import placed
from fewstep.utils.text import counted

Data = str | Path | DataConfig | Dataset


@final
@dataclass(frozen=True)
class Run:
    """A trained run in its folder, which `fewstep sample`, `evaluate`, `report` and `compare` take too.

    config: with the place of its data. result: what this start of it has done.

    ```python
    run.pipeline.generate(16, steps=1).pil()[0].save("first.png")
    run.evaluate(samples=500)
    run.log["loss"]
    ```
    """

    folder: RunFolder
    config: RunConfig
    dataset: Dataset
    result: TrainingResult

    def __repr__(self) -> str:
        done = f"{counted(self.result.images, self.config.data.source.unit)} in {counted(self.result.step, 'step')}"
        return f"Run({str(self.folder)!r}, {self.config.recipe}: {done})"

    @property
    def pipeline(self) -> Pipeline:
        """The newest checkpoint's model, to sample from, read anew each time."""
        return self.folder.pipeline()

    def evaluate(self, **changes: Any) -> list[Row]:
        """Figures of its samples against held-out data, which figures.json keeps; of a policy those of its actions.

        changes: to the recipe's EvaluationConfig, such as samples=500 or steps=(1, 2). Raises DataError where too few
        samples are held out.
        """
        settings = replace(self.config.evaluation, **changes)
        if self.dataset.policy is not None:
            errors = measure_actions(self.folder, self.dataset, settings)
            write_actions(errors, self.folder.root)
            return errors
        evaluator = build_evaluator(with_labels(self.config.data, self.dataset), cache_folder())
        rows = [*measure_run(self.folder, evaluator, settings), measure_real(self.dataset, settings.samples, evaluator)]
        write_figures(rows, self.folder.root)
        return rows

    def report(self) -> Path:
        """Write report.html; where it is."""
        return report(self.folder)

    @property
    def log(self) -> dict[str, npt.NDArray[np.float64]]:
        """The log's columns, by name, with NaN where a line lacks one: log["images"], log["loss"]."""
        lines = self.folder.read_log()
        names = dict.fromkeys(key for line in lines for key, value in line.items() if isinstance(value, int | float))
        return {name: np.array([line.get(name, np.nan) for line in lines], dtype=np.float64) for name in names}


def train(
    what: str | Path | RunConfig,
    data: Data | None = None,
    out: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    *,
    images: int = 0,
    seconds: float = 0.0,
    runtime: Runtime = Runtime(),
) -> Run:
    """Train, or go on where the run in `out` stopped, as `fewstep train` does.

    what: the name of a recipe, FILE.py or FILE.py:FUNCTION, a run's config.json, or a RunConfig. data: a folder of
    images or whatever else the recipe's source reads, a DataConfig, or a data set in memory, which commands that read
    data again do not find. out: the run's folder, runs/RECIPE when not given. callbacks: told of what happens. images,
    seconds: how long, in place of the recipe's. Leaves the caller's random numbers as they were. Raises what
    `fewstep.training.train_run` raises.

    ```python
    run = fewstep.train("photos-64", "PHOTOS", seconds=600)
    ```
    """
    config = placed_on(what if isinstance(what, RunConfig) else recipe(str(what)), data)
    length = config.training
    length = replace(length, images=images or length.images, seconds=seconds or length.seconds)
    config = fitted(replace(config, training=length), published(config))
    folder = RunFolder(out or Path("runs") / config.recipe)
    read = config.data if isinstance(data, Dataset) else run_data(config, folder, runtime.cpu, runtime.quiet)
    dataset = data if isinstance(data, Dataset) else load_dataset(read)
    result = train_on(config, read, dataset, folder, runtime, callbacks)
    return Run(folder, replace(config, data=read), dataset, result)


def placed_on(config: RunConfig, data: Data | None) -> RunConfig:
    """The same on such data; a folder is one of images where the recipe's own source reads nothing."""
    if data is None or isinstance(data, Dataset):
        return config
    if isinstance(data, DataConfig):
        return replace(config, data=data)
    source = config.data.source if config.data.source.reads_root else ImagesSource()
    return replace(config, data=replace(config.data, source=source, root=str(data)))


def published(config: RunConfig) -> RunConfig | None:
    """The recipe that it has the name of."""
    return RECIPES[config.recipe]() if config.recipe in RECIPES else None


def train_on(
    config: RunConfig,
    data: DataConfig,
    dataset: Dataset,
    folder: RunFolder,
    runtime: Runtime,
    callbacks: Sequence[Callback],
) -> TrainingResult:
    """`train_run` with its sample grids and its learning curve; data: as the data set was read."""
    cache, whole = cache_folder(), replace(config, data=data)
    pictures = None if dataset.policy is not None else watcher(folder, config)
    with placed(runtime.cpu):
        features = perceptual_features(whole, dataset, cache)
        curve = curve_watcher(folder, whole, dataset, cache)
        return train_run(config, dataset, folder, runtime, Callbacks(pictures, curve, features, tuple(callbacks)))
