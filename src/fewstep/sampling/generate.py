"""Samples of a flow map: how they are drawn, and drawing them. Network evaluations (NFE) are counted, not assumed."""

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import ClassifierFreeGuidance, sampling_condition
from fewstep.flow.paths import Path
from fewstep.flow.times import GRIDS, check_grid
from fewstep.networks.base import Network
from fewstep.networks.condition import Prompts
from fewstep.sampling.images import to_uint8
from fewstep.sampling.samplers import Model, Sampler, sampler_of
from fewstep.sampling.step_times import Purpose, SamplerName, StepTimes
from fewstep.utils.errors import ShapeError
from fewstep.utils.random import Draws
from fewstep.utils.tensors import check_memory
from fewstep.utils.text import by, counted, listed

STREAM_PRIOR = 20
Spacing = Literal["auto", "uniform", "edm"]


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample. times overrides steps.

    spacing: uniform on the path's unit clock, or EDM's (rho = 7); auto takes the times tuned for the flow map where it
    has them for this sampler, guidance and number of steps, else what the path prefers: EDM's on its own, else uniform.

    guidance_scale: omega, on the unit times of interval. A network trained with drawn guidance takes it as an
    input; otherwise guidance_scale != 1 doubles the evaluations.

    clip: cut samples to the range of the data, where a pipeline knows it.
    """

    sampler: SamplerName = "map"
    steps: int = 2
    times: tuple[float, ...] = ()
    spacing: Spacing = "auto"
    gamma: float = 0.0
    guidance_scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    batch_size: int = 512
    clip: bool = True

    def grid(self, path: Path, known: tuple[StepTimes, ...] = ()) -> Tensor:
        """The times to walk, of those `known` for the flow map if any are meant.

        Raises ShapeError for fewer than one step or times that do not fall.
        """
        tuned = self.tuned(known)
        own = self.times if tuned is None else tuned.times
        if own:
            times = check_grid(path, torch.tensor(own, dtype=torch.float64))
            first, last, slack = float(times[0]), float(times[-1]), 1e-6 * path.t_max
            if abs(first - path.t_max) > slack or last - path.t_min > slack:
                raise ShapeError(
                    f"times end at {last:g}, from {first:g}: start at t_max = {path.t_max:g}, where noise lives, and "
                    f"end at t_min = {path.t_min:g}"
                )
            return times
        return GRIDS[self.spacing](path, self.steps)

    def tuned(self, known: tuple[StepTimes, ...]) -> StepTimes | None:
        """Those of the known times that these settings are sampled at; None where others are asked for."""
        everywhere = self.guidance_scale == 1.0 or self.interval == (0.0, 1.0)
        if self.times or self.spacing != "auto" or not everywhere:
            return None
        return next((each for each in known if each.purpose == self.purpose), None)

    @property
    def purpose(self) -> Purpose:
        """What step times are tuned for (StepTimes.purpose): gamma counts for its sampler only, whose 0 is the map."""
        gamma = self.gamma if self.sampler == "gamma" else 0.0
        return "map" if self.sampler == "gamma" and gamma == 0 else self.sampler, gamma, self.guidance_scale, self.steps

    def function(self) -> Sampler:
        """The sampler itself."""
        return sampler_of(self.sampler, self.gamma)


@dataclass(frozen=True)
class Generated:
    """Samples (n, ...) on the CPU, their labels, network evaluations per sample, and seconds of sampling.

    pixels: what makes bytes (n, C, H, W) of samples; without a pipeline black and white are their own extremes.
    """

    samples: Tensor
    labels: Tensor | None
    nfe: float
    seconds: float
    pixels: Callable[[Tensor], Tensor] = partial(to_uint8, data_range=None)

    def __repr__(self) -> str:
        calls = f"{counted(self.nfe, 'network call')} each"
        return f"Generated({len(self.samples)} samples of {by(self.samples.shape[1:])}, {calls}, {self.seconds:.2f} s)"

    def images(self) -> npt.NDArray[np.uint8]:
        """Bytes (n, H, W, C) as NumPy, latents decoded; raises ShapeError for samples that are no images."""
        found: npt.NDArray[np.uint8] = self.pixels(self.samples).permute(0, 2, 3, 1).cpu().numpy()
        return found

    def pil(self) -> list[Image.Image]:
        """The same for Pillow; raises ShapeError unless they have 1 or 3 channels."""
        images = self.images()
        if images.shape[-1] not in (1, 3):
            raise ShapeError(f"Pillow shows 1 or 3 channels, not {images.shape[-1]}")
        return [Image.fromarray(each[..., 0] if each.shape[-1] == 1 else each) for each in images]

    def check_finite(self) -> None:
        """Raise ShapeError where a value is NaN or infinite: such samples are nothing to look at."""
        broken = int((~self.samples.flatten(1).isfinite().all(1)).sum())
        if broken:
            raise ShapeError(
                f"the model gives values that are not finite in {broken} of {len(self.samples)} samples: take another "
                "checkpoint or its other weights, or weaker guidance"
            )


def prior_noise(flow_map: FlowMap, draws: Draws) -> Tensor:
    """x at t_max: sample k of a seed is the same whatever the batch; (n, *shape) float32."""
    return flow_map.path.prior(draws.normal(STREAM_PRIOR, flow_map.sample_shape))


class PromptSource(Protocol):
    """Embedded prompts by their numbers: Prompts, or what reads them as they are needed."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: Tensor) -> Prompts:
        """Those with these numbers, (n,) int64."""


class Timed(Protocol):
    """A flow map with the step times found for it, and what its samples are: a Pipeline."""

    @property
    def flow_map(self) -> FlowMap:
        """What is sampled."""

    @property
    def step_times(self) -> tuple[StepTimes, ...]:
        """Where, as far as times were tuned."""

    @property
    def prompts(self) -> Prompts | None:
        """What samples are drawn of where nothing else is asked for."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels."""

    @property
    def data_range(self) -> tuple[float, float] | None:
        """Of the data, where they have one."""

    def pixels(self, samples: Tensor) -> Tensor:
        """Samples (n, ...) as bytes (n, C, H, W)."""


Labels = Tensor | Sequence[int] | Sequence[str] | str


@torch.no_grad()
def generate(
    model: FlowMap | Timed,
    count: int,
    settings: SamplingSettings = SamplingSettings(),
    labels: Labels | None = None,
    first: int = 0,
    prompts: PromptSource | None = None,
    **changes: Any,
) -> Generated:
    """Draw samples first .. first + count - 1 of the seed in batches, on the model's device.

    model: a flow map, or a pipeline, which knows the step times found for it, the names of its classes and the range of
    its data. changes: to the settings, such as steps=1.
    labels: (count,) whole numbers, -1 for no class, default k mod num_classes; or names of classes, which are taken in
    turn. prompts: sample k is of prompt k mod their number; default the pipeline's own. Raises ShapeError for labels
    out of range, names of no class, prompts of other widths than the network takes, a count or batch size below 1, or
    settings that do not fit.

    ```python
    fewstep.generate(fewstep.load("runs/photos-64"), 16, steps=1, labels=["flower"]).pil()
    ```
    """
    settings = replace(settings, **changes)
    if count < 1 or settings.batch_size < 1:
        raise ShapeError(f"{count} samples in batches of {settings.batch_size}: both must be at least 1")
    flow_map, known = (model, ()) if isinstance(model, FlowMap) else (model.flow_map, model.step_times)
    check_memory(4 * count * math.prod(flow_map.sample_shape), f"drawing {count} samples", "draw fewer")
    names, bounds = ((), None) if isinstance(model, FlowMap) else (model.class_names, model.data_range)
    numbered = class_numbers(labels, names, count) if _are_names(labels) else labels
    known_labels = _check_labels(numbered, count, first, flow_map.num_classes)
    if prompts is None and not isinstance(model, FlowMap):
        prompts = model.prompts
    _check_prompts(prompts, flow_map)
    times, sampler = settings.grid(flow_map.path, known), settings.function()
    guided: Model = flow_map
    if settings.guidance_scale != 1.0 and not flow_map.guided:
        guided = ClassifierFreeGuidance(flow_map, settings.guidance_scale, settings.interval)
    device = next(flow_map.parameters()).device
    batches = []
    with counting(flow_map.network) as rows, evaluating(flow_map):
        start = time.perf_counter()
        for low in range(0, count, settings.batch_size):
            part = slice(low, min(low + settings.batch_size, count))
            numbers = torch.arange(first + part.start, first + part.stop)
            draws = Draws(settings.seed, 0, numbers.to(device))
            own = None if known_labels is None else known_labels[part].to(device)
            asked = None if prompts is None else prompts[numbers % len(prompts)].to(device)
            cond = sampling_condition(own, flow_map.guided, settings.guidance_scale, settings.interval, asked)
            batches.append(sampler(guided, prior_noise(flow_map, draws), times, cond, draws).cpu())
        seconds = time.perf_counter() - start
    samples = torch.cat(batches)
    if bounds is not None and settings.clip:
        samples = samples.clamp(*bounds)
    drawn = Generated(samples, known_labels, sum(rows) / count, seconds)
    return drawn if isinstance(model, FlowMap) else replace(drawn, pixels=model.pixels)


def class_number(name: str, names: tuple[str, ...]) -> int:
    """The class of that name; its number where no class has a number for its name. Raises ShapeError for no class."""
    if name in names:
        return names.index(name)
    renamed = any(each.isdecimal() and each != str(number) for number, each in enumerate(names))
    if re.fullmatch(r"-?\d+", name) and (name == "-1" or not renamed):
        return int(name)
    raise ShapeError(f"this model has no class {name!r}: its classes are {listed(names) or 'none'}")


def class_numbers(labels: Sequence[str] | str, names: tuple[str, ...], count: int) -> list[int]:
    """`count` classes by their names, in turn."""
    own = [class_number(name, names) for name in ([labels] if isinstance(labels, str) else labels)]
    return [own[k % len(own)] for k in range(count)]


def _are_names(labels: Labels | None) -> TypeGuard[Sequence[str] | str]:
    return isinstance(labels, str) or (isinstance(labels, (list, tuple)) and any(isinstance(k, str) for k in labels))


def _check_prompts(prompts: PromptSource | None, flow_map: FlowMap) -> None:
    if prompts is None:
        return
    if not isinstance(flow_map.network, Network) or flow_map.network.prompt_widths == (0, 0):
        raise ShapeError("prompts given, but this model takes none: leave them out")
    if not len(prompts):
        raise ShapeError("no prompts given: give at least one")
    found, widths = prompts[torch.zeros(1, dtype=torch.int64)], flow_map.network.prompt_widths
    own = found.text.shape[-1], 0 if found.pooled is None else found.pooled.shape[-1]
    if own != widths:
        raise ShapeError(f"prompts embedded with widths {own} (tokens, pooled), but this model takes {widths}")


def _check_labels(labels: Any, count: int, first: int, num_classes: int) -> Tensor | None:
    if labels is None:
        return torch.arange(first, first + count) % num_classes if num_classes else None
    if num_classes == 0:
        raise ShapeError("class labels given, but this model was trained without classes: leave them out")
    whole = _whole_numbers(labels)
    if whole.shape != (count,):
        raise ShapeError(f"{tuple(whole.shape)} labels for {count} samples: give one per sample, or names in turn")
    wrong = whole[(whole < -1) | (whole >= num_classes)]
    if len(wrong):
        raise ShapeError(f"class {int(wrong[0])} is out of range: this model knows classes 0 to {num_classes - 1}")
    return whole


def _whole_numbers(labels: Any) -> Tensor:
    """Labels as int64; raises ShapeError for others than whole numbers of 64 bits."""
    try:
        found = torch.as_tensor(labels)
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ShapeError(f"the labels are no whole numbers of 64 bits ({reason}): give a class per sample") from error
    whole = found.long() if found.dtype != torch.bool and not found.is_complex() else None
    if whole is None or not bool((whole == found).all()):
        raise ShapeError(f"labels of {found.dtype} that are no whole numbers of 64 bits: give a class per sample")
    return whole


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside; the mode it had after. Nothing is set where nothing trains: that is slow."""
    if not _trains(module):
        yield
        return
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _trains(module: nn.Module) -> bool:
    """Whether it or a part of it is in training mode; `modules` would name every part, which takes its time."""
    return module.training or any(_trains(each) for each in module.children())


@contextmanager
def counting(network: nn.Module) -> Iterator[list[int]]:
    """The number of rows in every evaluation of the network: together, evaluations times samples."""
    rows: list[int] = []
    handle = network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        handle.remove()
