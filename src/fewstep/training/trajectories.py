"""A teacher's trajectories from noised data on, and what a skip regresses on them, which is kept beside the teacher."""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path as FilePath

import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.data.base import Dataset
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.ode import ddim
from fewstep.flow.paths import Path
from fewstep.flow.preconditioning.covariance import Covariance, CovarianceSettings
from fewstep.flow.preconditioning.estimation import STREAM_NOISE, noise_grid
from fewstep.flow.preconditioning.regression import Measured, Regression, RegressionSettings
from fewstep.flow.preconditioning.tangents import PlainDenoiser
from fewstep.flow.preconditioning.trajectory_moments import TrajectoryMoments
from fewstep.recipes.config import RunConfig
from fewstep.sampling.pipeline import read_flow_map_config
from fewstep.training.covariance import kept_measure
from fewstep.training.parallel import ProcessGroup
from fewstep.training.run_folder import RunFolder
from fewstep.training.setup import untrained
from fewstep.training.statistics import ConditionedDenoiser, folder_beside
from fewstep.training.teacher import fingerprint
from fewstep.utils.errors import CheckpointError, ConfigError, FewstepError
from fewstep.utils.files import read_record, refuse_links, write_atomically
from fewstep.utils.random import Draws
from fewstep.utils.serialization import from_json, to_json

_VERSION = 1  # raise with any change to the estimate
_BATCH, _NUMBERS = 256, 2**21
EVALUATIONS = 2
"""Of the teacher for each level of a trajectory."""


def run_measures(
    config: RunConfig,
    dataset: Dataset,
    run: RunFolder,
    teacher: FlowMap | None,
    group: ProcessGroup = ProcessGroup(),
    quiet: bool = True,
) -> Measured | None:
    """What a run's skip is made of: its last checkpoint's, else measured now; None where it has no skip.

    Raises ConfigError as `kept_measure` and `build` do, and where there is no teacher to regress on.
    """
    settings, wanted = config.model.preconditioning.covariance, config.model.preconditioning.regression
    if settings is None:
        return None
    if run.checkpoints():
        newest = run.last_checkpoint()
        with run.with_way_back(newest):
            return read_flow_map_config(newest).preconditioning.known_measures()
    if wanted is not None and teacher is None:
        raise ConfigError(
            "a regressed skip is made of a teacher's trajectories: name one with --teacher, or set "
            "--model.preconditioning.family covariance"
        )
    if wanted is not None:
        untrained(config, dataset, teacher)
    flip = config.training.flip and dataset.train.has_mirrors  # else refused later, by name
    covariance = kept_measure(dataset, settings, flip, quiet)
    if wanted is None or teacher is None:
        return Measured(covariance)
    folder = folder_beside(config.teacher, run)
    file = _cache_file(folder, teacher, dataset, settings, wanted, flip)
    place = file if file.is_file() or os.access(folder, os.W_OK) else None
    return Measured(covariance, kept_regression(place, teacher, dataset, covariance, wanted, group, quiet))


def kept_regression(
    file: FilePath | None,
    teacher: FlowMap,
    dataset: Dataset,
    covariance: Covariance,
    settings: RegressionSettings,
    group: ProcessGroup = ProcessGroup(),
    quiet: bool = True,
) -> Regression:
    """The regression that a file keeps, or made now and kept there; its cost is printed. None keeps nothing.

    Raises CheckpointError when the file is damaged or cannot be written, ConfigError for a denoiser that is not finite.
    """
    if group.all_have(file, next(teacher.parameters()).device) and file is not None:
        return _read(file)
    found = regress(teacher, dataset, covariance, settings, group, quiet)
    if not quiet:
        calls = settings.trajectories * settings.levels * EVALUATIONS
        print(f"skip: {settings.trajectories:,} trajectories of the teacher, {calls:,} calls, {found.seconds:.0f} s")
    if file is not None and group.index == 0:
        refuse_links(file.parent.parent, file.parent.name)
        write_atomically(file, json.dumps(to_json(found)) + "\n")
    return found


def regress(
    teacher: FlowMap,
    dataset: Dataset,
    covariance: Covariance,
    settings: RegressionSettings,
    group: ProcessGroup = ProcessGroup(),
    quiet: bool = True,
) -> Regression:
    """What the teacher's trajectories say along the covariance's directions, each process taking its share of them."""
    begin, lam = time.perf_counter(), noise_grid(teacher.path, settings.levels)
    moments = TrajectoryMoments(lam, covariance)
    for states, denoised, labels in trajectories(teacher, dataset, lam, settings, group, quiet):
        moments.update(states, denoised, labels)
    device = next(teacher.parameters()).device
    moments.sums = {name: group.total(value.to(device)).cpu() for name, value in moments.sums.items()}
    return moments.regression(settings, time.perf_counter() - begin)


@torch.no_grad()
def trajectories(
    teacher: FlowMap,
    dataset: Dataset,
    lam: Tensor,
    settings: RegressionSettings,
    group: ProcessGroup = ProcessGroup(),
    quiet: bool = True,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(states (K, B, ...), the denoiser at them, labels) in portions: from noised training samples at the first level.

    On the EDM path, whatever the teacher's own. One step of Heun's method between two levels, which has the denoiser at
    both; a sample keeps its condition.
    """
    model, path = ConditionedDenoiser(teacher, dataset, settings.seed), teacher.path
    times = path.time_from_tau(torch.exp(-lam)).clamp(path.t_min, path.t_max).to(model.device)
    batch = max(1, min(_BATCH, _NUMBERS // (math.prod(dataset.shape) * len(lam))))
    starts = range(group.index * batch, settings.trajectories, group.count * batch)
    for first in tqdm(starts, desc="trajectories of the teacher", unit_scale=batch, disable=quiet, leave=False):
        numbers = torch.arange(first, min(first + batch, settings.trajectories), device=model.device)
        x0 = model.fetch(numbers)
        eps = Draws(settings.seed, 0, numbers).normal(STREAM_NOISE, tuple(x0.shape[1:]), x0.dtype)
        states, denoised = _walk(model, path, path.interpolate(x0, eps, times[:1].expand(len(x0))), times)
        alpha = path.values(times).alpha.reshape(-1, *[1] * x0.ndim).to(x0.dtype)
        yield states / alpha, denoised, model.cond.labels


def _walk(denoise: PlainDenoiser, path: Path, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """(states, the denoiser at them), (K, B, ...) each, at falling times (K,), by Heun's method (flow/ode.py)."""
    states, denoised, tau = [x], [denoise(x, times[0].expand(len(x)))], path.tau(times)
    for i in range(len(times) - 1):
        t, s = (time.expand(len(x)) for time in times[i : i + 2])
        here = denoised[-1]
        there = denoise(ddim(path, x, here, t, s), s)
        x = ddim(path, x, here + float(tau[i] / tau[i + 1] / 2) * (there - here), t, s)
        states.append(x)
        denoised.append(denoise(x, s))
    return torch.stack(states), torch.stack(denoised)


def _cache_file(
    folder: FilePath, teacher: FlowMap, dataset: Dataset, covariance: CovarianceSettings, settings: RegressionSettings,
    flip: bool,
) -> FilePath:  # fmt: skip
    """FOLDER/statistics/skip-KEY.json; the key stands for everything that the regression depends on."""
    wanted = {
        "version": _VERSION,
        "covariance": to_json(covariance),
        "regression": to_json(settings),
        "model": fingerprint(teacher),
        "settings": None if teacher.config is None else to_json(teacher.config),
        "data": dataset.fingerprint,
    } | ({"flip": True} if flip else {})
    key = hashlib.blake2b(json.dumps(wanted, sort_keys=True).encode(), digest_size=8).hexdigest()
    return folder / "statistics" / f"skip-{key}.json"


def _read(file: FilePath) -> Regression:
    record = read_record(file, "delete it to make it anew")
    try:
        return from_json(Regression, record, str(file))
    except FewstepError as error:
        raise CheckpointError(f"{file} is damaged ({error}): delete it to make it anew") from error
