"""The training loop: devices, processes, accumulation, averages, logs, checkpoints, exact resume.

The only place that knows of them. Randomness is a function of (seed, step, index in the global batch), so a resumed
run equals an unbroken one, and several processes equal one.
"""

from __future__ import annotations

import atexit
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast
from torch import Tensor, nn
from tqdm import tqdm

from fewstep.config import RunConfig, flow_map_config
from fewstep.data import Dataset, batch_indices, random_flip
from fewstep.errors import ConfigError, TrainingDivergedError
from fewstep.flowmap import FlowMap
from fewstep.networks import Network
from fewstep.objectives import Batch, Objective
from fewstep.randomness import Draws
from fewstep.serialization import JSON
from fewstep.training.checkpoint import RunFolder, load_checkpoint, save_checkpoint
from fewstep.training.ema import EMA, make_emas
from fewstep.training.optimizers import Optimizers

STREAM_FLIP = 30

Watcher = Callable[[FlowMap, int], None]
"""Called with the averaged model and the step when samples are due; on the main process alone."""


@dataclass(frozen=True)
class Machine:
    """What does not decide the weights: where the run happens."""

    cpu: bool = False
    """Stay on the CPU even where a GPU is present."""
    micro_batch: int = 0
    """Largest batch a process takes at once; 0 takes its whole share. The global batch stays the recipe's."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra [track])."""
    quiet: bool = False
    """No progress bar."""


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run has done."""

    step: int
    images: int
    seconds: float
    main_process: bool = True
    """False in all processes but the first."""


class TrainStep(nn.Module):
    """An objective's mean loss as a module's forward, so that DDP sees one forward for one backward."""

    def __init__(self, flow_map: FlowMap, objective: Objective, bf16: bool = False) -> None:
        super().__init__()
        self.flow_map, self.objective, self.bf16 = flow_map, objective, bf16

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(mean loss, times (2, B), per-sample logs)."""
        # No cache: a weight cast for a target without gradient must not serve the pass that needs one.
        with torch.autocast(batch.x0.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            losses = self.objective(self.flow_map, batch)
        return losses.mean(), torch.stack([losses.t, losses.s]).detach(), losses.logs


def data_record(dataset: Dataset) -> dict[str, JSON]:
    """What the data measured, stored with the run; a resume on other data is refused by it."""
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "shape": list(dataset.shape),
        # Rounded: the last bits depend on the number of threads that summed.
        "sigma_data": float(f"{dataset.sigma_data:.9g}"),
        "classes": dataset.num_classes,
        "train": len(dataset.train),
        "heldout": len(dataset.heldout),
    }


def build(config: RunConfig, dataset: Dataset) -> FlowMap:
    """The run's flow map with the weights that its seed gives; leaves torch's global generator as it was."""
    settings = flow_map_config(
        config, dataset.shape, dataset.sigma_data, dataset.num_classes, dataset.class_names, dataset.data_range
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.training.seed)
        flow_map = settings.build()
    if config.objective.on_diagonal and isinstance(flow_map.network, Network):
        flow_map.network.freeze_second_time()
    return flow_map


def train(
    config: RunConfig, dataset: Dataset, run: RunFolder, machine: Machine = Machine(), watch: Watcher | None = None
) -> TrainingResult:
    """Train, or go on from the newest checkpoint, until the recipe's images are seen.

    Raises ConfigError for a batch that does not split over the processes, CheckpointError for a folder that holds
    another run or cannot be written, TrainingDivergedError for a loss or gradient that is not finite.
    """
    if machine.threads:
        torch.set_num_threads(machine.threads)
    trainer = Trainer(config, dataset, run, machine, watch)
    return trainer.run_to_end()


class Trainer:
    """One run in progress."""

    def __init__(
        self, config: RunConfig, dataset: Dataset, run: RunFolder, machine: Machine, watch: Watcher | None
    ) -> None:
        self.config, self.dataset, self.run, self.watch, self.machine = config, dataset, run, watch, machine
        handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
        # Accelerate forms a group of CPU processes only when told that there is no other device.
        self.accelerator = Accelerator(
            cpu=machine.cpu or not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=handlers
        )
        atexit.register(_leave_processes)
        self.share, self.accumulation = split_batch(
            config.training.batch_size, self.accelerator.num_processes, machine.micro_batch
        )
        self.flow_map = build(config, dataset).to(self.accelerator.device)
        self.optimizers = Optimizers(self.flow_map.network, config.optimizer)
        self.emas = make_emas(self.flow_map.network, config.training.ema_power, config.training.ema_decay)
        step = TrainStep(self.flow_map, config.objective, config.training.precision == "bf16")
        self.module = self.accelerator.prepare(step)
        self.step, self.seconds = 0, 0.0
        if self.accelerator.is_main_process:
            run.open(config, data_record(dataset))
        self.accelerator.wait_for_everyone()
        if run.checkpoints():
            state = load_checkpoint(run.last_checkpoint(), self.flow_map, self.optimizers, self.emas)
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
        if self.accelerator.is_main_process:
            run.truncate_log(self.step)
        self.window = Window()
        self.board = _tensorboard(run) if machine.tensorboard and self.accelerator.is_main_process else None

    @property
    def images(self) -> int:
        """Images seen."""
        return self.step * self.config.training.batch_size

    @property
    def progress(self) -> float:
        """Share of the run that is done, by images or by seconds."""
        settings = self.config.training
        by_seconds = self.seconds / settings.seconds if settings.seconds else 0.0
        return max(self.images / settings.images, by_seconds)

    @property
    def finished(self) -> bool:
        """Whether the recipe's images, or its seconds, are used up."""
        return self.progress >= 1

    def run_to_end(self) -> TrainingResult:
        """Take steps until finished; the last one is always saved."""
        settings = self.config.training
        self.flow_map.train()
        with self._bar() as bar:
            while not self.finished:
                start = time.perf_counter()
                self.take_step()
                self.seconds = self.agreed(self.seconds + time.perf_counter() - start)
                self._show_progress(bar)
                if self.due(settings.log_images) or self.finished:
                    self.write_log()
                if self.due(settings.checkpoint_images) or self.finished:
                    self.save()
                if settings.sample_images and (self.due(settings.sample_images) or self.finished):
                    self.show()
        if self.board is not None:
            self.board.close()
        return TrainingResult(self.step, self.images, self.seconds, self.accelerator.is_main_process)

    def agreed(self, seconds: float) -> float:
        """The first process's clock where it decides when to stop: all must stop after the same step."""
        if self.accelerator.num_processes == 1 or not self.config.training.seconds:
            return seconds
        clock = torch.tensor(seconds, dtype=torch.float64, device=self.accelerator.device)
        return float(broadcast(clock))

    def due(self, every: int) -> bool:
        """Whether the last step crossed a multiple of `every` images."""
        return self.images // every > (self.images - self.config.training.batch_size) // every

    def take_step(self) -> None:
        """One update from the global batch of this step."""
        self.optimizers.zero_grad()
        torch.manual_seed(self.layer_seed())
        micro = self.share // self.accumulation
        first = self.accelerator.process_index * self.share
        times, total = [], torch.zeros((), device=self.accelerator.device)
        for part in range(self.accumulation):
            batch = self.batch(first + part * micro, micro)
            last = part == self.accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                loss, drawn, logs = self.module(batch)
                self.accelerator.backward(loss / self.accumulation)
            total = total + loss.detach() / self.accumulation
            times.append(drawn)
            self.window.add_terms(logs)
        total = self.accelerator.reduce(total, "mean")
        norm = self.gradient_norm()
        if not (math.isfinite(float(total)) and math.isfinite(norm)):
            self.stop_diverged(float(total), norm, torch.cat(times, dim=1))
        self.step += 1
        factor = self.optimizers.step(self.images, self.progress)
        for ema in self.emas:
            ema.update(self.flow_map.network, self.step)
        self.window.add_step(float(total), norm, factor * self.config.optimizer.lr)

    def batch(self, first: int, count: int) -> Batch:
        """Samples first .. first + count - 1 of this step's global batch."""
        settings, device = self.config.training, self.accelerator.device
        position = self.step * settings.batch_size + first
        x0, labels = self.dataset.train.fetch(batch_indices(len(self.dataset.train), settings.seed, position, count))
        draws = Draws(settings.seed, self.step, torch.arange(first, first + count, device=device))
        x0 = x0.to(device)
        if settings.flip:
            x0 = random_flip(x0, draws, STREAM_FLIP)
        return Batch(x0, None if labels is None else labels.to(device), draws)

    def layer_seed(self) -> int:
        """Seeds what layers draw by themselves (dropout): another for every step and process, the same on resume."""
        index = int(self.accelerator.process_index)
        return ((self.config.training.seed << 44) + (self.step << 12) + index) % 2**63

    def gradient_norm(self) -> float:
        """Norm before clipping; clips when the recipe says so."""
        clip = self.config.optimizer.clip or math.inf
        return float(nn.utils.clip_grad_norm_(self.flow_map.network.parameters(), clip))

    def stop_diverged(self, loss: float, norm: float, times: Tensor) -> None:
        """Raise TrainingDivergedError; nothing on disk changes."""
        found = self.run.checkpoints()
        good = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        t, s = times.double().cpu()
        raise TrainingDivergedError(
            f"step {self.step + 1}: loss {loss}, gradient norm {norm}; "
            f"batch times t in [{t.min():.4g}, {t.max():.4g}], s in [{s.min():.4g}, {s.max():.4g}]; {good}. "
            "Lower the learning rate or the gradient clip and train anew"
        )

    def write_log(self) -> None:
        """One line of log.jsonl: means over the steps since the last."""
        record = self.window.flush(self.config.training.batch_size, self.step, self.images, self.seconds)
        if self.accelerator.is_main_process:
            self.run.append_log(record)
            if self.board is not None:
                for key, value in record.items():
                    self.board.add_scalar(key, value, self.images)

    def save(self) -> None:
        """A checkpoint of this step."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state: dict[str, JSON] = {"step": self.step, "images": self.images, "seconds": self.seconds}
            save_checkpoint(self.run, self.flow_map, self.optimizers, self.emas, state, self.config.training.keep)

    def show(self) -> None:
        """Hand the averaged model to the watcher, then put the weights back."""
        if self.watch is None or not self.accelerator.is_main_process:
            return
        network = self.flow_map.network
        own = {key: value.clone() for key, value in network.state_dict().items()}
        network.load_state_dict(self.emas[0].weights)
        self.flow_map.eval()
        try:
            self.watch(self.flow_map, self.step)
        finally:
            network.load_state_dict(own)
            self.flow_map.train()

    def _bar(self) -> tqdm[Any]:
        """Counts images, or seconds where they end the run."""
        hidden = self.machine.quiet or not self.accelerator.is_main_process
        settings = self.config.training
        total, unit = (settings.seconds, "s") if settings.seconds else (settings.images, "img")
        return tqdm(
            total=total, unit=unit, unit_scale=True, disable=hidden, desc=self.config.recipe, file=sys.stderr,
            mininterval=0.5, bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}",
        )  # fmt: skip

    def _show_progress(self, bar: tqdm[Any]) -> None:
        settings = self.config.training
        bar.n = min(self.progress, 1.0) * (settings.seconds or settings.images)
        speed = f"{self.images:,} images, {self.images / max(self.seconds, 1e-9):,.0f} images/s"
        loss = "" if math.isnan(self.window.last_loss) else f", loss {self.window.last_loss:.4f}"
        bar.set_postfix_str(speed + loss, refresh=False)
        bar.update(0)


def split_batch(batch_size: int, processes: int, micro_batch: int) -> tuple[int, int]:
    """(share of each process, accumulation steps); raises ConfigError when the global batch does not split evenly."""
    if batch_size < processes:
        raise ConfigError(
            f"a batch of {batch_size} is smaller than the {processes} processes: raise --training.batch-size"
        )
    if batch_size % processes:
        raise ConfigError(f"a batch of {batch_size} does not split over {processes} processes: make it a multiple")
    share = batch_size // processes
    if micro_batch < 0:
        raise ConfigError(f"micro_batch is {micro_batch}; it must be at least 1, or 0 for the whole share")
    parts = 1 if micro_batch == 0 else math.ceil(share / micro_batch)
    while share % parts:
        parts += 1
    return share, parts


class Window:
    """Means since the last line of the log."""

    def __init__(self) -> None:
        self.last_loss = math.nan
        self.terms: dict[str, list[float]] = {}
        self.steps: list[tuple[float, float, float]] = []
        self.since = time.perf_counter()

    def add_terms(self, logs: dict[str, Tensor]) -> None:
        for key, value in logs.items():
            mean = float(value.nanmean())
            if math.isfinite(mean):
                self.terms.setdefault(key, []).append(mean)

    def add_step(self, loss: float, norm: float, lr: float) -> None:
        self.steps.append((loss, norm, lr))

    def flush(self, batch_size: int, step: int, images: int, seconds: float) -> dict[str, float]:
        losses, norms, lrs = zip(*self.steps, strict=True)
        now = time.perf_counter()
        self.last_loss = sum(losses) / len(losses)
        record = {
            "step": step,
            "images": images,
            "seconds": round(seconds, 3),
            "loss": self.last_loss,
            **{key: sum(values) / len(values) for key, values in self.terms.items()},
            "grad_norm": sum(norms) / len(norms),
            "grad_norm_max": max(norms),
            "lr": lrs[-1],
            "images_per_second": round(len(losses) * batch_size / max(now - self.since, 1e-9), 1),
        }
        self.terms, self.steps, self.since = {}, [], now
        return record


def _leave_processes() -> None:
    """Close the group before the interpreter goes: its threads would abort a process that has done all its work."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _tensorboard(run: RunFolder) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        from fewstep.errors import MissingExtraError

        raise MissingExtraError("TensorBoard is not installed: pip install 'fewstep[track]'") from error
    return SummaryWriter(str(run.root / "tensorboard"))


__all__ = ["EMA", "Machine", "TrainStep", "Trainer", "TrainingResult", "build", "data_record", "split_batch", "train"]
