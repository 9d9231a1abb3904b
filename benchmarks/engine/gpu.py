"""One GPU in ten minutes: its tests, steps of the recipes of ImageNet-256, attention, samplers; a CPU does it small.

Rows {measure, setting, value, unit, beside}. A row without a value says beside it why there is none: what would no
longer end within the ten minutes is left out.
"""

import gc
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import benchmarks.harness as h
import fewstep as fs
from benchmarks.engine.attention import KINDS, step, written_out
from fewstep.data.base import Samples
from fewstep.flow.derivatives import Derivative
from fewstep.networks.attention import TILE, attention
from fewstep.networks.attention_kernel import kernel_installed, tangent_kernel
from fewstep.networks.dit import DiTConfig
from fewstep.recipes import recipe
from fewstep.training import compiling
from fewstep.training.flops import StepFlops
from fewstep.training.memory import device_name
from fewstep.training.parallel import split_batch
from fewstep.utils.errors import FewstepError

CLASSES, WARM = 1000, 3
LONGEST = 570.0
"""Seconds of all parts; the rest of the ten minutes starts and ends the process."""
TESTS, COMPILING, STEP, SHORT = 240.0, 240.0, 45.0, 15.0
"""Seconds that the tests get at most, and that must be left for a step to be compiled, with what comes after it, for
one to be taken as it is written, and for what is shorter."""


@dataclass(frozen=True)
class Scale:
    """How much is measured. shape: of the latents. networks: by recipe, with its batch and the most taken at once.

    lengths: of attention, in tokens. sampled: samples at once. compiled: recipes whose steps are compiled too.
    until: on time.monotonic, when all ends.
    """

    device: str
    shape: tuple[int, int, int]
    networks: dict[str, tuple[DiTConfig, int, int]]
    steps: int
    lengths: tuple[int, ...]
    sampled: tuple[int, ...]
    compiled: tuple[str, ...]
    until: float = math.inf

    @property
    def left(self) -> float:
        """Seconds until all ends."""
        return self.until - time.monotonic()

    @property
    def tokens(self) -> int:
        """Sides of the latents' grid of numbers, multiplied."""
        return self.shape[1] * self.shape[2]


FULL = Scale(
    "cuda",
    (4, 32, 32),
    {"imagenet256-dit-b4": (DiTConfig.of("B", 4), 256, 256), "imagenet256-dit-xl1": (DiTConfig.of("XL", 1), 64, 32)},
    steps=10,
    lengths=(256, 1024, 4096, 8192),
    sampled=(1, 64),
    compiled=("imagenet256-dit-b4", "imagenet256-dit-xl1"),
)
"""A GPU of 80 GiB or more."""
DRY = Scale(
    "cpu",
    (4, 8, 8),
    {
        "imagenet256-dit-b4": (DiTConfig(width=32, depth=1, heads=2, patch=4), 4, 4),
        "imagenet256-dit-xl1": (DiTConfig(width=32, depth=1, heads=2, patch=2), 4, 2),
    },
    steps=1,
    lengths=(64,),
    sampled=(2,),
    compiled=("imagenet256-dit-b4",),
)
"""The same by the same code, in a minute of a CPU: its figures say nothing."""


def row(measure: str, setting: str, value: float | None, unit: str, beside: str = "") -> h.Row:
    """Of the results; a value to four digits."""
    short = None if value is None else float(f"{value:.4g}")
    return {"measure": measure, "setting": setting, "value": short, "unit": unit, "beside": beside}


def rows(scale: Scale) -> Iterator[h.Row]:
    """Of all that is measured, what says most first."""
    scale = replace(scale, until=time.monotonic() + LONGEST)
    if scale.device == "cpu":
        compiling.BACKEND = "aot_eager"  # cut out as for a GPU, which takes seconds, not made into programs
    yield row("device", device_name(torch.device(scale.device)), None, "", f"torch {torch.__version__}")
    for part in (tests, steps, attentions, samplers):
        yield from part(scale)


def left_out(measure: str, setting: str, unit: str) -> h.Row:
    """Of what would end too late."""
    return row(measure, setting, None, unit, "no time was left")


def tests(scale: Scale) -> Iterator[h.Row]:
    """The tests marked gpu, in a process of their own; on a CPU those of them that it can pass."""
    own = os.environ | ({"FEWSTEP_GPU_TESTS": "cpu"} if scale.device == "cpu" else {})
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
    try:
        found = subprocess.run(command, cwd=h.ROOT, env=own, capture_output=True, text=True, timeout=TESTS, check=False)
    except subprocess.TimeoutExpired:
        yield row("tests marked gpu", "all", None, "exit code", f"no end after {TESTS:.0f} s")
        return
    lines = found.stdout.strip().splitlines()
    last = next((line.strip("= ") for line in reversed(lines) if " in " in line and line[0].isdigit()), "no summary")
    print(found.stdout if found.returncode else last, flush=True)
    yield row("tests marked gpu", "all", found.returncode, "exit code", last)


def synchronize(device: str) -> None:
    """Wait for what a GPU still does."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(job: Callable[[], object], scale: Scale, times: int) -> float:
    """Median of a job's time, after WARM that warm up; where the time is up fewer, at least one of each."""
    spent: list[float] = []
    for turn in range(WARM + times):
        synchronize(scale.device)
        start = time.perf_counter()
        job()
        synchronize(scale.device)
        if turn >= WARM or (turn and scale.left < 0):
            spent.append(time.perf_counter() - start)
        if spent and scale.left < 0:
            break
    return statistics.median(spent)


def peak(device: str) -> float:
    """GiB that were allocated on a GPU since `forget`; 0 of a CPU, where other processes' turns count."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0


def forget(device: str) -> None:
    """Begin a peak of memory anew, without what earlier jobs have left."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def attentions(scale: Scale) -> Iterator[h.Row]:
    """Time and peak memory of one attention, forward and backward, against the one written out."""
    dtype = torch.bfloat16 if scale.device == "cuda" else torch.float32
    for length in scale.lengths:
        for kind, name in KINDS.items():
            setting, found = f"{length} tokens, {name}", {}
            if scale.left < SHORT:
                yield left_out("attention, time", setting, "ms")
                continue
            for form in (attention, written_out):
                forget(scale.device)
                try:
                    job = partial(step, form, kind, length, scale.device, dtype)
                    with tangent_kernel(False):
                        spent = seconds(job, scale, 3)
                    found[form] = f"{1000 * spent:.4g} ms", 1000 * spent, peak(scale.device)
                except torch.OutOfMemoryError:
                    found[form] = "out of memory", None, None
            own, usual = found[attention], found[written_out]
            yield row("attention, time", setting, own[1], "ms", f"{usual[0]} written out")
            memory = "out of memory" if usual[2] is None else f"{usual[2]:.4g} GiB"
            yield row("attention, peak memory", setting, own[2], "GiB", f"{memory} written out")
            if kind == "tangent" and length**2 > TILE:
                yield by_kernel(scale, length, dtype, found[attention][0])


def by_kernel(scale: Scale, length: int, dtype: torch.dtype, tiled: str) -> h.Row:
    """Time of the same where jvp-flash-attention's kernel takes the tangent."""
    setting = f"{length} tokens, a tangent by the kernel of [gpu]"
    if not kernel_installed():
        return row("attention, time", setting, None, "ms", "jvp-flash-attention is not installed")
    with tangent_kernel(True):
        spent = seconds(partial(step, attention, "tangent", length, scale.device, dtype), scale, 3)
    return row("attention, time", setting, 1000 * spent, "ms", f"{tiled} in tiles")


def latents(scale: Scale, count: int) -> fs.Dataset:
    """Made-up ones, in classes."""
    values = torch.randn(count, *scale.shape, generator=torch.Generator().manual_seed(0))
    samples = Samples(values, torch.arange(count) % CLASSES)
    return fs.Dataset("made-up latents", samples, samples, CLASSES, tuple(map(str, range(CLASSES))))


def objectives(config: fs.RunConfig) -> dict[str, Any]:
    """Flow matching, and the recipe's objective by each derivative."""
    own: Any = config.objective
    return {
        "flow matching": fs.DiagonalMatching(),
        "iSD, finite differences": replace(own, derivative=Derivative("finite-difference")),
        "iSD, exact": replace(own, derivative=Derivative("exact")),
    }


@dataclass(frozen=True)
class Taken:
    """What a step took."""

    seconds: float
    gib: float
    flops: StepFlops
    utilisation: float | None


def take(scale: Scale, config: fs.RunConfig, micro: int, compiled: bool) -> Taken:
    """Steps of a trainer, in parts of so many samples."""
    runtime = fs.Runtime(cpu=scale.device == "cpu", quiet=True, micro_batch=micro, compile=compiled)
    forget(scale.device)
    with h.trainer_of(config, latents(scale, config.training.batch_size * 4), runtime=runtime) as trainer:
        spent = seconds(trainer.take_step, scale, scale.steps)
        return Taken(spent, peak(scale.device), trainer.cost.step, trainer.cost.at(1 / spent).get("utilisation"))


def fitting(scale: Scale, config: fs.RunConfig, micro: int, compiled: bool) -> tuple[int, Taken]:
    """The same in parts of half the size, as often as memory runs out."""
    while True:
        try:
            return micro, take(scale, config, micro, compiled)
        except torch.OutOfMemoryError:
            if micro == 1:
                raise
            micro //= 2


def steps(scale: Scale) -> Iterator[h.Row]:
    """A step of each network and objective: time, utilisation, memory, ratio to flow matching; then compiled."""
    for compiled in (False, True):
        for name in scale.compiled if compiled else scale.networks:
            base: float | None = None
            for objective, config, batch, most in configs(scale, name):
                setting = f"{name}, {scale.tokens // scale.networks[name][0].patch ** 2} tokens, batch of {batch}, "
                setting += objective + (", compiled" if compiled else "")
                if scale.left < (COMPILING if compiled else STEP):
                    yield left_out("a step", setting, "ms")
                    continue
                try:
                    micro, found = fitting(scale, config, most, compiled)
                except (FewstepError, RuntimeError) as error:
                    reason = " ".join(str(error).split())[:160]
                    yield row("a step", setting, None, "ms", reason or type(error).__name__)
                    continue
                base = base or found.seconds
                yield from step_rows(setting, found, base, split_batch(batch, 1, micro)[1])


def configs(scale: Scale, name: str) -> Iterator[tuple[str, fs.RunConfig, int, int]]:
    """Each objective of a recipe: its name, the run, its batch, and the most that is taken at once."""
    (network, batch, most), config = scale.networks[name], recipe(name)
    training = replace(config.training, batch_size=batch, precision="bf16")
    for objective, each in objectives(config).items():
        yield objective, replace(config, network=network, training=training, objective=each), batch, most


def step_rows(setting: str, found: Taken, base: float, parts: int) -> Iterator[h.Row]:
    """What is told of one."""
    flops = found.flops.total
    yield row("a step", setting, 1000 * found.seconds, "ms", f"in {parts} parts")
    beside = f"{flops / found.seconds / 1e12:.4g} TFLOP/s, {found.flops.wide / max(flops, 1):.0%} of it in float32"
    yield row("a step, share of the device's peak", setting, found.utilisation, "", beside)
    yield row("a step, peak memory", setting, found.gib, "GiB")
    yield row("a step, ratio", setting, found.seconds / base, "times a step of flow matching")


def draw(flow_map: fs.FlowMap, count: int, calls: int, dtype: torch.dtype) -> None:
    """Samples, which end on the host."""
    device = next(flow_map.parameters()).device.type
    with torch.autocast(device, dtype, enabled=dtype is torch.bfloat16):
        fs.generate(flow_map, count, steps=calls)


def samplers(scale: Scale) -> Iterator[h.Row]:
    """Time of samples in one, two and four network calls, in float32 and bf16."""
    device = torch.device(scale.device)
    for name, (network, _, _) in scale.networks.items():
        built = network.build(scale.shape, CLASSES, False)
        flow_map = fs.FlowMap(fs.Linear(), fs.LinearPreconditioning(), built).to(device).eval()
        for count in scale.sampled:
            for calls in (1, 2, 4):
                for dtype in (torch.float32, torch.bfloat16):
                    setting = f"{name}, {count} at once, {calls} calls, {str(dtype).removeprefix('torch.')}"
                    if scale.left < SHORT:
                        yield left_out("sampler latency", setting, "ms")
                        continue
                    spent = seconds(partial(draw, flow_map, count, calls, dtype), scale, scale.steps)
                    yield row("sampler latency", setting, 1000 * spent, "ms", f"{count / spent:,.4g} samples/s")
        del flow_map, built
        forget(scale.device)
