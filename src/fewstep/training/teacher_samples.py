"""A teacher's own samples as training data: drawn once, by seed, in shards that a stopped draw goes on from."""

import hashlib
import json
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from fewstep.data.base import source_path
from fewstep.data.drawn_prompts import PROMPTS_FILE, EmbeddedPrompts, embed, list_prompts
from fewstep.data.generated import DrawSettings, GeneratedSet, read_set, shard_of, write_set, write_shard
from fewstep.data.latents.autoencoders import LatentSpec, load_autoencoder
from fewstep.data.latents.prompts import find_encoders
from fewstep.data.latents.shards import fingerprint as file_fingerprint
from fewstep.data.sources import DataConfig, placed_in
from fewstep.flow.flow_map import FlowMap
from fewstep.networks.base import Network
from fewstep.recipes.config import RunConfig
from fewstep.sampling.generate import SamplingSettings, generate
from fewstep.sampling.pipeline import PipelineConfig
from fewstep.teachers import is_diffusers, is_edm
from fewstep.teachers.text import TextEncoders, TextSpec, check_prompt_widths, has_text_encoders, load_text_encoders
from fewstep.training.parallel import join_processes
from fewstep.training.peers import watching
from fewstep.training.run_folder import RunFolder, load
from fewstep.training.teacher import advising, find_teacher, fingerprint
from fewstep.utils.errors import CheckpointError, ConfigError, DataError, FewstepWarning
from fewstep.utils.files import Lock
from fewstep.utils.hub import local_copy
from fewstep.utils.random import Draws
from fewstep.utils.serialization import to_json
from fewstep.utils.text import quoted

SHARD = 1024
_IMAGE_CHANNELS = (1, 3)
_STREAM_CLASSES = 54


def run_data(config: RunConfig, run: RunFolder, cpu: bool = False, quiet: bool = False) -> DataConfig:
    """The run's data with their place; those that its teacher gives are drawn first, unless they are there.

    Raises ConfigError where there is no teacher, or one that cannot be sampled so, DataError for a folder that holds
    other samples, CheckpointError for a run on other data.
    """
    settings, data = config.data.source.of_teacher, placed_in(run.root, config.data)
    if settings is None:
        return data
    if not config.teacher:
        raise ConfigError("the data are a teacher's samples, and there is no teacher: name it with --teacher")
    if run.config_file.exists() and run.config().data.source != config.data.source:
        raise CheckpointError(f"{run.root} holds a run on other data: give another folder with --out")
    with advising("teacher", "--teacher"):
        teacher, made = sampled(config.teacher)
    classes = teacher.num_classes
    if settings.shares and len(settings.shares) != classes:
        raise ConfigError(f"{len(settings.shares)} shares for {classes} classes of {config.teacher}: give one for each")
    folder = Path(data.root)
    there = read_set(folder)
    wanted = GeneratedSet(
        config.teacher,
        fingerprint(teacher),
        settings,
        data.seed,
        teacher.sample_shape,
        made.class_names,
        made.latents,
        captions=asked_for(config.teacher, teacher, settings, data.seed, there),
    )
    if there is None:
        accelerator = join_processes(cpu)
        encoders = None
        if wanted.captions and accelerator.is_main_process:
            encoders = text_encoders(config.teacher, teacher, made.text, accelerator.device)
        with watching(accelerator, lambda: f"the samples in {folder} are kept: the same command goes on"):
            draw_set(folder, teacher, wanted, made.data_range, accelerator, quiet, encoders)
    elif others := there.differs(wanted):
        raise DataError(
            f"{folder} holds other samples (another {', '.join(others)}): give another folder with --data.root, or "
            "another run with --out"
        )
    return data


def sampled(name: str) -> tuple[FlowMap, PipelineConfig]:
    """A teacher, and what its samples are: classes, range and latents, as far as its files say.

    Raises ConfigError for a policy, for one without a velocity, or of other samples than (C, H, W).
    """
    teacher, policy = find_teacher(name)
    if policy is not None:
        raise ConfigError(f"the teacher {name} is a policy, which acts on what it sees: train on demonstrations")
    if teacher.preconditioning.data_end_only:
        raise ConfigError(f"the teacher {name} has cm preconditioning, and so no velocity: name another")
    if len(teacher.sample_shape) != 3:
        raise ConfigError(
            f"the teacher {name} makes samples of shape {teacher.sample_shape}: a set of them has (C, H, W)"
        )
    classes = tuple(map(str, range(teacher.num_classes)))
    if ".py:" in name:
        return teacher, PipelineConfig(classes)
    place = local_copy(name)
    if is_diffusers(place) or is_edm(place):
        latents = latents_of(place / "vae", teacher.sample_shape)
        images = latents is None and teacher.sample_shape[0] in _IMAGE_CHANNELS
        return teacher, PipelineConfig(classes, (-1.0, 1.0) if images else None, latents=latents)
    return teacher, load(place).config


def latents_of(folder: Path, shape: tuple[int, ...]) -> LatentSpec | None:
    """How samples of that shape become images, by a pipeline's autoencoder in its units; None where it has none.

    One that cannot be read is said by a FewstepWarning: samples then stay latents.
    """
    if not folder.is_dir():
        return None
    try:
        found = load_autoencoder(folder, torch.device("cpu"))
    except CheckpointError as error:
        warnings.warn(f"samples stay latents, no images are made of them: {error}", FewstepWarning, stacklevel=4)
        return None
    sides = tuple(side * found.factor for side in shape[1:])
    std = tuple(1.0 / factor for factor in found.units.factor)
    return LatentSpec(found.identity, found.units.shift, std, 1.0, (found.image_channels, sides[0], sides[1]))


def asked_for(
    name: str, teacher: FlowMap, settings: DrawSettings, seed: int, there: GeneratedSet | None
) -> tuple[str, ...]:
    """The prompts that a teacher of text is asked for; where their list is gone, those of the set that is there.

    Raises ConfigError for a teacher of text without any, and for prompts of another; DataError as `list_prompts`.
    """
    widths = _prompt_widths(teacher)
    if widths == (0, 0) and settings.prompts:
        raise ConfigError(f"the teacher {name} takes no prompts: leave out --data.source.draw.prompts")
    if widths != (0, 0) and not settings.prompts:
        raise ConfigError(
            f"the teacher {name} takes prompts: list some, one a line, with --data.source.draw.prompts FILE.txt, or "
            f"encode images with captions (fewstep encode FOLDER --teacher {quoted(name)})"
        )
    if not settings.prompts:
        return ()
    if there is not None and not source_path(settings.prompts).exists():
        return there.captions
    return list_prompts(settings.prompts, seed)


def _prompt_widths(teacher: FlowMap) -> tuple[int, int]:
    return teacher.network.prompt_widths if isinstance(teacher.network, Network) else (0, 0)


def text_encoders(name: str, teacher: FlowMap, spec: TextSpec | None, device: torch.device) -> TextEncoders:
    """Those of the teacher's pipeline; spec: those that it was trained with, of a model of this library.

    Raises ConfigError where it has none, or they do not fit it, and what `load_text_encoders` raises.
    """
    if spec is not None:
        return find_encoders(spec, None, device)
    place = local_copy(name)
    if not has_text_encoders(place):
        raise ConfigError(f"the teacher {name} has no text encoders to embed prompts by: name its whole pipeline")
    found = load_text_encoders(place, device)
    check_prompt_widths(found.spec, _prompt_widths(teacher), f"the teacher {name}")
    return found


def draw_set(
    folder: Path,
    teacher: FlowMap,
    wanted: GeneratedSet,
    bounds: tuple[float, float] | None,
    accelerator: Accelerator,
    quiet: bool,
    encoders: TextEncoders | None = None,
) -> None:
    """Draw the set, each process its share of the shards; shards of an earlier, stopped draw are kept.

    encoders: of its captions, on the main process.
    """
    main, count = accelerator.is_main_process, wanted.settings.count
    lock = Lock(folder, f"{folder} is being filled by another process: wait for it") if main else None
    if encoders is not None:
        wanted = replace(wanted, text=encoders.spec, embedded=embed(wanted.captions, encoders, folder))
        del encoders
    accelerator.wait_for_everyone()
    prompts = EmbeddedPrompts(folder, wanted.captions) if wanted.captions else None
    key = key_of(wanted, bounds, "" if prompts is None else file_fingerprint(folder / PROMPTS_FILE))
    starts = list(range(0, count, SHARD))
    files = [folder / f"samples-{number:05d}.safetensors" for number in range(len(starts))]
    own = range(int(accelerator.process_index), len(starts), int(accelerator.num_processes))
    teacher = teacher.to(accelerator.device)
    hidden = quiet or not main
    try:
        for number in tqdm(own, desc="samples of the teacher", disable=hidden, leave=False):
            first, file = starts[number], files[number]
            if not holds(file, key):
                samples, labels = draw(teacher, wanted, first, min(SHARD, count - first), bounds, prompts)
                write_shard(file, samples, labels, key)
        accelerator.wait_for_everyone()
        if main:
            sizes = [min(SHARD, count - first) for first in starts]
            shards = tuple(shard_of(file, size) for file, size in zip(files, sizes, strict=True))
            write_set(folder, replace(wanted, shards=shards))
        accelerator.wait_for_everyone()
    finally:
        if lock is not None:
            lock.release()


def draw(
    teacher: FlowMap,
    wanted: GeneratedSet,
    first: int,
    count: int,
    bounds: tuple[float, float] | None,
    prompts: EmbeddedPrompts | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Samples first .. first + count - 1 of the set, (count, ...), cut to `bounds`, and their classes (count,)."""
    how = wanted.settings
    settings = SamplingSettings(
        sampler=how.solver, steps=how.steps, guidance_scale=how.guidance_scale, seed=wanted.seed, clip=False
    )
    labels = classes_of(how, wanted.seed, first, count) if how.shares else None
    drawn = generate(teacher, count, settings, labels, first, prompts=prompts)
    drawn.check_finite()
    return drawn.samples if bounds is None else drawn.samples.clamp(*bounds), drawn.labels


def classes_of(settings: DrawSettings, seed: int, first: int, count: int) -> Tensor:
    """Classes (count,) int64 of those samples, drawn in their shares."""
    ends = torch.tensor(settings.shares, dtype=torch.float64).cumsum(0)
    u = Draws(seed, 0, torch.arange(first, first + count)).uniform(_STREAM_CLASSES)
    return torch.searchsorted(ends, u * ends[-1], right=True)


def key_of(wanted: GeneratedSet, bounds: tuple[float, float] | None, prompts: str) -> str:
    """Sixteen hex digits that change with anything that decides the samples; prompts: the content of their file."""
    settings = replace(wanted.settings, prompts="")
    record = [to_json(replace(wanted, teacher="", settings=settings, text=None, embedded=prompts)), bounds]
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=8).hexdigest()


def holds(file: Path, key: str) -> bool:
    """Whether a shard of these samples is there, whole."""
    try:
        with safe_open(file, framework="pt") as stored:
            return bool((stored.metadata() or {}).get("key") == key)
    except Exception:  # whatever is wrong with it, it is drawn anew
        return False
