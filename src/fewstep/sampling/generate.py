"""Samples of a flow map: how they are drawn, and drawing them. Network evaluations (NFE) are counted, not assumed."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from fewstep.flow.flow_map import FlowMap
from fewstep.flow.guidance import ClassifierFreeGuidance, sampling_condition
from fewstep.flow.paths import Path
from fewstep.flow.times import GRIDS, check_grid
from fewstep.networks.base import Network
from fewstep.networks.condition import Prompts
from fewstep.sampling.samplers import Model, Sampler, sampler_of
from fewstep.sampling.step_times import Purpose, SamplerName, StepTimes
from fewstep.utils.errors import ShapeError
from fewstep.utils.random import Draws
from fewstep.utils.tensors import check_memory

STREAM_PRIOR = 20
Spacing = Literal["auto", "uniform", "edm"]


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample. times overrides steps.

    spacing: uniform on the path's unit clock, or EDM's (rho = 7); auto takes the times tuned for the flow map where it
    has them for this sampler, guidance and number of steps, else what the path prefers: EDM's on its own, else uniform.

    guidance_scale: omega, on the unit times of interval. A network trained with drawn guidance takes it as an
    input; otherwise guidance_scale != 1 doubles the evaluations.
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
    """Samples (n, ...) on the CPU, their labels, network evaluations per sample, and seconds of sampling."""

    samples: Tensor
    labels: Tensor | None
    nfe: float
    seconds: float

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
    """A flow map with the step times found for it: a Pipeline."""

    @property
    def flow_map(self) -> FlowMap:
        """What is sampled."""

    @property
    def step_times(self) -> tuple[StepTimes, ...]:
        """Where, as far as times were tuned."""

    @property
    def prompts(self) -> Prompts | None:
        """What samples are drawn of where nothing else is asked for."""


@torch.no_grad()
def generate(
    model: FlowMap | Timed,
    count: int,
    settings: SamplingSettings,
    labels: Tensor | Sequence[int] | None = None,
    first: int = 0,
    prompts: PromptSource | None = None,
) -> Generated:
    """Draw samples first .. first + count - 1 of the seed in batches, on the model's device.

    model: a flow map, or a pipeline, which knows the step times found for it.
    labels: (count,) whole numbers, -1 for no class, default k mod num_classes. prompts: sample k is of prompt k mod
    their number; default the pipeline's own. Raises ShapeError for labels out of range, prompts of other widths than
    the network takes, a count or batch size below 1, or settings that do not fit.
    """
    if count < 1 or settings.batch_size < 1:
        raise ShapeError(f"{count} samples in batches of {settings.batch_size}: both must be at least 1")
    flow_map, known = (model, ()) if isinstance(model, FlowMap) else (model.flow_map, model.step_times)
    check_memory(4 * count * math.prod(flow_map.sample_shape), f"drawing {count} samples", "draw fewer")
    labels = _check_labels(labels, count, first, flow_map.num_classes)
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
            own = None if labels is None else labels[part].to(device)
            asked = None if prompts is None else prompts[numbers % len(prompts)].to(device)
            cond = sampling_condition(own, flow_map.guided, settings.guidance_scale, settings.interval, asked)
            batches.append(sampler(guided, prior_noise(flow_map, draws), times, cond, draws).cpu())
        seconds = time.perf_counter() - start
    return Generated(torch.cat(batches), labels, sum(rows) / count, seconds)


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


def _check_labels(labels: Tensor | Sequence[int] | None, count: int, first: int, num_classes: int) -> Tensor | None:
    if labels is None:
        return torch.arange(first, first + count) % num_classes if num_classes else None
    if num_classes == 0:
        raise ShapeError("class labels given, but this model was trained without classes: leave them out")
    labels = _whole_numbers(labels)
    if labels.shape != (count,):
        raise ShapeError(f"{tuple(labels.shape)} labels for {count} samples: give one per sample")
    wrong = labels[(labels < -1) | (labels >= num_classes)]
    if len(wrong):
        raise ShapeError(f"class {int(wrong[0])} is out of range: this model knows classes 0 to {num_classes - 1}")
    return labels


def _whole_numbers(labels: Tensor | Sequence[int]) -> Tensor:
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
    """Evaluation mode (no dropout) inside; the mode it had after."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def counting(network: nn.Module) -> Iterator[list[int]]:
    """The number of rows in every evaluation of the network: together, evaluations times samples."""
    rows: list[int] = []
    handle = network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        handle.remove()
