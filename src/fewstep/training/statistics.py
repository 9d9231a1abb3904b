"""Statistics of a model's trajectories on a data set: estimated once, kept beside the model."""

import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path as FilePath

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from fewstep.data.base import Dataset
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.preconditioning.estimation import EstimationSettings, StatisticsEstimator
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.networks.condition import Condition
from fewstep.recipes.config import RunConfig, StatisticsConfig
from fewstep.sampling.pipeline import CONFIG_FILE, read_flow_map_config
from fewstep.teachers.diffusers import is_diffusers
from fewstep.training.covariance import means_by_class
from fewstep.training.parallel import ProcessGroup
from fewstep.training.run_folder import RunFolder
from fewstep.training.setup import untrained
from fewstep.training.teacher import fingerprint
from fewstep.utils.errors import CheckpointError, FewstepError
from fewstep.utils.files import refuse_links, write_atomically
from fewstep.utils.random import shuffled_rows
from fewstep.utils.serialization import to_json
from fewstep.utils.tensors import expand
from fewstep.utils.weights import read_weights

BATCH = 64
_VERSION = 2  # raise with any change to the estimate: results of another version must not be found in a cache
_SAVE_SECONDS = 10.0


class ConditionedDenoiser:
    """The model's denoiser under the conditions of the samples fetched last: a callable (x, t) that knows their labels,
    prompts and observations."""

    def __init__(self, model: FlowMap, dataset: Dataset, seed: int) -> None:
        self.model, self.samples, self.seed = model, dataset.train, seed
        self.device = next(model.parameters()).device
        self.cond = Condition()

    def fetch(self, numbers: Tensor) -> Tensor:
        """Training samples number 0, 1, ... in a shuffled order, (B, ...); what follows is under their conditions."""
        rows = shuffled_rows(self.seed, numbers, len(self.samples))
        x0, cond = self.samples.conditioned(rows)
        self.cond = cond.to(self.device)
        return x0.to(self.device)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """D(x, t); x (B, ...), t (B,)."""
        return self.model.denoise(x, t, self.cond)


class ClassCentredDenoiser(ConditionedDenoiser):
    """The same about the mean of each sample's class: samples x0 - m, and D(x + alpha m, t) - m."""

    def __init__(self, model: FlowMap, dataset: Dataset, seed: int) -> None:
        super().__init__(model, dataset, seed)
        self.means = means_by_class(dataset).to(self.device)
        self.about = self.means[:1]

    def fetch(self, numbers: Tensor) -> Tensor:
        x0 = super().fetch(numbers)
        assert self.cond.labels is not None  # or there were no means
        self.about = self.means[self.cond.labels].to(x0.dtype)
        return x0 - self.about

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha = expand(self.model.path.values(t).alpha, x).to(x.dtype)
        return super().__call__(x + alpha * self.about, t) - self.about


def data_mean(dataset: Dataset) -> Tensor:
    """Mean of the training samples, element by element, float64."""
    total = torch.zeros(dataset.shape, dtype=torch.float64)
    for rows in torch.arange(len(dataset.train)).split(4096):
        total += dataset.train.fetch(rows)[0].double().sum(0)
    return total / len(dataset.train)


def make_estimator(model: FlowMap, dataset: Dataset, settings: StatisticsConfig) -> StatisticsEstimator:
    """An estimator of the model's statistics on the training data, in the model's own path."""
    of_classes = settings.classes == "origin"
    kind = ClassCentredDenoiser if of_classes else ConditionedDenoiser
    denoiser = kind(model, dataset, settings.seed)
    return StatisticsEstimator(
        denoiser,
        denoiser.fetch,
        model.path,
        EstimationSettings(
            points=settings.points,
            samples=settings.samples,
            seed=settings.seed,
            probes=None if settings.probes == -1 else settings.probes,
            centred=settings.centred,
        ),
        mean=torch.zeros(dataset.shape, dtype=torch.float64) if of_classes else data_mean(dataset),
        device=denoiser.device,
    )


def prepared(found: TrajectoryStatistics, settings: StatisticsConfig, dataset: Dataset) -> TrajectoryStatistics:
    """Shrunk and ablated as the settings say.

    Never shrunk for data with classes, prompts or observations: a conditional denoiser tends to its condition's mean
    at high noise, so that the residual about the mean of all data has no limit to be drawn to; about the mean of each
    class it has.
    """
    classes = found.class_means is None and dataset.num_classes > 0
    conditional = classes or dataset.text is not None or dataset.policy is not None
    found = found.shrunk() if settings.shrink and not conditional else found
    return found if settings.use == "both" else found.without("s" if settings.use == "l" else "l")


def estimate_together(
    model: FlowMap,
    dataset: Dataset,
    settings: StatisticsConfig,
    group: ProcessGroup = ProcessGroup(),
    partial: FilePath | None = None,
    quiet: bool = True,
) -> TrajectoryStatistics:
    """The plain estimate, each process taking its share of the samples; every process returns the same.

    partial: a file that keeps what one process has estimated so far, and from which it goes on.
    """
    estimator, begin = make_estimator(model, dataset, settings), time.perf_counter()
    saved, begin = begin, begin - (0.0 if partial is None else _resume(estimator, partial))
    todo = range(estimator.seen + group.index * BATCH, settings.samples, group.count * BATCH)
    for first in tqdm(todo, desc="statistics of the teacher", unit_scale=BATCH, disable=quiet, leave=False):
        estimator.update(first, min(BATCH, settings.samples - first))
        now = time.perf_counter()
        if partial is not None and now - saved > _SAVE_SECONDS:
            state = estimator.state() | {"seconds": torch.tensor(now - begin, dtype=torch.float64)}
            write_atomically(partial, save(state))
            saved = now
    estimator.restore({"sums": group.total(estimator.sums)})
    found = estimator.statistics(time.perf_counter() - begin)
    if settings.classes == "pooled":
        return found
    return replace(found, mean=data_mean(dataset), class_means=means_by_class(dataset))


def cache_file(folder: FilePath, model: FlowMap, dataset: Dataset, settings: StatisticsConfig) -> FilePath:
    """FOLDER/statistics/KEY.json; the key stands for everything that the estimate depends on."""
    estimate = ("points", "samples", "probes", "centred", "seed")
    classes = {} if settings.classes == "pooled" else {"classes": settings.classes}
    wanted = (
        {name: getattr(settings, name) for name in estimate}
        | classes
        | {
            "version": _VERSION,
            "model": fingerprint(model),
            "settings": None if model.config is None else to_json(model.config),
            "path": to_json(model.path),
            "data": dataset.fingerprint,
        }
    )
    key = hashlib.blake2b(json.dumps(wanted, sort_keys=True).encode(), digest_size=8).hexdigest()
    return folder / "statistics" / f"{key}.json"


def kept_statistics(
    folder: FilePath,
    model: FlowMap,
    dataset: Dataset,
    settings: StatisticsConfig,
    group: ProcessGroup = ProcessGroup(),
    quiet: bool = True,
) -> TrajectoryStatistics:
    """The statistics kept in the model's folder, or estimated now and kept there.

    An estimate of one process that was interrupted goes on where it was saved last. Raises CheckpointError when the
    folder cannot be written or what it keeps is damaged, ConfigError when the model's denoiser is not finite.
    """
    file = cache_file(folder, model, dataset, settings)
    refuse_links(folder, file.parent.name)
    if group.all_have(file, next(model.parameters()).device):
        return prepared(_read(file), settings, dataset)
    partial = file.with_suffix(".partial.safetensors")
    found = estimate_together(model, dataset, settings, group, partial if group.count == 1 else None, quiet)
    if group.index == 0:
        found.save(file)
        partial.unlink(missing_ok=True)
    return prepared(found, settings, dataset)


def first_statistics(
    config: RunConfig,
    dataset: Dataset,
    run: RunFolder,
    teacher: FlowMap | None,
    device: torch.device,
    group: ProcessGroup,
    quiet: bool,
) -> TrajectoryStatistics | None:
    """What a run with an analytic preconditioning starts from: the statistics of its last checkpoint, else of its own
    untrained network where they are to be refreshed, else of its teacher. None for any other run.
    """
    if not config.model.preconditioning.needs_statistics or (teacher is None and not config.statistics.refresh_images):
        return None
    if config.statistics.refresh_images and run.checkpoints():
        newest = run.last_checkpoint()
        with run.with_way_back(newest):
            return read_flow_map_config(newest).preconditioning.known_statistics()
    first = untrained(config, dataset, teacher)
    folder = folder_beside(config.teacher, run)
    if teacher is None or config.statistics.refresh_images:
        teacher = first.to(device)
    elif os.access(folder, os.W_OK) or cache_file(folder, teacher, dataset, config.statistics).is_file():
        return kept_statistics(folder, teacher, dataset, config.statistics, group, quiet)
    # A teacher that cannot be written to has no place to keep them.
    found = estimate_together(teacher, dataset, config.statistics, group, quiet=quiet)
    return prepared(found, config.statistics, dataset)


def folder_beside(teacher: str, run: RunFolder) -> FilePath:
    """Where what is measured of a teacher is kept: its own folder; the run's for a teacher that is not fewstep's."""
    folder = FilePath(teacher)
    return run.root if not (folder / CONFIG_FILE).is_file() or is_diffusers(folder) else folder


def _read(file: FilePath) -> TrajectoryStatistics:
    try:
        return TrajectoryStatistics.load(file)
    except FewstepError as error:
        raise CheckpointError(f"{file} is damaged ({error}): delete it to estimate anew") from error


def _resume(estimator: StatisticsEstimator, partial: FilePath) -> float:
    """Take up a saved state; returns the seconds behind it, 0 where there is none that fits."""
    if not partial.is_file():
        return 0.0
    try:
        state = read_weights(partial)
        seconds = float(state["seconds"])
        estimator.restore(state)
    except (FewstepError, KeyError):
        return 0.0
    return seconds
