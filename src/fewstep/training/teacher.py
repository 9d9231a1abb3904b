"""Models that a run starts from or distils: found and checked; and the slow average beside the run."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import cast

from fewstep.data.base import Dataset
from fewstep.data.demonstrations.normaliser import PolicySpec
from fewstep.flow.flow_map import FlowMap
from fewstep.networks.base import Network
from fewstep.recipes.config import RunConfig
from fewstep.teachers import TeacherModel, is_diffusers, is_edm, load_diffusers, load_edm, own_teacher
from fewstep.training.ema import EMA
from fewstep.training.run_folder import RunFolder, load
from fewstep.utils.errors import CheckpointError, ConfigError, HubError
from fewstep.utils.hub import local_copy
from fewstep.utils.parts import import_file
from fewstep.utils.weights import digest


def teacher_of(config: RunConfig, dataset: Dataset) -> FlowMap | None:
    """The run's teacher without gradients, or None.

    Raises ConfigError when one is needed and not named, or made for other data; CheckpointError when it cannot be read.
    """
    if not config.teacher:
        if config.objective.needs_teacher or config.initial == "teacher":
            raise ConfigError(f"recipe {config.recipe} distils a teacher: name its run with --teacher RUN")
        return None
    with advising("teacher", "--teacher"):
        teacher, policy = find_teacher(config.teacher, dataset.shape)
    if teacher.sample_shape != dataset.shape or teacher.num_classes != dataset.num_classes:
        hint = ": --data.no-labels leaves them out" if not teacher.num_classes else ""
        hint = ": --data.labels takes those that the data have" if not config.data.labels else hint
        raise ConfigError(
            f"the teacher {config.teacher} makes samples of shape {teacher.sample_shape} in {teacher.num_classes} "
            f"classes, but the data {dataset.name} has shape {dataset.shape} and {dataset.num_classes} classes"
            + (hint if teacher.sample_shape == dataset.shape else "")
        )
    if teacher.preconditioning.data_end_only:
        raise ConfigError(f"the teacher {config.teacher} has cm preconditioning, and so no velocity: name another")
    check_policy(config.teacher, policy, dataset.policy)
    return teacher


def load_teacher(name: Path | str, shape: tuple[int, ...] = ()) -> FlowMap:
    """A model as a denoiser on its own path, a flow map that jumps by DDIM's steps; without gradients.

    name: a run's or saved model's folder, a folder of diffusers, a network pickle of EDM or EDM2, OWNER/NAME of one of
    these folders on the Hugging Face Hub, or FILE.py:NAME, whose file is imported: a `TeacherModel`, or a function that
    returns one or a flow map.
    shape: of its samples (C, H, W), for those whose files do not say it.
    Raises CheckpointError for files that are missing, damaged or do not fit (HubError where the Hub does not give
    them), ConfigError for kinds that are not known.
    """
    if ".py:" in str(name):
        file, _, own = str(name).rpartition(":")
        import_file(file)
        name = f"{Path(file).name}:{own}"
    return find_teacher(str(name), shape)[0]


def find_teacher(name: str, shape: tuple[int, ...] = ()) -> tuple[FlowMap, PolicySpec | None]:
    """The teacher in a folder, a network pickle, or of an imported file, without gradients; what it acts on.

    shape: of its samples, for those whose files do not say it.

    Raises CheckpointError when the folder cannot be read or had, ConfigError when the class is not there or not named.
    """
    if ".py:" in name:
        return own_teacher(name).requires_grad_(False), None
    if name.endswith(".py") and Path(name).is_file():
        raise ConfigError(f"the teacher {name} is a file: name its class or function too, {name}:NAME")
    place = local_copy(name)
    if is_diffusers(place):
        return load_diffusers(place, shape).requires_grad_(False), None
    if is_edm(place):
        return load_edm(place).requires_grad_(False), None
    named = load(place)
    return named.flow_map.requires_grad_(False), named.config.policy


def teacher_place(name: str) -> str:
    """Where a teacher's weights lie, in full: of a run its newest checkpoint."""
    place = Path(name).expanduser()
    run = RunFolder(place)
    if place.is_dir() and run.checkpoints() and not is_diffusers(place):
        place = run.last_checkpoint()
    return str(place.resolve()) if place.exists() else name


def check_policy(name: str, teacher: PolicySpec | None, data: PolicySpec | None) -> None:
    """Raise ConfigError unless neither is of a policy, or both of policies that see and move the same numbers."""
    if teacher is None and data is None:
        return
    if teacher is None or data is None:
        raise ConfigError(
            f"the teacher {name} is {'no' if teacher is None else 'a'} policy, unlike the data: name another"
        )
    if teacher.from_zero:
        raise ConfigError(f"the teacher {name} is a regression, which has no velocity to distil: train flow matching")
    same = {
        "chunks": teacher.chunks == data.chunks,
        "observations": teacher.observations == data.observations,
        "actions": teacher.actions == data.actions,
    }
    other = [part for part, fits in same.items() if not fits]
    if other:
        raise ConfigError(
            f"the teacher {name} was trained with other {', '.join(other)} (windows, or what normalises them): train "
            "both on the same demonstrations with the same --data.chunks"
        )


@contextmanager
def advising(role: str, option: str) -> Iterator[None]:
    """What cannot be read is said with what to do."""
    try:
        yield
    except HubError:
        raise
    except CheckpointError as error:
        raise CheckpointError(
            f"the {role} cannot be read: {error}; train it first, or name another with {option}"
        ) from error


def start_from(config: RunConfig, flow_map: FlowMap, teacher: FlowMap | None) -> None:
    """Copy the initial weights that the run names.

    Raises CheckpointError when they cannot be read or are of another architecture.
    """
    if not config.initial:
        return
    from_teacher = config.initial == "teacher"
    if from_teacher:
        assert teacher is not None  # teacher_of has seen to it
        source = teacher
    else:
        with advising("model to start from", "--initial"):
            source = load(config.initial).flow_map
    name = config.teacher if from_teacher else config.initial
    if isinstance(source.network, TeacherModel):
        raise ConfigError(
            f"{name} has no weights for a network of fewstep: --initial= lets the student start from its own"
        )
    try:
        cast(Network, flow_map.network).take(cast(Network, source.network), name)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; give the run the network of the model that it starts from") from error


def fingerprint(flow_map: FlowMap) -> str:
    """Sixteen hex digits that change with any weight."""
    return digest(flow_map.network.state_dict())


class SlowAverage:
    """A constant-decay average of a flow map's weights, as a flow map that takes no gradient.

    mu at every step from the first: the initial weights are a teacher's or an earlier average, worth remembering.
    """

    def __init__(self, flow_map: FlowMap, decay: float) -> None:
        frozen = {id(value): value for value in flow_map.parameters() if not value.requires_grad}  # need no second copy
        self.flow_map = copy.deepcopy(flow_map, dict(frozen)).requires_grad_(False).eval()
        self.decay = decay

    @cached_property
    def ema(self) -> EMA:
        """The average, in the flow map's own tensors as they are when it is first asked for."""
        return EMA(f"target-{self.decay!r}", self.flow_map.network, self.decay, None, ramp=False, in_place=True)
