"""Students and their teachers: how well a student follows its teacher, what its preconditioning costs to compute."""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.data.base import Dataset
from fewstep.data.draws import even_draw
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.evaluation.metrics.alignment import AlignmentSettings, alignment, trajectory_alignment
from fewstep.evaluation.metrics.features import default_extractor
from fewstep.evaluation.report.statistics import statistics_figure
from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import TrainingGuidance
from fewstep.flow.paths import EDM
from fewstep.flow.paths import Path as TimePath
from fewstep.flow.preconditioning.analytic import AnalyticPreconditioningConfig
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.flow.times import default_grid, edm_grid
from fewstep.networks.condition import Condition
from fewstep.objectives.distillation import teacher_denoiser
from fewstep.recipes import RECIPES, recipe
from fewstep.recipes.config import RunConfig, StatisticsConfig
from fewstep.sampling.generate import STREAM_PRIOR
from fewstep.teachers import Teacher
from fewstep.training.loop import Trainer
from fewstep.training.parallel import ProcessGroup, join_processes
from fewstep.training.peers import watching
from fewstep.training.run_folder import RunFolder
from fewstep.training.settings import Callbacks, Runtime
from fewstep.training.statistics import cache_file, kept_statistics, prepared
from fewstep.training.teacher import find_teacher, fingerprint
from fewstep.utils.device import best_device
from fewstep.utils.errors import CheckpointError, ConfigError, FewstepError, NotImportedError
from fewstep.utils.files import check_numbers, parse_json, reading, write_atomically
from fewstep.utils.random import Draws
from fewstep.utils.text import quoted

Record = dict[str, Any]
ALIGNMENT_FILE = "alignment.json"
SAMPLES = 512
STEPS = (1, 2, 4)
_PLACES = (0, 5, 9, 11, 17)


def with_labels(data: DataConfig, dataset: Dataset) -> Dataset:
    """The same samples with the classes that an unconditional run leaves out: what its classifier is trained on."""
    return dataset if data.labels else load_dataset(replace(data, labels=True))


def perceptual_features(config: RunConfig, dataset: Dataset, cache: Path | None) -> Callable[[Tensor], Tensor] | None:
    """The features that the run's objective compares, of the data set's own classifier; None when it compares none."""
    if not config.objective.measures_features:
        return None
    return default_extractor(with_labels(config.data, dataset), cache=cache).perceive


def teacher_name(config: RunConfig) -> str:
    """The recipe of the run's teacher, or the name of its folder where that is no run."""
    try:
        return RunFolder(Path(config.teacher)).config().recipe
    except FewstepError:
        return Path(config.teacher).name


def teacher_of_run(run: RunFolder, place: Path | None = None) -> FlowMap:
    """The model that the run was distilled from, in `place` or where it lay in training.

    Raises CheckpointError when it is missing or has other weights.
    """
    folder = run.config().teacher if place is None else str(place)
    teacher, _ = find_teacher(folder, tuple(run.data("shape")["shape"]))
    if run.record().get("teacher") not in (None, fingerprint(teacher)):
        raise CheckpointError(f"{folder} has other weights than the teacher of {run.root} had")
    return teacher


@dataclass(frozen=True)
class GuidedTeacher:
    """A teacher at the strength of guidance that its student has distilled in."""

    teacher: FlowMap
    guidance: TrainingGuidance

    @property
    def path(self) -> TimePath:
        """The teacher's own; the guidance's interval is of its range."""
        return self.teacher.path

    def denoise(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """D_null + omega (D - D_null), (B, ...)."""
        drawn = self.guidance.draw(Draws(0, 0, torch.arange(len(x), device=x.device)))
        return teacher_denoiser(self.path, self.teacher)(x, t, replace(cond, guidance=drawn))


def guided_teacher(config: RunConfig, teacher: FlowMap) -> Teacher:
    """What the run's student should follow: its teacher, guided where the strength is distilled in."""
    guidance, distils = config.objective.guidance, config.objective.needs_teacher
    fixed = distils and guidance.active and not guidance.conditions_network
    return GuidedTeacher(teacher, guidance) if fixed else teacher


def alignment_times(path: TimePath) -> Tensor:
    """Times from t_max to t_min, float64: on the EDM path 80, 12.9, 1.9, 0.59 and 0.002.

    Elsewhere the path's own ends and the same noise levels between them, as far as the path has them. Points of the
    grid of 18 levels that teachers walk on (fewstep.objectives.TeacherSteps).
    """
    times = path.time_from_tau(edm_grid(EDM(), 17)[list(_PLACES)]).clamp(path.t_min, path.t_max)
    times[0], times[-1] = path.t_max, path.t_min
    falling: Tensor = torch.unique(times).flip(0)
    return falling


def measure_alignment(
    run: RunFolder, dataset: Dataset, method: str, place: Path | None = None, samples: int = SAMPLES
) -> Record:
    """Errors of the run's jumps, and of its samples in 1, 2 and 4 steps at each stop, against its teacher's ODE.

    On at most `samples` held-out samples, drawn over all of them, under their labels and prompts. Of a student that
    learns jumps to the data end alone, those alone, and samples in 1 step. place: of the teacher, as in
    `teacher_of_run`. Returns {"teacher", "jumps": Alignment.row(), "trajectories": [TrajectoryAlignment.row()]}.
    """
    config, device = run.config(), best_device()
    student = run.pipeline().flow_map.to(device)
    teacher = guided_teacher(config, teacher_of_run(run, place).to(device))
    x0, cond = dataset.heldout.conditioned(even_draw(dataset.heldout, samples, config.evaluation.seed))
    cond = cond.to(device)
    times, seed = alignment_times(student.path), config.evaluation.seed
    ends_only = config.objective.endpoint_only
    settings = AlignmentSettings(seed=seed, ends_only=ends_only)
    jumps = alignment(student, teacher, x0.to(device), times, method=method, cond=cond, settings=settings)
    eps = Draws(seed, 0, torch.arange(len(x0), device=device)).normal(STREAM_PRIOR, student.sample_shape)
    grids = [default_grid(student.path, steps) for steps in (STEPS[:1] if ends_only else STEPS)]
    walks = trajectory_alignment(student, teacher, eps, grids, method=method, cond=cond)
    return {"teacher": teacher_name(config), "jumps": jumps.row(), "trajectories": [each.row() for each in walks]}


def align(run: RunFolder, dataset: Dataset, method: str, folder: Path, teacher: Path | None = None) -> str:
    """Measure the run's alignment with its teacher, store it in alignment.json of a folder, and say it in one line.

    method: the run, as figures name it. A teacher that is no longer where it lay is no error, only said; one that is
    given and does not fit is.
    """
    try:
        record = measure_alignment(run, dataset, method, teacher)
    except CheckpointError as error:
        if teacher is not None:
            raise
        return f"Alignment not measured, give the run's teacher with --teacher: {error}"
    except NotImportedError as error:
        return f"Alignment not measured: {error}"
    write_atomically(folder / ALIGNMENT_FILE, json.dumps(record, indent=2) + "\n")
    return alignment_line(record)


def read_alignment(folder: Path) -> tuple[Record, ...]:
    """What is stored in a folder, if it was measured; raises CheckpointError when the file is damaged."""
    file = folder / ALIGNMENT_FILE
    if not file.is_file():
        return ()
    with reading(file, f"delete it, and run fewstep evaluate {quoted(folder)} anew"):
        record = parse_json(file.read_bytes())
        found = {key: record[key] for key in ("teacher", "jumps", "trajectories")}
        _check_record(**found)
    return (found,)


def _check_record(teacher: Any, jumps: Any, trajectories: Any) -> None:
    """Raise what `reading` turns into one line for a stored record that is none."""
    check_numbers([jumps, trajectories])
    count = len(jumps["times"])
    if count < 2 or [len(row) for row in jumps["rmse"]] != [count] * count:
        raise ValueError(f"its matrix of errors does not fit its {count} times")
    names = [teacher, jumps["method"], *(walk["method"] for walk in trajectories)]
    numbers = [*jumps["times"], jumps["samples"], *(each for row in jumps["rmse"] for each in row if each is not None)]
    for walk in trajectories:
        numbers += [walk["steps"], walk["rmse"], walk["stderr"]]
        if "stops" in walk:
            stops = zip(walk["times"][1:], walk["stops"], walk["stops_stderr"], strict=True)
            numbers += [each for stop in stops for each in stop]
    if not all(isinstance(each, int | float) for each in numbers) or not all(isinstance(each, str) for each in names):
        raise ValueError("a name, an error or a time is none")


def alignment_line(record: Record) -> str:
    """The samples' errors and the worst jump, in one line."""
    jumps, times = record["jumps"], record["jumps"]["times"]
    worst, t, s = max(
        (value, times[i], times[j])
        for i, row in enumerate(jumps["rmse"])
        for j, value in enumerate(row)
        if value is not None
    )
    walks = ", ".join(f"{each['rmse']:.3g} in {each['steps']}" for each in record["trajectories"])
    plural = "step" if walks.endswith(" in 1") else "steps"
    return (
        f"Alignment with {record['teacher']}, RMS error per element over {jumps['samples']} samples: "
        f"{walks} {plural}; its worst jump {worst:.3g} ({t:.3g} to {s:.3g})"
    )


def measure_statistics(
    run: RunFolder, dataset: Dataset, given: Mapping[str, Any], student: str, cache: Path | None, cpu: bool
) -> str:
    """What `fewstep statistics` does: estimate, time the student's training, draw; returns what there is to say.

    student: a recipe's name, or nothing for the CTM recipe of this teacher's. given: settings of the statistics that
    are not to be the student's. Several processes (torchrun) share the samples; the first of them speaks and draws, and
    no training is timed. Raises what its parts raise.
    """
    config = run.config()
    run.last_checkpoint()
    chosen = student_recipe(config, student)
    settings = replace(StatisticsConfig() if chosen is None else chosen.statistics, **given)
    accelerator = join_processes(cpu)
    with watching(accelerator, lambda: "nothing of the estimate is kept: start the same command again"):
        file, origin = teacher_statistics(run, settings, dataset, accelerator)
    if not accelerator.is_main_process:
        return ""
    found, share = TrajectoryStatistics.load(file), ""
    if chosen is not None and accelerator.num_processes == 1:
        steps, seconds = training_cost(chosen, run, settings, dataset, cache, cpu)
        part = 100 * found.seconds / (steps * seconds)
        share = f" = {part:.2g} % of training {chosen.recipe} ({steps:,} steps of {seconds:.2g} s)"
    drawn = file.with_suffix(".png")
    write_atomically(drawn, statistics_figure(found, prepared(found, settings, dataset)))
    return (
        f"{len(found.lam)} noise levels, {found.samples} samples each: {found.seconds:.3g} s{share}\n"
        f"Statistics: {file}, {origin}\nFigure: {drawn}"
    )


def teacher_statistics(
    run: RunFolder, settings: StatisticsConfig, dataset: Dataset, accelerator: Accelerator
) -> tuple[Path, str]:
    """The file of the statistics of a trained run on its own data, and how they came to be there.

    They are estimated with a progress bar unless they are kept already. Raises what `kept_statistics` raises, and
    CheckpointError when the folder is no trained run.
    """
    group, teacher = ProcessGroup.of(accelerator), run.pipeline().flow_map.requires_grad_(False).to(accelerator.device)
    file = cache_file(run.root, teacher, dataset, settings)
    was_kept = file.is_file()
    kept_statistics(run.root, teacher, dataset, settings, group, quiet=was_kept or group.count > 1)
    accelerator.wait_for_everyone()
    return file, "kept from an earlier estimate, as its seconds are" if was_kept else "estimated now"


def student_recipe(teacher: RunConfig, name: str = "") -> RunConfig | None:
    """The recipe of that name, or the CTM recipe that distils the teacher's recipe, or None.

    Raises ConfigError for a recipe that is unknown or distils no teacher.
    """
    if name:
        config = recipe(name)
        if not config.objective.needs_teacher:
            students = ", ".join(each for each in RECIPES if recipe(each).objective.needs_teacher)
            raise ConfigError(f"recipe {name!r} distils no teacher; students: {students}")
        return config
    found = (recipe(each) for each in RECIPES if each.startswith("ctm-"))
    return next((each for each in found if each.teacher == f"runs/{teacher.recipe}"), None)


def training_cost(
    student: RunConfig, teacher: RunFolder, settings: StatisticsConfig, dataset: Dataset, cache: Path | None, cpu: bool
) -> tuple[int, float]:
    """Steps of the student's training, and seconds of one here: the median of three after one to warm up.

    It distils this teacher, on the teacher's data, with the preconditioning that the statistics are for where it has a
    skip. Where it starts from the teacher's weights it has its network.
    """
    own = teacher.config()
    skips = student.model.preconditioning.covariance is not None
    model = replace(student.model, preconditioning=AnalyticPreconditioningConfig()) if skips else student.model
    network = own.network if student.initial == "teacher" else student.network
    student = replace(
        student, teacher=str(teacher.root), data=own.data, model=model, network=network, statistics=settings
    )
    with tempfile.TemporaryDirectory() as folder:
        callbacks = Callbacks(features=perceptual_features(student, dataset, cache))
        run, runtime = RunFolder(Path(folder)), Runtime(cpu=cpu, quiet=True)
        with Trainer(student, dataset, run, runtime, callbacks) as trainer:
            trainer.learner.flow_map.train()
            seconds = []
            for _ in range(4):
                start = time.perf_counter()
                trainer.take_step()
                seconds.append(time.perf_counter() - start)
    return math.ceil(student.training.images / student.training.batch_size), statistics.median(seconds[1:])
